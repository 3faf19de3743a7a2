# SPDX-License-Identifier: Apache-2.0
"""What a policy is worth on many GPUs, in simulated time: how many models 16 H100s serve, every one of them well.

Each part is a question; `--parts` chooses some of them, and `--keep FILE` takes the others from an earlier result.

    strict       Strict capacity: the most models of which *every one* has 90 % of its tokens on time, with a TTFT p99
                 of at most twice the SLO, for each seed, in steady state: ten simulated minutes after one of warm-up,
                 with half a minute of traffic behind them. `aegaeon_best` is the best of 20: QMAX 1, 1.5, 2, 4 s and
                 4 to 8 of 16 devices for prefills. [strict_SYSTEM_rRATE, and the ratio]
                 Also what `slack` does with 110 % of that: `beyond`, at least 85 % of tokens on time wanted and 50 % of
                 every model.
    hot          One 7B model with 30 requests/s on 2, 4 and 8 GPUs, and on 8 beside 100 models with 0.02 each.
    bound        How many models could be, if switching were free and memory endless, with the same costs and every
                 token on time? Looked at over the whole run and over spans of it.
    fidelity     Does the simulator agree with that of Aegaeon's artifact where it does the same thing? Needs --data DIR
                 with the artifact's requests and results (`sim_effective/*.csv`, `results_sim.csv`).
                 [fidelity_max_points: largest difference of token attainment, any policy and load]
    production   How many GPUs does a production-shaped trace need, with dedicated instances and pooled, for 99 % of
                 tokens on time and 90 % of every model's; and two published traces, with --traces DIR? [gpus_saved_pct]
    sensitivity  What do the link, prefetch, resident models, burstiness and skew change, at one load?
    scale        200 GPUs and 1,000 models for ten minutes: how fast is the simulator? [events_per_s]

Same inputs for all systems: Poisson arrivals at one rate per model, lengths of ShareGPT, three kinds of models as in
Aegaeon's artifact, costs fitted to its H100 profiles, with what hosts pay (`tokenpool.sim.host_costs`), 16 GB/s to a
device and 64 GB/s for the 8 of a node, TTFT 10 s, TBT 0.1 s. Failed and unfinished requests count as missed. Numbers of
models are searched by doubling and halving on a grid of 4, of 8 for `slack`, which takes for granted that more models
are not served better. A run that cannot pass any more is ended; its figures are those of the requests up to then.
Simulated time: it shows what decisions do, and is no measurement of a device.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/ itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.parts import common, sim_sensitivity
from bench.parts.fidelity import fidelity
from bench.parts.sim_sensitivity import GPU, LINK_BYTES_PER_S, NUM_GPUS, costs_for
from bench.sim import gpus_saved
from tokenpool.config import SLO
from tokenpool.sim import generate
from tokenpool.sim.compared import bound
from tokenpool.sim.compared.systems import System, run_system, system
from tokenpool.sim.gpus import gpu
from tokenpool.sim.host_costs import HostCosts
from tokenpool.sim.result import MostMissed
from tokenpool.sim.workload import Workload

SYSTEMS = ("slack", "request_level", "sllm", "sleep", "mux")
"""Beside `aegaeon`, as the paper has it and at its best."""
RATES = (0.1, 0.5)
PARTS = ("strict", "hot", "bound", "fidelity", "production", "sensitivity", "scale")
STEP, GOAL = 4, 0.9
_BEYOND = 1.1
_STARTS = {0.1: 128, 0.5: 88}
"""Where the search for `slack` begins."""
SLO_10S = SLO(10.0, 0.1)
WARM_S, WINDOW_S, TAIL_S = 60.0, 600.0, 30.0
WINDOWS_S = (120.0, 300.0)
"""Spans for which the bound is looked at, beside the whole."""
QMAX_S, SPLITS = (1.0, 1.5, 2.0, 4.0), (4, 5, 6, 7, 8)
KEPT = (
    "token_deadline_pct", "request_all_tokens_pct", "models_90_pct", "worst_model_pct", "ttft_p50_s", "ttft_p99_s",
    "busy_frac", "link_frac", "n_requests",
)  # fmt: skip


def steady(num_models: int, rate_per_s: float, seed: int) -> Workload:
    """Equal models under constant load, from before the window of measurement to behind it."""
    names = [f"m{i:03}" for i in range(num_models)]
    kinds = {name: generate.ARTIFACT_KINDS[i % len(generate.ARTIFACT_KINDS)] for i, name in enumerate(names)}
    return generate.poisson(dict.fromkeys(names, rate_per_s), WARM_S + WINDOW_S + TAIL_S, seed, kinds=kinds)


def measured(made: System, workload: Workload, *, to_end: bool) -> dict[str, Any]:
    """One run in steady state; unless `to_end`, it ends when a model cannot reach the goal any more."""
    window_s = WARM_S, WARM_S + WINDOW_S
    most_missed = None if to_end else _may_miss(workload, window_s)
    costs = costs_for(workload).__getitem__
    result = run_system(
        made, workload, costs, SLO_10S, drain_s=TAIL_S + 60.0, window_s=window_s, most_missed=most_missed
    )
    found = result.to_json()
    return {key: found[key] for key in KEPT} | {"ended_early": result.is_stopped}


def _may_miss(workload: Workload, window_s: tuple[float, float]) -> MostMissed:
    counts = dict.fromkeys(workload.kinds, 0)
    for request in workload.requests:
        if window_s[0] <= request.arrival_s < window_s[1]:
            counts[request.model] += request.output_len
    return MostMissed(math.inf, {model: (1 - GOAL) * count + 1e-6 for model, count in counts.items()})


@dataclass(frozen=True, slots=True)
class SimCompare:
    """Results; see the module. A part that was not run is empty."""

    strict: Mapping[str, int]
    strict_ratio: Mapping[str, float | None]
    bound: Mapping[str, int]
    worst_model_pct: float | None
    """Of `slack`, at its strict capacity."""
    fidelity_max_points: float | None
    gpus_saved_pct: float | None
    events_per_s: float | None
    better: Mapping[str, str]
    strict_runs: Sequence[Mapping[str, Any]]
    beyond: Sequence[Mapping[str, Any]]
    """Of `slack`, with 110 % of its strict capacity, one seed after the other."""
    aegaeon_settings: Sequence[Mapping[str, Any]]
    hot: Sequence[Mapping[str, Any]]
    fidelity: Sequence[Mapping[str, Any]]
    production: Mapping[str, Any]
    traced: Sequence[Mapping[str, Any]]
    sensitivity: Sequence[Mapping[str, Any]]
    scale: Mapping[str, Any]


def run(
    *,
    parts: Sequence[str],
    rates: Sequence[float],
    systems: Sequence[str],
    keep: Path | None,
    data: Path | None,
    traces: Path | None,
    seeds: int,
    png: Path | None,
    seed: int,
    start_limit_s: float,
    logs: Path | None,
) -> SimCompare:
    """Answer the questions that `parts` names."""
    del start_limit_s, logs  # no server here
    old = json.loads(keep.read_text()) if keep else {}
    old = old.get("values", {})
    fit = [row._asdict() | {"points": row.token_points} for row in fidelity(data)] if "fidelity" in parts else None
    fit = old.get("fidelity", []) if fit is None else fit
    runs, settings = list(old.get("strict_runs", [])), list(old.get("aegaeon_settings", []))
    for rate in rates if "strict" in parts else ():
        _strict_at(rate, systems, range(seed, seed + seeds), runs, settings)
    strict = {f"{row['system']}_r{row['rate']}": row["strict"] for row in runs}
    if png and runs:
        _plot(runs, png)
    hot = _hot(seed) if "hot" in parts else old.get("hot", [])
    limits = _bounds(seed, rates) if "bound" in parts else {}
    production = gpus_saved.production(seed) if "production" in parts else old.get("production", {})
    traced = gpus_saved.traced(seed, traces) if "production" in parts and traces else old.get("traced", [])
    scale = _scale(seed) if "scale" in parts else old.get("scale", {})
    best = {rate: strict.get(f"aegaeon_best_r{rate}") for rate in RATES}
    return SimCompare(
        strict=strict,
        strict_ratio={f"r{rate}": _ratio(strict.get(f"slack_r{rate}"), most) for rate, most in best.items()},
        bound={**old.get("bound", {}), **limits},
        worst_model_pct=min((_worst(row) for row in runs if row["system"] == "slack" and row["strict"]), default=None),
        fidelity_max_points=max((abs(row["points"]) for row in fit), default=None),
        gpus_saved_pct=production.get("gpus_saved_pct"),
        events_per_s=scale.get("events_per_s"),
        better={"strict": "higher", "strict_ratio": "higher", "gpus_saved_pct": "higher", "points": "lower"},
        strict_runs=runs,
        beyond=[row["beyond"] for row in runs if "beyond" in row],
        aegaeon_settings=settings,
        hot=hot,
        fidelity=fit,
        production=production,
        traced=traced,
        sensitivity=sim_sensitivity.rows(seed) if "sensitivity" in parts else old.get("sensitivity", []),
        scale=scale,
    )


def _strict_at(
    rate: float, names: Sequence[str], seeds: Sequence[int], runs: list[dict[str, Any]], settings: list[dict[str, Any]]
) -> None:
    """Add the strict capacity of each system at one rate; what is in `runs` of them already is replaced."""
    made = {name: system(name, NUM_GPUS, GPU, LINK_BYTES_PER_S) for name in names if name != "aegaeon"}
    if "aegaeon" in names:
        made["aegaeon"] = _aegaeon(4.0, 6)
        tried = [row for row in _aegaeons(rate, seeds[0])]
        settings[:] = [row for row in settings if row["rate"] != rate] + tried
        best = max(tried, key=lambda row: (row["most"], row["token_deadline_pct"]))
        made["aegaeon_best"] = _aegaeon(best["qmax_s"], best["prefill_gpus"])
    for name, described in made.items():
        curve = _Curve(described, rate, seeds)
        found = curve.most_models(*(_STARTS.get(rate, 64), 2 * STEP) if name == "slack" else (16, STEP))
        runs[:] = [row for row in runs if (row["rate"], row["system"]) != (rate, name)]
        row = {"rate": rate, "system": name, "strict": found, "seeds": list(seeds), "runs": curve.points()}
        if name == "slack":
            row["beyond"] = curve.beyond(math.ceil(_BEYOND * found))
        runs.append(row)
        common.progress(f"{rate} requests/s, {name}: {found} models")


def _aegaeon(qmax_s: float, prefill_gpus: int) -> System:
    options = {"quota_max_s": qmax_s}
    return system("aegaeon", NUM_GPUS, GPU, LINK_BYTES_PER_S, prefill_gpus, options=options)


def _aegaeons(rate: float, seed: int) -> list[dict[str, Any]]:
    """Each setting's strict capacity with one seed."""
    rows = []
    for qmax_s, split in product(QMAX_S, SPLITS):
        curve = _Curve(_aegaeon(qmax_s, split), rate, [seed])
        most = curve.most_models(16, STEP)
        shares = curve.runs(max(STEP, most))[0]
        rows.append({"rate": rate, "qmax_s": qmax_s, "prefill_gpus": split, "most": most, **shares})
    return rows


