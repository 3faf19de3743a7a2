# SPDX-License-Identifier: Apache-2.0
"""How long `tokenpool plan` takes: 6,000 requests of 100 models, and a day of 29 clients.

    python -m bench.sim.plan_time --data DIR --json bench/results/plan_time.json

DIR holds two traces as their authors publish them (see bench/sim/traces_sim.py).

    requests   The first 6,000 requests of Azure's conversations of 2023, spread over 100 models by Zipf's law.
               [seconds: 60 wanted on two cores]
    day        The first day of the clients of ServeGen's m-small, each of them a model, at rates that make so many
               requests of it: the day has 85 million of them. [day_seconds: 300 wanted]

Seconds by the clock from the opening of the file to the answer: the bound, dedicated instances, `request_level` and
`slack`, and what limits them. TTFT 10 s, TPOT 0.1 s, 99 % of all tokens and 90 % of each model's, H100 of 80 GB.
`others_cpu_s` are CPU seconds that other processes of the machine used meanwhile: near 0, or the times say little.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench.parts import common
from bench.parts.sim_sensitivity import GPU, costs_for
from bench.sim.traces_sim import Trace, workload_of
from tokenpool.config import SLO
from tokenpool.sim import generate, planner
from tokenpool.sim.gpus import gpu
from tokenpool.sim.plan import Plan
from tokenpool.sim.traces.client_windows import WINDOW_S, client_requests, read_client_windows
from tokenpool.sim.workload import Workload

_SLO = SLO(10.0, 0.1)
_TARGET = 0.99
_DAY_S = 86_400.0
PARTS = ("requests", "day")


@dataclass(frozen=True, slots=True)
class PlanTime:
    """Results; see the module. A part that was not run is 0."""

    processes: int
    requests: int
    models: int
    seconds: float
    day_requests: int
    day_models: int
    day_seconds: float
    better: Mapping[str, str] = field(default_factory=lambda: {"seconds": "lower", "day_seconds": "lower"})
    plans: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By part: how long it took, what others did meanwhile, and the answer."""


def run(
    *, data: Path, parts: Sequence[str], processes: int, requests: int, day_requests: int, seed: int, **_: object
) -> PlanTime:
    """Make the plans that `parts` names."""
    makers: Mapping[str, Callable[[], Workload]] = {
        "requests": lambda: _spread(data, seed, requests),
        "day": lambda: _day(data, seed, day_requests),
    }
    plans = {part: _timed(part, makers[part], processes) for part in parts}
    first, day = plans.get("requests", {}), plans.get("day", {})
    return PlanTime(
        processes,
        *(first.get(key, 0) for key in ("requests", "models", "seconds")),
        *(day.get(key, 0) for key in ("requests", "models", "seconds")),
        plans=plans,
    )


def _spread(data: Path, seed: int, count: int) -> Workload:
    read = workload_of(Trace("azure 2023, conversation", "azure2023_conv.csv", _DAY_S, 100), data, seed)
    return Workload(read.requests[:count], read.kinds)


def _day(data: Path, seed: int, count: int) -> Workload:
    windows = [w for w in read_client_windows(data / "servegen_m-small_clients.csv.gz") if w.start_s < _DAY_S]
    scale = count / sum([WINDOW_S * window.rate_per_s for window in windows])
    read = client_requests(windows, from_s=0.0, span_s=_DAY_S, seed=seed, scale=scale)
    names = sorted(read.kinds)
    kinds = {name: generate.ARTIFACT_KINDS[i % len(generate.ARTIFACT_KINDS)] for i, name in enumerate(names)}
    return Workload(read.requests, kinds)


def _timed(part: str, make: Callable[[], Workload], processes: int) -> dict[str, Any]:
    begun_s, busy_s, own_s = time.perf_counter(), _busy_s(), _own_s()
    workload = make()
    read_s = time.perf_counter() - begun_s
    made = planner.plan(
        workload,
        costs_for(workload),
        gpu(GPU),
        _SLO,
        _TARGET,
        max_requests=len(workload.requests),
        progress=lambda text: common.progress(f"{part}, {time.perf_counter() - begun_s:.0f} s: {text}"),
        num_processes=processes,
    )
    seconds, own_s = time.perf_counter() - begun_s, _own_s() - own_s
    common.progress(f"{part}: {_answer(made)}, in {seconds:.0f} s")
    return {
        "requests": len(workload.requests),
        "models": len(workload.kinds),
        "seconds": seconds,
        "read_seconds": read_s,
        "cpu_s": own_s,
        "others_cpu_s": max(0.0, _busy_s() - busy_s - own_s),
        "plan": made.to_json(),
    }


def _answer(made: Plan) -> str:
    return ", ".join(f"{name} {found.num_gpus} GPUs" for name, found in made.systems.items())


def _busy_s() -> float:
    """CPU seconds that all processes of the machine have used."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def _own_s() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def main() -> None:
    """Read the flags, run, report."""
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with the traces")
    add("--parts", type=lambda text: text.split(","), default=list(PARTS), help=f"of {', '.join(PARTS)}")
    add("--processes", type=int, default=2, help="that simulate (default: %(default)s)")
    add("--requests", type=int, default=6000, help="in the first part (default: %(default)s)")
    add("--day-requests", type=int, default=86_400, help="about as many in the second (default: %(default)s)")
    keys = ["requests", "models", "seconds", "day_requests", "day_models", "day_seconds"]
    common.report("plan_time", run, parser.parse_args(), keys)


if __name__ == "__main__":
    main()
