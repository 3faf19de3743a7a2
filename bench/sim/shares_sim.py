# SPDX-License-Identifier: Apache-2.0
"""Would shares of turns protect important models on a host with too much to do? Simulated; no GPU.

    python -m bench.sim.shares_sim --json bench/results/shares_sim.json

One device, six models, two of them more important, more work than the device can do in time. `priority`: the turn
policy `slack` knows the priorities. `share`: each model also has a floor of the device's time, from the highest
priority down what it needs, and the rest gets what is left; a model behind its floor runs next. docs/capacity.md says
why the controller decides about no shares.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

from bench.parts import common
from tokenpool.config import SLO
from tokenpool.policy.turns import Decision, PoolView, Residency, load_turn_policy
from tokenpool.sim.device_spec import DeviceSpec
from tokenpool.sim.live import LivePool, LiveSettings
from tokenpool.sim.timeline import Timeline
from tokenpool.sim.workload import ModelCosts, SimRequest, Workload

_GB = 1 << 30
_COSTS = ModelCosts(4 * _GB, 1 << 15, 0.02, 1e-4, 0.0, 0.02, 0.002, 0.0)
_SLO = SLO(5.0, 0.1)
_MODELS = tuple(f"m{i}" for i in range(6))
_PRIORITY = {name: int(i < 2) for i, name in enumerate(_MODELS)}
_INPUT, _OUTPUT, _DURATION_S = 200, 100, 300.0
_MAX_CREDIT_S, _MIN_CREDIT_S, _HOLD_S = 5.0, 0.2, 0.1
ARMS = ("none", "priority", "priority_and_share", "share")


@dataclass(slots=True)
class SharesResult:
    high_priority_pct: float
    """Tokens on time of the important models with priorities alone, mean over all loads."""
    high_shares_pct: float
    """With priorities and shares."""
    priority_wins: int
    """Loads at which priorities alone did at least as well for the important models."""
    loads: int
    high_pct: dict[str, float]
    """Tokens on time of the important models by arm, mean over all loads."""
    all_pct: dict[str, float]
    rows: list[dict[str, Any]] = field(default_factory=list)


class SharedSlack:
    """`slack` with priorities and, over it, floors of service: `shares` of the time by model, empty for none."""

    def __init__(self, priority: dict[str, int], shares: dict[str, float]) -> None:
        self._inner, self._priority, self._shares = load_turn_policy("slack"), priority, shares
        self._last: tuple[float, str] | None = None
        self._credit_s = dict.fromkeys(shares, 0.0)

    def decide(self, pool: PoolView) -> Decision:
        """The model that is furthest behind its floor, if one is and it can run; else as `slack`."""
        models = [view._replace(priority=self._priority.get(view.model, 0)) for view in pool.models]
        decision = self._inner.decide(pool._replace(models=models))
        if self._shares:
            self._earn(pool)
            resident = [view.model for view in models if view.residency is Residency.ON_DEVICE]
            behind = max(resident, key=self._credit_s.__getitem__, default=decision.run)
            if self._credit_s[behind] > _MIN_CREDIT_S and self._credit_s[decision.run] <= 0:
                decision = decision._replace(run=behind)
            decision = decision._replace(hold_s=min(decision.hold_s, _HOLD_S))
        self._last = pool.now_s, decision.run
        return decision

    def _earn(self, pool: PoolView) -> None:
        then_s, ran = self._last or (pool.now_s, "")
        passed_s, has_work = pool.now_s - then_s, {view.model for view in pool.models}
        for name, share in self._shares.items():
            credit_s = self._credit_s[name] - passed_s * (name == ran)
            credit_s = credit_s + passed_s * share if name in has_work else min(0.0, credit_s)
            self._credit_s[name] = max(-_MAX_CREDIT_S, min(_MAX_CREDIT_S, credit_s))


class _Recorded(LivePool):
    """Counts tokens on time by model."""

    on_time: dict[str, int]

    def _done(self, request: Timeline) -> None:
        self.on_time[request.spec.model] += request.num_on_time
        super()._done(request)


def _need(rate: float) -> float:
    """Share of the device's time that a model asks for; see `tokenpool.policy.capacity_board`."""
    n = rate * _OUTPUT * _SLO.tpot_s
    steps = -math.expm1(-n) * _COSTS.step_s / _SLO.tpot_s + n * _COSTS.step_per_request_s / _SLO.tpot_s
    return steps + rate * _COSTS.prefill(_INPUT, _INPUT**2)


def shares_of(rates: dict[str, float]) -> dict[str, float]:
    """Floors: the important models what they need, the others what is left, in proportion to need; sum 1 at most."""
    shares, left = {}, 1.0
    for priority in sorted(set(_PRIORITY.values()), reverse=True):
        need = {name: _need(rate) for name, rate in rates.items() if _PRIORITY[name] == priority}
        part = min(1.0, left / sum(need.values()))
        shares |= {name: part * work for name, work in need.items()}
        left = max(0.0, left - sum(need.values()))
    return shares


def _serve(rates: dict[str, float], arm: str, memory_bytes: int, seed: int) -> dict[str, float]:
    requests = []
    for name, rate in rates.items():
        rng, now_s = random.Random(f"{seed}/{name}"), 0.0
        while (now_s := now_s + rng.expovariate(rate)) < _DURATION_S:
            requests.append(SimRequest(now_s, name, _INPUT, _OUTPUT))
    priority = _PRIORITY if arm.startswith("priority") else {}
    shares = shares_of(rates) if arm.endswith("share") else {}
    spec, costs = DeviceSpec(memory_bytes, 8 * _GB), dict.fromkeys(rates, _COSTS)
    pool = _Recorded([spec], lambda: SharedSlack(priority, shares), costs, _SLO, None, LiveSettings())
    pool.on_time = dict.fromkeys(rates, 0)
    pool.run(Workload(sorted(requests), dict.fromkeys(rates, "any")), drain_s=60.0)
    wanted = dict.fromkeys(rates, 0)
    for request in requests:
        wanted[request.model] += request.output_len

    def percent(names: list[str]) -> float:
        return 100 * sum([pool.on_time[name] for name in names]) / sum([wanted[name] for name in names])

    return {"high": percent([name for name in rates if _PRIORITY[name]]), "all": percent(list(rates))}


def run(seed: int, **_: object) -> SharesResult:
    rows = []
    for memory_bytes in (48 * _GB, 16 * _GB):
        for rate in (0.4, 0.6, 0.8, 1.0, 1.5, 2.0):
            for boost in (1, 2):
                rates = {name: rate * (boost if _PRIORITY[name] else 1) for name in _MODELS}
                arms = {arm: _serve(rates, arm, memory_bytes, seed) for arm in ARMS}
                load = sum([_need(rate) for rate in rates.values()])
                rows.append({"memory_bytes": memory_bytes, "load": load, "boost": boost} | arms)
                high = " ".join(f"{arm}={values['high']:.0f}%" for arm, values in arms.items())
                common.progress(f"load {load:.2f}, {memory_bytes >> 30} GiB, important models on time: {high}")
    wins = sum([row["priority_and_share"]["high"] <= row["priority"]["high"] for row in rows])
    means = {key: {arm: sum([row[arm][key] for row in rows]) / len(rows) for arm in ARMS} for key in ("high", "all")}
    high = means["high"]
    return SharesResult(high["priority"], high["priority_and_share"], wins, len(rows), high, means["all"], rows)


def main() -> None:
    keys = ["high_priority_pct", "high_shares_pct", "priority_wins", "loads"]
    common.report("shares_sim", run, common.parser(__doc__).parse_args(), keys)


if __name__ == "__main__":
    main()
