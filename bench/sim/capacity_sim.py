# SPDX-License-Identifier: Apache-2.0
"""Static seats against the capacity controller, on simulated H100: a flip of popularity, a drift, and constant load.

    python -m bench.sim.capacity_sim --json bench/results/capacity_sim.json --png bench/results/capacity_sim.png

Four devices, models of the kind qwen2.5-7b with prompts and answers twice as long as ShareGPT's, a new seat's weights
come at 2 GB/s. Both sides begin with the seats for the traffic of the first minute, and both route alike.

    flip       one model gets nearly all requests, and half way through another one does
    drift      Zipf-like popularity of twelve models, which moves on by one model per minute
    constant   one hour of stationary Poisson arrivals; what is moved after the first ten minutes should not be
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.parts import common
from tokenpool.config import SLO
from tokenpool.policy.capacity_live import LiveCapacity
from tokenpool.policy.turns import load_turn_policy
from tokenpool.sim import generate
from tokenpool.sim.costs import costs_of
from tokenpool.sim.device_spec import DeviceSpec
from tokenpool.sim.gpus import gpu
from tokenpool.sim.live import LivePool
from tokenpool.sim.timeline import Timeline
from tokenpool.sim.workload import SimRequest, Workload

GPU, KIND, NUM_GPUS, LINK_BYTES_PER_S = "h100-80g", "qwen2.5-7b", 4, 16e9
_SLO = SLO(10.0, 0.1)
_FLIP_S, _BUCKET_S, _SETTLED_S = 240.0, 10.0, 600.0
_GOOD_FRAC = 0.95


@dataclass(slots=True)
class CapacityResult:
    attainment_static: float
    attainment_controller: float
    moves: int
    adapt_s: float
    """From the flip until at least 95 % of the tokens of the requests of three buckets of 10 s in a row are on time."""
    drift_attainment_static: float
    drift_attainment_controller: float
    drift_moves: int
    constant_attainment: float
    constant_moves_settling: int
    constant_moves_after: int
    runs: dict[str, Any] = field(default_factory=dict)


class _Recorded(LivePool):
    """Keeps what came of each request."""

    ended: list[tuple[float, int]]

    def _done(self, request: Timeline) -> None:
        self.ended.append((request.arrival_s, request.num_on_time))
        super()._done(request)


def _traffic(rates: dict[str, float], start_s: float, duration_s: float, seed: int) -> Iterator[SimRequest]:
    made = generate.poisson(
        rates, duration_s, seed, kinds=dict.fromkeys(rates, KIND), input_scale=2.0, output_scale=2.0
    )
    return (request._replace(arrival_s=start_s + request.arrival_s) for request in made.requests)


def _workload(requests: list[SimRequest], names: list[str]) -> Workload:
    return Workload(sorted(requests), dict.fromkeys(names, KIND))


def flip(seed: int, hot_per_s: float = 14.0) -> Workload:
    names = [f"m{i:02}" for i in range(16)]
    rates = dict.fromkeys(names, 0.02)
    first = _traffic({**rates, "m00": hot_per_s}, 0.0, _FLIP_S, seed)
    second = _traffic({**rates, "m01": hot_per_s}, _FLIP_S, _FLIP_S, seed + 1000)
    return _workload([*first, *second], names)


def drift(seed: int, total_per_s: float = 19.0, steps: int = 5) -> Workload:
    names = [f"m{i:02}" for i in range(12)]
    weights = [1 / rank**1.5 for rank in range(1, len(names) + 1)]
    requests: list[SimRequest] = []
    for step in range(steps):
        turned = names[step:] + names[:step]
        rates = {name: total_per_s * w / sum(weights) for name, w in zip(turned, weights, strict=True)}
        requests += _traffic(rates, 60.0 * step, 60.0, seed + 1000 * step)
    return _workload(requests, names)


def constant(seed: int) -> Workload:
    names = [f"m{i:02}" for i in range(16)]
    rates = {name: 3.0 / rank for rank, name in enumerate(names, 1)}
    return _workload(list(_traffic(rates, 0.0, 3600.0, seed)), names)


def simulate(workload: Workload, *, has_controller: bool) -> dict[str, Any]:
    """Serve a workload; the figures hold tokens on time by the arrival of their requests, in buckets of 10 s."""
    costs = {model: costs_of(kind, GPU) for model, kind in workload.kinds.items()}
    spec = DeviceSpec(gpu(GPU).pool_bytes, LINK_BYTES_PER_S, max_running=1024)
    policy = LiveCapacity() if has_controller else None
    pool = _Recorded([spec] * NUM_GPUS, lambda: load_turn_policy("slack"), costs, _SLO, policy)
    pool.ended = []
    result = pool.run(workload, drain_s=100.0)
    wanted, on_time = {}, {}
    for request in workload.requests:
        bucket = int(request.arrival_s // _BUCKET_S)
        wanted[bucket] = wanted.get(bucket, 0) + request.output_len
    for arrival_s, count in pool.ended:
        bucket = int(arrival_s // _BUCKET_S)
        on_time[bucket] = on_time.get(bucket, 0) + count
    series = [on_time.get(bucket, 0) / wanted[bucket] if bucket in wanted else 1.0 for bucket in range(max(wanted) + 1)]
    moves = [move for move in pool.moves_to_json()["moves"] if move["at_s"] <= workload.requests[-1].arrival_s]
    return {**result.to_json(), "on_time_by_arrival": series, "moves": moves, "first": pool.first}


def adapt_s(series: list[float]) -> float:
    """Seconds from the flip to the first of three good buckets in a row; the rest of the run where there are none."""
    first = int(_FLIP_S // _BUCKET_S)
    for bucket in range(first, len(series) - 2):
        if min(series[bucket : bucket + 3]) >= _GOOD_FRAC:
            return (bucket - first) * _BUCKET_S
    return (len(series) - first) * _BUCKET_S


def _run_arm(name: str, side: str, seed: int) -> dict[str, Any]:
    workload = {"flip": flip, "drift": drift, "constant": constant}[name](seed)
    return simulate(workload, has_controller=side == "controller")


def run(seed: int, processes: int = 2, png: Path | None = None, **_: object) -> CapacityResult:
    arms = {f"{name}_{side}": (name, side) for name in ("flip", "drift") for side in ("static", "controller")}
    arms["constant"] = "constant", "controller"
    runs: dict[str, Any] = {}
    with ProcessPoolExecutor(processes) as pool:
        futures = {pool.submit(_run_arm, name, side, seed): arm for arm, (name, side) in arms.items()}
        for future in as_completed(futures):
            made = runs[futures[future]] = future.result()
            common.progress(f"{futures[future]}: {made['token_deadline_pct']:.1f} % on time")
    settled = [move for move in runs["constant"]["moves"] if move["at_s"] > _SETTLED_S]
    if png:
        _draw(runs, png)
    shares = {name: made["token_deadline_pct"] / 100 for name, made in runs.items()}
    return CapacityResult(
        shares["flip_static"],
        shares["flip_controller"],
        len(runs["flip_controller"]["moves"]),
        adapt_s(runs["flip_controller"]["on_time_by_arrival"]),
        shares["drift_static"],
        shares["drift_controller"],
        len(runs["drift_controller"]["moves"]),
        shares["constant"],
        len(runs["constant"]["moves"]) - len(settled),
        len(settled),
        runs,
    )


def _draw(runs: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 1, figsize=(9, 9), layout="constrained")
    for axis, name in zip(axes, ("flip", "drift", "constant"), strict=True):
        for side in ("static", "controller") if name != "constant" else ("",):
            made = runs[f"{name}_{side}" if side else name]
            series = [100 * share for share in made["on_time_by_arrival"]]
            axis.plot([_BUCKET_S * i for i in range(len(series))], series, label=side or "controller")
        for move in made["moves"]:
            axis.axvline(move["at_s"], color="grey", linewidth=0.6)
        axis.set(title=f"{name}: tokens on time by arrival, %; grey = a move", ylim=(0, 104), xlabel="s")
        axis.legend(loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser: argparse.ArgumentParser = common.parser(__doc__)
    parser.add_argument("--processes", type=int, default=2, help="arms at a time (default: %(default)s)")
    parser.add_argument("--png", type=Path, help="draw the runs there; needs matplotlib")
    keys = ["attainment_static", "attainment_controller", "moves", "adapt_s", "drift_attainment_static"]
    keys += ["drift_attainment_controller", "drift_moves", "constant_moves_settling", "constant_moves_after"]
    common.report("capacity_sim", run, parser.parse_args(), keys)


if __name__ == "__main__":
    main()