class _Curve:
    """Runs of one system by number of models, each simulated once; the later seeds only where the first ones pass."""

    def __init__(self, made: System, rate: float, seeds: Sequence[int]) -> None:
        self._made, self._rate, self._seeds = made, rate, seeds
        self._seen: dict[int, list[dict[str, Any]]] = {}

    def runs(self, num_models: int) -> list[dict[str, Any]]:
        """By seed, up to the first that fails."""
        if num_models not in self._seen:
            found = self._seen[num_models] = []
            for seed in self._seeds:
                found.append(self._run(num_models, seed))
                if not _passes(found[-1]):
                    break
        return self._seen[num_models]

    def _run(self, num_models: int, seed: int, *, to_end: bool = False) -> dict[str, Any]:
        run = measured(self._made, steady(num_models, self._rate, seed), to_end=to_end)
        kept = ("token_deadline_pct", "models_90_pct", "worst_model_pct", "ttft_p99_s")
        shown = ", ".join(f"{key} {run[key]:.1f}" for key in kept)
        common.progress(f"{self._made.name} {num_models} x {self._rate}, seed {seed}: {shown}")
        return run

    def most_models(self, start: int, step: int) -> int:
        """The last multiple of `step` that passes with all seeds, from `start` by doubling and halving; 0 if none."""
        low, high = 0, start
        while self._is_good(high):
            low, high = high, 2 * high
        while high - low > step:
            middle = (low + high) // (2 * step) * step
            low, high = (middle, high) if self._is_good(middle) else (low, middle)
        return low

    def beyond(self, num_models: int) -> dict[str, Any]:
        """What becomes of so many models, with each seed."""
        by_seed = [self._run(num_models, seed, to_end=True) for seed in self._seeds]
        return {"rate": self._rate, "models": num_models, "by_seed": by_seed}

    def _is_good(self, num_models: int) -> bool:
        return all(_passes(run) for run in self.runs(num_models))

    def points(self) -> list[dict[str, Any]]:
        """What was simulated, in order."""
        return [{"models": count, "by_seed": runs} for count, runs in sorted(self._seen.items())]


