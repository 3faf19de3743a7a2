# SPDX-License-Identifier: Apache-2.0
"""`tokenpool plan`: how many GPUs a request file needs, dedicated and pooled. Imports no vLLM.

tokenpool plan --trace week.csv --models kinds.yaml --gpu h100-80g --ttft 10 --tpot 0.1
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path

from tokenpool.cli.output import write_json
from tokenpool.cli.parser import Parser
from tokenpool.cli.sim_inputs import add_inputs, read_inputs, slo_of
from tokenpool.errors import ConfigError
from tokenpool.sim.gpus import gpu
from tokenpool.sim.plan import Plan, SystemPlan
from tokenpool.sim.planner import plan
from tokenpool.units import format_bytes


def add_command(commands: argparse._SubParsersAction[Parser], summary: str) -> None:
    """Add the parser of `tokenpool plan` to the tree."""
    parser = commands.add_parser(
        "plan", help=summary, description="Find the least number of GPUs for a trace, dedicated and pooled."
    )
    add_inputs(parser, "--trace")
    add = parser.add_argument
    add("--target", type=float, default=0.99, metavar="FRAC", help="share of tokens on time (default: %(default)s)")
    of_model = "share of the tokens of every model, at least (default: %(default)s)"
    add("--model-target", type=float, default=0.9, metavar="FRAC", help=of_model)
    add("--price", type=float, metavar="N", help="of a GPU for an hour, in any currency: adds what 30 days cost")
    add("--max-requests", type=int, default=20_000, metavar="N", help="simulate the first N (default: %(default)s)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add("--processes", type=int, default=cores, metavar="N", help="that simulate (default: one for each core)")
    add("--png", type=Path, metavar="FILE", help="draw attainment over GPUs there; needs matplotlib")


def run(flags: argparse.Namespace) -> int:
    """Print the plan; raises ConfigError for settings and files that cannot be."""
    workload, costs = read_inputs(flags, flags.trace)
    limits = {
        "model_target": min(flags.model_target, flags.target),
        "link_bytes_per_s": flags.link_gbs * 1e9,
        "max_requests": flags.max_requests,
    }
    if flags.price is not None and not 0 <= flags.price < math.inf:
        raise ConfigError(f"must be 0 or more, not {flags.price}", key="--price")
    begun = time.perf_counter()

    def progress(text: str) -> None:
        print(f"{time.perf_counter() - begun:6.0f} s  {text}", file=sys.stderr, flush=True)

    if flags.processes < 1:
        raise ConfigError(f"must be at least 1, not {flags.processes}", key="--processes")
    asked = workload, costs, gpu(flags.gpu), slo_of(flags), flags.target
    answer = plan(*asked, **limits, progress=progress, num_processes=flags.processes)
    print(describe(answer, flags.price))
    write_json(flags.json, answer.to_json() | {"price_per_gpu_hour": flags.price})
    if flags.png:
        _draw(answer, flags.png)
    return 0


def describe(answer: Plan, price: float | None = None) -> str:
    """A plan as a table, with what it takes for granted; `price` is that of a GPU for an hour."""
    cost = f" {'30 days':>10}" if price is not None else ""
    lines = [
        f"{answer.num_models} models, {answer.num_simulated} of {answer.num_requests} requests simulated, "
        f"{100 * answer.target:g} % of tokens on time wanted and {100 * answer.model_target:g} % of every model's, "
        f"on {answer.gpu}",
        f"{'system':15} {'GPUs':>6} {'N+1':>6} {'saved':>7} {'on time':>8} {'worst':>8} {'free':>6}{cost}  limited by",
    ]
    for name, found in answer.systems.items():
        saved = answer.saved_frac(name)
        count = "none" if found.num_gpus is None else found.num_gpus
        percent = "-" if saved is None or name == "dedicated" else f"{100 * saved:.0f} %"
        if price is not None:
            cost = f" {'-' if found.num_gpus is None else f'{720 * price * found.num_gpus:,.0f}':>10}"
        free = min(group.headroom_frac for group in found.groups)
        lines.append(
            f"{name:15} {count:>6} {found.spare_gpus or '-':>6} {percent:>7} {100 * found.attainment:>6.2f} % "
            f"{100 * found.worst.worst_frac:>6.2f} % {100 * free:>4.0f} %{cost}  {_limits(found)}"
        )
    lines.append(f"{'bound':15} {answer.bound_gpus:>6}   (switching free, memory endless, every token on time)")
    for name, found in answer.systems.items():
        if found.num_gpus is None:
            most = max(each.num_gpus for group in found.groups if group.num_gpus is None for each in group.tries)
            worst = f"{found.worst.worst_model} had {100 * found.worst.worst_frac:.1f} %"
            lines.append(f"{name}: no number up to {most} GPUs is enough; with these {worst} when it was ended")
        elif host_bytes := max(group.host_bytes_per_node for group in found.groups):
            worst = f"the worst model is {found.worst.worst_model}"
            lines.append(f"{name}: {format_bytes(int(host_bytes))} of host memory per node for weights; {worst}")
    return "\n".join([*lines, "assumed:", *(f"  - {text}" for text in answer.assumptions)])


def _limits(found: SystemPlan) -> str:
    return ", ".join(dict.fromkeys(group.binding for group in found.groups if group.binding)) or "-"


def _draw(answer: Plan, path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--png needs matplotlib: pip install 'tokenpool[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, found in answer.systems.items():
        for group in found.groups:
            points = [(each.num_gpus, 100 * each.attainment) for each in group.tries]
            label = f"{name}, {group.gpus_per_instance} GPU(s) each"
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axis.axhline(100 * answer.target, color="grey", linewidth=0.8, linestyle="--")
    axis.set(xlabel=f"GPUs ({answer.gpu})", ylabel="tokens on time, %", ylim=(0, 102))
    axis.grid(alpha=0.3)
    axis.legend()
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", source=str(path)) from error
