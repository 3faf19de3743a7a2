# SPDX-License-Identifier: Apache-2.0
"""How the turn policies fare on one simulated device: the tables of docs/scheduling.md.

    python -m bench.sim.turns_sim --json bench/results/turns_sim.json

A rate that a policy carries is the highest arrival rate per model, on a grid with steps of a tenth, at which at least
90 % of all tokens come on time. Shares are those of fixed traces, some of them far beyond what the device can do. KV
always fits and copies do not slow steps: the figures show what a policy decides, not what a device does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bench.parts import common
from tokenpool.config import SLO
from tokenpool.policy.turns import load_turn_policy
from tokenpool.sim import generate
from tokenpool.sim.cluster import Cluster
from tokenpool.sim.device_spec import DeviceSpec
from tokenpool.sim.result import SimResult
from tokenpool.sim.router import FrontendRouter
from tokenpool.sim.workload import ModelCosts, Workload

_GIB = 1 << 30
FAST = ModelCosts(_GIB, 1024.0, 0.008, 20e-6, 0.0, 0.007, 1e-4, 0.0)
"""A 7B model on a large GPU, rounded; 0.3 s over the link of `device`, as the weights of such a model take."""
SLOW = FAST._replace(weight_bytes=2 * _GIB, step_s=0.012)
SLO_10S = SLO(10.0, 0.1)
POLICIES: dict[str, tuple[str, dict[str, float]]] = {
    "round_robin": ("round_robin", {}),
    "request_level": ("request_level", {}),
    "aegaeon": ("aegaeon", {}),
    "aegaeon, tuned": ("aegaeon", {"join": 1, "quota_max_s": 0.5}),
    "slack": ("slack", {}),
}
_LEAST_RATE, _STEP, _NUM_RATES = 0.01, 1.1, 56
_DURATION_S, _TABLE_S, _NUM_SEEDS = 300.0, 200.0, 2


class Scenario(NamedTuple):
    """One trace: models, how many of them fit, and arrivals."""

    title: str
    costs: ModelCosts = FAST
    num_models: int = 12
    num_resident: int = 4
    rate_per_s: float = 0.1
    """Mean over the models."""
    skew: float = 0.0
    slo: SLO = SLO_10S

    def workload(self, seed: int, duration_s: float) -> Workload:
        """Prompts and answers of ShareGPT."""
        rates = dict.fromkeys([f"m{i:02}" for i in range(self.num_models)], self.rate_per_s)
        return generate.poisson(rates, duration_s, seed, kinds=dict.fromkeys(rates, "any"), skew=self.skew)

    def run(self, policy: str, options: dict[str, float], seed: int, duration_s: float) -> tuple[SimResult, float]:
        """Serve the trace to its end; returns what came of it, and the share of the busy time that is switching."""
        cluster = Cluster(
            [device(self.costs, self.num_resident)],
            lambda: load_turn_policy(policy, options),
            FrontendRouter(),
            lambda model: self.costs,
            self.slo,
        )
        # What is not done by twice the time is lost; only round robin is ever that late.
        result = cluster.run(self.workload(seed, duration_s), drain_s=duration_s + 60)
        return result, switching_frac(cluster)


def device(costs: ModelCosts, num_resident: int) -> DeviceSpec:
    """With room for the weights of so many models, and for KV; with room for one it says that it cannot prefetch."""
    memory_bytes = num_resident * costs.weight_bytes + _GIB // 2
    return DeviceSpec(memory_bytes, _GIB / 0.3, max_batched_tokens=2048, can_prefetch=num_resident > 1)


def switching_frac(cluster: Cluster) -> float:
    """Share of the time with work in which the only device waited for weights."""
    (one,) = cluster.devices
    total_s = one.waited_s + one.busy_s
    return one.waited_s / total_s if total_s else 0.0


SCENARIOS = (
    Scenario("12 equal, 4 fit"),
    Scenario("12 equal, 4 fit, x2.5", rate_per_s=0.25),
    Scenario("12 equal, 4 fit, x8", rate_per_s=0.8),
    Scenario("12 equal, 2 fit, x2", num_resident=2, rate_per_s=0.2),
    Scenario("12 equal, 1 fits", num_resident=1),
    Scenario("12 slow, 4 fit, x0.4", SLOW, rate_per_s=0.04),
    Scenario("12 slow, 4 fit", SLOW),
    Scenario("24 Zipf 1, 4 fit", num_models=24, skew=1.0),
    Scenario("40 equal, 4 fit, x0.2", num_models=40, rate_per_s=0.02),
    Scenario("40 equal, 4 fit, x0.5", num_models=40, rate_per_s=0.05),
    Scenario("12 equal, ttft 1 s, x3", rate_per_s=0.3, slo=SLO(1.0, 0.1)),
)


@dataclass(slots=True)
class TurnsResult:
    slack_fast_per_s: float
    slack_slow_per_s: float
    least_won_points: float
    """Least of all traces: tokens on time under `slack` less those of the best other policy, in points of percent."""
    carried: dict[str, dict[str, float]]
    """Requests per second and model by kind and policy."""
    shares: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By trace and policy, in percent."""


def carried_rate_per_s(base: Scenario, policy: str, options: dict[str, float], seed: int) -> float:
    """The last rate of the grid with 90 % of tokens on time, averaged over seeds, taken to fall with the rate."""

    def is_good(number: int) -> bool:
        trial = base._replace(rate_per_s=_LEAST_RATE * _STEP**number)
        seeds = range(seed, seed + _NUM_SEEDS)
        return sum([trial.run(policy, options, s, _DURATION_S)[0].token_attainment for s in seeds]) >= 0.9 * _NUM_SEEDS

    good, bad = -1, _NUM_RATES
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if is_good(middle) else (good, middle)
    return _LEAST_RATE * _STEP**good if good >= 0 else 0.0


def run(seed: int, **_: object) -> TurnsResult:
    carried: dict[str, dict[str, float]] = {}
    for title, costs in (("fast", FAST), ("slow", SLOW)):
        for name, (policy, options) in POLICIES.items():
            rate = carried_rate_per_s(Scenario("", costs), policy, options, seed)
            carried.setdefault(title, {})[name] = rate
            common.progress(f"{title}, {name}: {rate:.3f} per second and model")
    shares: dict[str, dict[str, Any]] = {}
    for scenario in SCENARIOS:
        for name, (policy, options) in POLICIES.items():
            result, switching = scenario.run(policy, options, seed, _TABLE_S)
            found = (result.token_attainment, result.request_attainment, result.time_weighted_attainment, switching)
            percents = [round(100 * share, 1) for share in found]
            shares.setdefault(scenario.title, {})[name] = dict(
                zip(("tokens", "requests", "time_weighted", "switching"), percents, strict=True)
            )
            common.progress(f"{scenario.title}, {name}: " + " / ".join(f"{percent:.0f}" for percent in percents))
    won = []
    for row in shares.values():
        others = [values["tokens"] for name, values in row.items() if name != "slack"]
        won.append(row["slack"]["tokens"] - max(others))
    return TurnsResult(carried["fast"]["slack"], carried["slow"]["slack"], min(won), carried, shares)


def main() -> None:
    keys = ["slack_fast_per_s", "slack_slow_per_s", "least_won_points"]
    common.report("turns_sim", run, common.parser(__doc__).parse_args(), keys)


if __name__ == "__main__":
    main()