def _passes(run: Mapping[str, float]) -> bool:
    is_good = run["worst_model_pct"] >= 100 * GOAL and run["ttft_p99_s"] <= 2 * SLO_10S.ttft_s
    return is_good and not run.get("ended_early")


def _ratio(ours: int | None, theirs: int | None) -> float | None:
    return ours / theirs if ours is not None and theirs else None


def _worst(row: Mapping[str, Any]) -> float:
    at = next(point for point in row["runs"] if point["models"] == row["strict"])
    return min(run["worst_model_pct"] for run in at["by_seed"])


def _hot(seed: int) -> list[dict[str, Any]]:
    """A hot model alone and beside many cold ones."""
    rows = []
    cold = {f"cold{i:03}": 0.02 for i in range(100)}
    for num_gpus, others in ((2, {}), (4, {}), (8, {}), (8, cold)):
        rates = {"hot": 30.0, **others}
        workload = generate.poisson(rates, 330.0, seed, kinds=dict.fromkeys(rates, "qwen2.5-7b"))
        made = system("slack", num_gpus, GPU, LINK_BYTES_PER_S)
        costs = costs_for(workload).__getitem__
        result = run_system(made, workload, costs, SLO_10S, window_s=(WARM_S, 300.0))
        found, of_hot = result.to_json(), 100 * result.model_attainments()["hot"]
        kept = {key: found[key] for key in KEPT}
        rows.append({"gpus": num_gpus, "cold_models": len(others), "hot_token_deadline_pct": of_hot, **kept})
        common.progress(f"hot on {num_gpus} GPUs beside {len(others)}: {of_hot:.1f} %")
    return rows


