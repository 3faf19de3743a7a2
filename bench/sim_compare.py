# SPDX-License-Identifier: Apache-2.0
"""What a policy is worth on many GPUs, in simulated time: how many models 16 H100s serve, and what limits it.

Each part is a question; `--parts` chooses some of them.

    fidelity     Does the simulator agree with that of Aegaeon's artifact where it does the same thing? Needs --data DIR
                 with the artifact's requests and results (`sim_effective/*.csv`, `results_sim.csv`).
                 [fidelity_max_points: largest difference of token attainment, any policy and load]
    models90     How many models are served at 90 % attainment, by each of the three measures, at two rates, also with
                 tighter SLOs and with doubled inputs or outputs? [models90_SYSTEM_rRATE: by tokens on time]
    bound        How many could be, if switching were free and memory endless?
    production   How many GPUs does a production-shaped trace need for 99 % of tokens on time, with dedicated instances
                 and pooled? [gpus_saved_pct]
    sensitivity  What do the link, prefetch, resident models, burstiness and skew change, at one load?
    scale        1,000 GPUs and 5,000 models: how fast is the simulator? [events_per_s]

Same inputs for all systems: requests drawn with the statistics of Aegaeon's workloads (Poisson per model, lengths of
ShareGPT, three kinds of models), costs fitted to its H100 profiles, 16 GB/s to the host, TTFT 10 s, TBT 0.1 s. A number
of models is the largest on a grid of four below the first that fails, on the mean of all seeds. Failed and unfinished
requests count as missed. Simulated time: it shows what decisions do, and is no measurement of a device.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/ itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.parts import common, sim_sensitivity
from bench.parts.fidelity import fidelity
from bench.parts.sim_sensitivity import GPU, LINK_BYTES_PER_S, NUM_GPUS, costs_for
from tokenpool.config import SLO
from tokenpool.sim import (
    generate,
    planner,
)
from tokenpool.sim.compared import bound
from tokenpool.sim.compared.systems import run_system, system
from tokenpool.sim.gpus import gpu
from tokenpool.sim.workload import Workload

MEASURES = ("token_deadline_pct", "request_all_tokens_pct", "artifact_slo_pct")
SYSTEMS = ("slack", "aegaeon", "sllm", "sllm+", "request_level", "sleep", "mux", "dedicated")
RATES = (0.1, 0.5)
PARTS = ("fidelity", "models90", "bound", "production", "sensitivity", "scale")
STEP, GOAL = 4, 90.0


@dataclass(frozen=True, slots=True)
class Case:
    """One traffic and SLO; the number of models is what is looked for."""

    title: str
    rate_per_s: float
    slo: SLO = SLO(10.0, 0.1)
    input_scale: float = 1.0
    output_scale: float = 1.0

    def workload(self, num_models: int, seed: int) -> Workload:
        """As Aegaeon's: 120 s at rates up to 0.2, else 60 s."""
        duration_s = 120.0 if self.rate_per_s <= 0.2 else 60.0
        scales = {"input_scale": self.input_scale, "output_scale": self.output_scale}
        return generate.artifact_like(num_models, self.rate_per_s, duration_s, seed, **scales)


BASE = tuple(Case(f"r{rate}", rate) for rate in RATES)
HARDER = tuple(
    case
    for rate in RATES
    for case in (
        Case(f"r{rate} slo x0.5", rate, SLO(5.0, 0.05)),
        Case(f"r{rate} slo x0.3", rate, SLO(3.0, 0.03)),
        Case(f"r{rate} input x2", rate, input_scale=2.0),
        Case(f"r{rate} output x2", rate, output_scale=2.0),
    )
)


@dataclass(frozen=True, slots=True)
class SimCompare:
    """Results; see the module. A part that was not run is empty."""

    fidelity_max_points: float | None
    models90: Mapping[str, float]
    gpus_saved_pct: float | None
    events_per_s: float | None
    better: Mapping[str, str]
    fidelity: Sequence[Mapping[str, Any]]
    served: Sequence[Mapping[str, Any]]
    bounds: Sequence[Mapping[str, Any]]
    production: Mapping[str, Any]
    sensitivity: Sequence[Mapping[str, Any]]
    scale: Mapping[str, Any]


def run(
    *,
    parts: Sequence[str],
    data: Path | None,
    seeds: int,
    png: Path | None,
    seed: int,
    start_limit_s: float,
    logs: Path | None,
) -> SimCompare:
    """Answer the questions that `parts` names."""
    del start_limit_s, logs  # no server here
    fit = fidelity(data) if "fidelity" in parts and data else []
    served = _served(range(seed, seed + seeds), "models90" in parts)
    if png and served:
        _plot(served, png)
    production = _production(seed) if "production" in parts else {}
    scale = _scale(seed) if "scale" in parts else {}
    return SimCompare(
        fidelity_max_points=max((abs(row.token_points) for row in fit), default=None),
        models90={f"{row['system']}_{row['case']}": row["models90"][MEASURES[0]] for row in served},
        gpus_saved_pct=production.get("gpus_saved_pct"),
        events_per_s=scale.get("events_per_s"),
        better={"models90": "higher", "gpus_saved_pct": "higher", "events_per_s": "higher", "points": "lower"},
        fidelity=[row._asdict() for row in fit],
        served=served,
        bounds=_bounds(seed) if "bound" in parts else [],
        production=production,
        sensitivity=sim_sensitivity.rows(seed) if "sensitivity" in parts else [],
        scale=scale,
    )


