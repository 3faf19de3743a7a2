# SPDX-License-Identifier: Apache-2.0
"""What a decision of the capacity policy costs: 1,000 hosts, 5,000 models, one core.

    python -m bench.sim.controller_cost --json bench/results/controller_cost.json

Models have Zipf-like traffic; each decision sees other traffic, some of it a flip of popularity, and a host that is
lost now and then. `decide_ms` is the policy alone, on a view that is there. `whole_ms` is all that a controller's
placement does in a period: it notes the rates of all reports, builds the view and decides. Times are CPU times of the
one thread, so that other work on the machine counts only where it shares caches and cores.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace

from bench.parts import common
from tokenpool.cluster.live_placement import placement_of
from tokenpool.cluster.placement import KeepReplicas, Situation
from tokenpool.cluster.reconcile import Reconciler
from tokenpool.cluster.values import Deployment, HostedReport, HostReport
from tokenpool.cluster_config import ClusterConfig
from tokenpool.policy.capacity import CapacityHost, CapacityModel, CapacityView, HostState, StepCosts
from tokenpool.policy.capacity_laws import apply_all, finish
from tokenpool.policy.capacity_live import LiveCapacity

_GB = 1 << 30
_COSTS = StepCosts(0.008, 1e-4, 0.0, 0.01, 4e-5)


@dataclass(slots=True)
class CostResult:
    hosts: int
    models: int
    decide_ms_p50: float
    decide_ms_p99: float
    decide_ms_max: float
    boot_decisions: int
    boot_calls: int
    boot_ms_max: float
    whole_ms_p50: float
    whole_ms_p99: float
    whole_ms_max: float
    reports_per_s: float
    """Reports of hosts that the reconciler takes per second of CPU time."""
    decisions: dict[str, int] = field(default_factory=dict)
    whole_moves: dict[str, int] = field(default_factory=dict)


def make_view(num_hosts: int, num_models: int, rng: random.Random) -> CapacityView:
    """Hosts in machines of eight, and models nobody has placed yet."""
    hosts = tuple(CapacityHost(f"h{i}", f"n{i // 8}", 68 * _GB, 256 * _GB) for i in range(num_hosts))
    models = [
        CapacityModel(f"m{i}", rng.choice((7, 14, 26)) * _GB, _GB, 10.0, 0.1, costs=_COSTS) for i in range(num_models)
    ]
    return CapacityView(0.0, hosts, tuple(models))


def with_traffic(view: CapacityView, load: float, rng: random.Random, flips: int) -> CapacityView:
    """The same pool with a Zipf-like traffic that takes about `load` of all hosts; `flips` models swap ranks."""
    ranks = list(range(1, len(view.models) + 1))
    for _ in range(flips):
        i, j = rng.randrange(20), rng.randrange(len(ranks))
        ranks[i], ranks[j] = ranks[j], ranks[i]
    unit = load * len(view.hosts) * 5.0 / sum([1 / rank for rank in ranks])
    models = []
    for model, rank in zip(view.models, ranks, strict=True):
        rate = unit / rank * rng.uniform(0.9, 1.1)
        traffic = {"arrivals_per_s": rate, "input_tokens_per_s": 690 * rate, "output_tokens_per_s": 295 * rate}
        models.append(replace(model, **traffic, since_move_s=model.since_move_s + 60))
    return replace(view, models=tuple(models))


def run(seed: int, hosts: int, models: int, decisions: int, **_: object) -> CostResult:
    rng, policy, counts = random.Random(seed), LiveCapacity(), Counter()
    view = with_traffic(make_view(hosts, models, rng), 0.5, rng, 0)
    boot_ms, placed = [], 0
    while True:
        made, ms = _timed(policy, view)
        boot_ms.append(ms)
        placed += len(made)
        view = finish(apply_all(view, made))
        if not any(decision.action == "place" for decision in made):
            break
    common.progress(f"placed in {len(boot_ms)} calls")
    times = []
    for i in range(decisions):
        view = with_traffic(view, 0.5 + 0.3 * (i % 10 == 5), rng, flips=4 if i % 10 == 5 else 0)
        if i % 25 == 24:
            lost = rng.randrange(hosts)
            states = [replace(h, state=HostState.LOST) if j == lost else h for j, h in enumerate(view.hosts)]
            view = replace(view, hosts=tuple(states))
        made, ms = _timed(policy, view)
        times.append(ms)
        counts.update(decision.action.value for decision in made)
        view = finish(apply_all(view, made))
    common.progress(f"decided {decisions} times")
    whole_ms, reports_per_s, moves = _whole(hosts, models, decisions, rng)
    decide, whole = ([*(common.percentile(ms, percent) for percent in (50, 99)), max(ms)] for ms in (times, whole_ms))
    boot = len(boot_ms), max(boot_ms)
    return CostResult(hosts, models, *decide, placed, *boot, *whole, reports_per_s, dict(counts), moves)


class Fleet:
    """Hosts that report as real ones do: running totals of each model, which grow with its traffic."""

    def __init__(self, num_hosts: int, num_models: int, rng: random.Random) -> None:
        self.deployments = {
            f"m{i}": Deployment(f"m{i}", 1, rng.choice((7, 14, 26)) * _GB, details={"ttft_s": 10.0, "tpot_s": 0.1})
            for i in range(num_models)
        }
        unit = 0.5 * num_hosts * 5.0 / sum([1 / rank for rank in range(1, num_models + 1)])
        self.rates = {name: unit / rank for rank, name in enumerate(self.deployments, 1)}
        self.seats = {f"h{i}": {} for i in range(num_hosts)}
        """Seconds of work by host and model."""
        for i, name in enumerate(self.deployments):
            self.seats[f"h{i % num_hosts}"][name] = 0.0

    def placed(self) -> dict[str, set[str]]:
        """Hosts by model."""
        found = {name: set() for name in self.deployments}
        for host, models in self.seats.items():
            for name in models:
                found[name].add(host)
        return found

    def flip(self, rng: random.Random) -> None:
        """A popular model and another one change places."""
        names = list(self.rates)
        a, b = rng.choice(names[:20]), rng.choice(names)
        self.rates[a], self.rates[b] = self.rates[b], self.rates[a]

    def reports(self, now_s: float) -> dict[str, HostReport]:
        """Of a second after the last ones; a host serves what it can."""
        count = Counter(name for models in self.seats.values() for name in models)
        found = {}
        for host, models in self.seats.items():
            need_s = {name: self.rates[name] / count[name] * 0.1 for name in models}
            slower = max(1.0, sum(need_s.values()))
            for name in models:
                models[name] += need_s[name] / slower
            found[host] = HostReport(
                host, f"{host}-1", 1, number=int(1000 * now_s), node=f"n{int(host[1:]) // 8}", device_memory=68 * _GB,
                host_memory=256 * _GB, page_size=32 << 20, movable=True,
                models={name: _hosted(done_s, slower) for name, done_s in models.items()},
            )  # fmt: skip
        return found


def _hosted(done_s: float, slower: float) -> HostedReport:
    requests = int(done_s / 0.1)
    load = {
        "state": "on device", "running": 1, "waiting": 0, "requests": requests, "finished": requests,
        "prompt_tokens": 690 * requests, "tokens": 295 * requests, "tokens_on_time": int(295 * requests / slower),
        "step_seconds": done_s, "costs": {"coefficients": asdict(_COSTS)},
    }  # fmt: skip
    return HostedReport(1, load)


def _whole(num_hosts: int, num_models: int, decisions: int, rng: random.Random) -> tuple[list[float], float, dict]:
    """CPU milliseconds of each period of a controller, reports per CPU second, and what moved."""
    fleet, placement, moved = Fleet(num_hosts, num_models, rng), placement_of(ClusterConfig()), Counter()
    models = fleet.deployments.values()
    reconciler = Reconciler(KeepReplicas(1), host_timeout_s=1e9, now_s=0.0, num_hosts=num_hosts, models=models)
    times, took_s = [], 0.0
    for second in range(decisions):
        if second % 10 == 5:
            fleet.flip(rng)
        reports = fleet.reports(float(second))
        started = time.thread_time()
        for report in reports.values():
            reconciler.host_reported(report, float(second))
        took_s += time.thread_time() - started
        situation = Situation(fleet.deployments, reports, fleet.placed(), {}, set(), float(second))
        started = time.thread_time()
        moves = placement.decide(situation)
        times.append(1000 * (time.thread_time() - started))
        for move in moves:  # carried out by the next second
            moved[move.action] += 1
            if move.action == "add":
                fleet.seats[move.host][move.model] = 0.0
            else:
                fleet.seats[move.host].pop(move.model, None)
    return times, decisions * num_hosts / took_s, dict(moved)


def _timed(policy: LiveCapacity, view: CapacityView) -> tuple[list, float]:
    started = time.thread_time()
    made = policy.decide(view)
    return made, 1000 * (time.thread_time() - started)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--hosts", type=int, default=1000)
    parser.add_argument("--models", type=int, default=5000)
    parser.add_argument("--decisions", type=int, default=200, help="timed (default: %(default)s)")
    keys = ["decide_ms_p50", "decide_ms_p99", "boot_ms_max", "whole_ms_p50", "whole_ms_p99", "reports_per_s"]
    common.report("controller_cost", run, parser.parse_args(), keys)


if __name__ == "__main__":
    main()