def _bounds(seed: int, rates: Sequence[float]) -> dict[str, int]:
    found = {}
    for rate in rates:
        costs = {kind: HostCosts().of_model(c, gpu(GPU)) for kind, c in costs_for(steady(10, rate, seed)).items()}

        def make(count: int, rate: float = rate) -> Workload:
            return steady(count, rate, seed)

        found[f"r{rate}"] = bound.max_models(make, costs, SLO_10S, NUM_GPUS, windows_s=WINDOWS_S)
        common.progress(f"bound at {rate}: {found[f'r{rate}']} models")
    return found


def _scale(seed: int) -> dict[str, Any]:
    workload = generate.artifact_like(1000, 0.037, 600.0, seed)
    made = system("slack", 200, GPU, LINK_BYTES_PER_S)
    begun = time.perf_counter()
    result = run_system(made, workload, costs_for(workload).__getitem__, SLO_10S)
    common.progress(f"scale: {result.num_events} events in {time.perf_counter() - begun:.0f} s")
    return result.to_json() | {"events_per_s": result.num_events / result.wall_s}


def _plot(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The worst model over the number of models, for each rate; needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        common.progress("no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates = sorted({row["rate"] for row in runs})
    figure, axes = pyplot.subplots(1, len(rates), figsize=(6.5 * len(rates), 4), squeeze=False, layout="constrained")
    for axis, rate in zip(axes[0], rates, strict=True):
        for row in runs:
            if row["rate"] == rate and row["system"] in ("slack", "aegaeon", "aegaeon_best"):
                ended = [p for p in row["runs"] if not any(run.get("ended_early") for run in p["by_seed"])]
                ended += [row["beyond"]] if "beyond" in row else []
                points = [(p["models"], min(run["worst_model_pct"] for run in p["by_seed"])) for p in ended]
                axis.plot(*zip(*points, strict=True), marker=".", label=f"{row['system']}: {row['strict']}")
        axis.axhline(100 * GOAL, color="grey", linewidth=0.8, linestyle="--")
        axis.set(title=f"{rate} requests/s per model", xlabel="models on 16 H100 (simulated)", ylim=(0, 102))
        axis.grid(alpha=0.3)
        axis.legend(title="strict capacity")
    axes[0][0].set_ylabel("worst model: tokens on time, %")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Read the flags, run, report."""
    parser = common.parser(__doc__)
    add = parser.add_argument
    parts, systems = ", ".join(PARTS), ",".join(("aegaeon", *SYSTEMS))
    add("--parts", type=lambda text: text.split(","), default=list(PARTS), help=f"of {parts}")
    add("--rates", type=lambda text: [float(x) for x in text.split(",")], default=list(RATES), help="for strict, bound")
    add("--systems", type=lambda text: text.split(","), default=systems.split(","), help=f"of {systems}")
    add("--keep", type=Path, metavar="FILE", help="result of an earlier run: what is not run now is taken from it")
    add("--data", type=Path, help="folder with the artifact's requests and results, for the part fidelity")
    add("--traces", type=Path, help="folder with published traces, for the part production")
    add("--seeds", type=int, default=2, help="workloads per number of models (default: %(default)s)")
    add("--png", type=Path, help="draw the worst model over models into this file")
    flags = parser.parse_args()
    if "fidelity" in flags.parts and not flags.data:
        flags.parts.remove("fidelity")
    of = {"strict": ("strict_slack", "strict_aegaeon_best", "strict_ratio"), "bound": ("bound",)}
    names = [f"{name}_r{rate}" for part in of if part in flags.parts for rate in flags.rates for name in of[part]]
    if flags.systems != systems.split(","):  # some of them alone have no ratio, and may have no figure
        names = []
    single = {"strict": "worst_model_pct", "production": "gpus_saved_pct", "scale": "events_per_s"}
    names += [key for part, key in single.items() if part in flags.parts and (names or part != "strict")]
    common.report("sim_compare", run, flags, names)


if __name__ == "__main__":
    main()
