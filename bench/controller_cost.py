# SPDX-License-Identifier: Apache-2.0
"""What a decision of the capacity policy costs: 1,000 hosts, 5,000 models, one core.

    python -m bench.controller_cost --json bench/results/controller_cost.json

Models have Zipf-like traffic; each decision sees other traffic, some of it a flip of popularity, and a host that is
lost now and then. Building the view is the caller's work and not timed; reading it is. Times are CPU times of the one
thread, so that other work on the machine does not count.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import dataclass, field, replace

from bench import common
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
    decisions: dict[str, int] = field(default_factory=dict)


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
    percents = [common.percentile(times, percent) for percent in (50, 99)]
    return CostResult(hosts, models, *percents, max(times), placed, len(boot_ms), max(boot_ms), dict(counts))


def _timed(policy: LiveCapacity, view: CapacityView) -> tuple[list, float]:
    started = time.thread_time()
    made = policy.decide(view)
    return made, 1000 * (time.thread_time() - started)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--hosts", type=int, default=1000)
    parser.add_argument("--models", type=int, default=5000)
    parser.add_argument("--decisions", type=int, default=200, help="timed (default: %(default)s)")
    keys = ["decide_ms_p50", "decide_ms_p99", "decide_ms_max", "boot_ms_max"]
    common.report("controller_cost", run, parser.parse_args(), keys)


if __name__ == "__main__":
    main()