def _served(seeds: Sequence[int], wanted: bool) -> list[dict[str, Any]]:
    rows = []
    cases = [(case, SYSTEMS) for case in BASE] + [(case, ("slack", "aegaeon")) for case in HARDER]
    for case, names in cases if wanted else ():
        for name in names:
            curve = _Curve(case, name, seeds)
            found = {measure: curve.most_models(measure) for measure in MEASURES}
            rows.append({"case": case.title, "system": name, "models90": found, "curve": curve.points()})
            common.progress(f"{case.title} {name}: {found}")
    return rows


class _Curve:
    """Shares by number of models, each simulated once."""

    def __init__(self, case: Case, name: str, seeds: Sequence[int]) -> None:
        self._case, self._name, self._seeds = case, name, seeds
        self.shares = lru_cache(maxsize=None)(self._shares)
        self._seen: dict[int, Mapping[str, float]] = {}

    def _shares(self, num_models: int) -> Mapping[str, float]:
        made = system(self._name, NUM_GPUS, GPU, LINK_BYTES_PER_S)
        runs = []
        for seed in self._seeds:
            workload = self._case.workload(num_models, seed)
            runs.append(run_system(made, workload, costs_for(workload).__getitem__, self._case.slo).to_json())
        self._seen[num_models] = {m: sum(run[m] for run in runs) / len(runs) for m in MEASURES}
        return self._seen[num_models]

    def most_models(self, measure: str) -> int:
        """The last multiple of STEP with at least GOAL percent, found by doubling and halving."""
        low, high = 0, 2 * STEP
        while self.shares(high)[measure] >= GOAL:
            low, high = high, 2 * high
        while high - low > STEP:
            middle = (low + high) // (2 * STEP) * STEP
            low, high = (middle, high) if self.shares(middle)[measure] >= GOAL else (low, middle)
        return low

    def points(self) -> list[dict[str, float]]:
        """What was simulated, in order."""
        return [{"models": count, **shares} for count, shares in sorted(self._seen.items())]


def _bounds(seed: int) -> list[dict[str, Any]]:
    rows = []
    for case in BASE + HARDER:

        def make(count: int, case: Case = case) -> Workload:
            return case.workload(count, seed)

        found = bound.max_models(make, costs_for(make(10)), case.slo, NUM_GPUS)
        rows.append({"case": case.title, "models": found})
        common.progress(f"bound {case.title}: {found} models")
    return rows


def _production(seed: int) -> dict[str, Any]:
    """The shape of Aegaeon's deployment, twice as many models: 56 on one GPU each, 38 on four."""
    workload = generate.deployed(2, 900.0, seed=seed)
    made = planner.plan(workload, costs_for(workload), gpu(GPU), SLO(10.0, 0.1), target=0.99)
    saved = made.saved_frac("slack")
    common.progress(f"production: {saved} of the GPUs saved")
    return made.to_json() | {"gpus_saved_pct": None if saved is None else 100 * saved}


def _scale(seed: int) -> dict[str, Any]:
    workload = generate.artifact_like(5000, 0.037, 3600.0, seed)
    made = system("slack", 1000, GPU, LINK_BYTES_PER_S)
    begun = time.perf_counter()
    result = run_system(made, workload, costs_for(workload).__getitem__, SLO(10.0, 0.1))
    common.progress(f"scale: {result.num_events} events in {time.perf_counter() - begun:.0f} s")
    return result.to_json() | {"events_per_s": result.num_events / result.wall_s}


def _plot(served: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Attainment over the number of models for the two rates; needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        common.progress("no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(BASE), figsize=(6.5 * len(BASE), 4), sharey=True, layout="constrained")
    for axis, case in zip(axes, BASE, strict=True):
        for row in served:
            if row["case"] == case.title:
                points = [(point["models"], point[MEASURES[0]]) for point in row["curve"]]
                axis.plot(*zip(*points, strict=True), marker=".", label=row["system"])
        axis.axhline(GOAL, color="grey", linewidth=0.8, linestyle="--")
        axis.set(title=f"{case.rate_per_s} requests/s per model", xlabel="models on 16 GPUs", ylim=(0, 102))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("tokens on time, %")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Read the flags, run, report."""
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--parts", type=lambda text: text.split(","), default=list(PARTS), help=f"of {', '.join(PARTS)}")
    add("--data", type=Path, help="folder with the artifact's requests and results, for the part fidelity")
    add("--seeds", type=int, default=2, help="workloads per number of models (default: %(default)s)")
    add("--png", type=Path, help="draw attainment over models into this file")
    flags = parser.parse_args()
    keys: Callable[[str], str] = "models90_{}".format
    names = [keys(f"{name}_r{rate}") for rate in RATES for name in ("slack", "aegaeon") if "models90" in flags.parts]
    parts = {"fidelity": "fidelity_max_points", "production": "gpus_saved_pct", "scale": "events_per_s"}
    common.report("sim_compare", run, flags, names + [key for part, key in parts.items() if part in flags.parts])


if __name__ == "__main__":
    main()
