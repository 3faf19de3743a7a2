# SPDX-License-Identifier: Apache-2.0
"""`tokenpool plan`: how many GPUs a request file needs, dedicated and pooled. Imports no vLLM.

tokenpool plan --trace week.csv --models kinds.yaml --gpu h100-80g --ttft 10 --tpot 0.1
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenpool.cli.output import write_json
from tokenpool.cli.parser import Parser
from tokenpool.cli.sim_inputs import add_inputs, read_inputs, slo_of
from tokenpool.errors import ConfigError
from tokenpool.sim.gpus import gpu
from tokenpool.sim.plan import Plan
from tokenpool.sim.planner import plan


def add_command(commands: argparse._SubParsersAction[Parser], summary: str) -> None:
    """Add the parser of `tokenpool plan` to the tree."""
    parser = commands.add_parser(
        "plan", help=summary, description="Find the least number of GPUs for a trace, dedicated and pooled."
    )
    add_inputs(parser, "--trace")
    add = parser.add_argument
    add("--target", type=float, default=0.99, metavar="FRAC", help="share of tokens on time (default: %(default)s)")
    add("--max-requests", type=int, default=20_000, metavar="N", help="simulate the first N (default: %(default)s)")
    add("--png", type=Path, metavar="FILE", help="draw attainment over GPUs there; needs matplotlib")


def run(flags: argparse.Namespace) -> int:
    """Print the plan; raises ConfigError for settings and files that cannot be."""
    workload, costs = read_inputs(flags, flags.trace)
    limits = {"link_bytes_per_s": flags.link_gbs * 1e9, "max_requests": flags.max_requests}
    answer = plan(workload, costs, gpu(flags.gpu), slo_of(flags), flags.target, **limits)
    print(describe(answer))
    write_json(flags.json, answer.to_json())
    if flags.png:
        _draw(answer, flags.png)
    return 0


def describe(answer: Plan) -> str:
    """A plan as a table, with what it takes for granted."""
    lines = [
        f"{answer.num_models} models, {answer.num_simulated} of {answer.num_requests} requests simulated, "
        f"{100 * answer.target:g} % of tokens on time wanted, on {answer.gpu}",
        f"{'system':15} {'GPUs':>6} {'saved':>7} {'on time':>8}  limited by",
    ]
    for name, found in answer.systems.items():
        saved = answer.saved_frac(name)
        limits = ", ".join(dict.fromkeys(group.binding for group in found.groups if group.binding)) or "-"
        count = "none" if found.num_gpus is None else found.num_gpus
        percent = "-" if saved is None or name == "dedicated" else f"{100 * saved:.0f} %"
        lines.append(f"{name:15} {count:>6} {percent:>7} {100 * found.attainment:>6.2f} %  {limits}")
    lines.append(f"{'bound':15} {answer.bound_gpus:>6}   (switching free, memory endless, every token on time)")
    return "\n".join([*lines, "assumed:", *(f"  - {text}" for text in answer.assumptions)])


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
