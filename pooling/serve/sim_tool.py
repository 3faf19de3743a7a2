# SPDX-License-Identifier: Apache-2.0
"""`tokenpool sim` and `tokenpool plan`: simulate a request file, and say how many GPUs it needs. Import no vLLM.

tokenpool sim --requests week.csv --gpus 16 --gpu h100-80g --policy slack --ttft 10 --tpot 0.1
tokenpool plan --trace week.csv --models kinds.yaml --gpu h100-80g --ttft 10 --tpot 0.1
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from tokenpool.config import SLO
from tokenpool.errors import ConfigError, config_errors_under, show
from tokenpool.policy.capacity_live import LiveCapacity
from tokenpool.sim import artifact
from tokenpool.sim.costs import costs_of, estimate_costs
from tokenpool.sim.gpus import gpu
from tokenpool.sim.live import POOL_POLICIES, LivePool, LiveSettings
from tokenpool.sim.plan import Plan
from tokenpool.sim.planner import LINK_BYTES_PER_S, check_costs, plan
from tokenpool.sim.systems import run_system, system
from tokenpool.sim.trace_files import read_requests
from tokenpool.sim.workload import ModelCosts, Workload
from tokenpool.units import parse_bytes, parse_seconds


class Parser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would end the process."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the command line."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def simulate(words: list[str]) -> int:
    """Run `tokenpool sim`; raises ConfigError for settings and files that cannot be."""
    parser = Parser("tokenpool sim", description="Serve a request file in simulated time and print what was on time.")
    _add_common(parser, "--requests")
    parser.add_argument("--gpus", type=int, required=True, help="devices; a tensor parallel group counts as one")
    parser.add_argument("--policy", required=True, help="slack, aegaeon, sllm, ...; see docs/simulation.md")
    parser.add_argument("--prefill-gpus", type=int, default=6, help="of the GPUs, for aegaeon (default: %(default)s)")
    parser.add_argument(
        "--artifact-mode", action="store_true", help="costs and rules of the simulator in Aegaeon's artifact"
    )
    parser.add_argument(
        "--capacity", choices=("static", "live"), help="models on some devices only, fixed or moved; docs/capacity.md"
    )
    parser.add_argument("--host-memory", default="256GB", help="per device, for --capacity (default: %(default)s)")
    parser.add_argument(
        "--fail", action="append", default=[], metavar="SECONDS:DEVICE", help="lose a device then, for --capacity"
    )
    flags = parser.parse_args(words)
    if flags.capacity and (flags.artifact_mode or flags.policy not in POOL_POLICIES):
        raise ConfigError(
            f"goes with the policies {', '.join(POOL_POLICIES)}, without --artifact-mode", key="--capacity"
        )
    if flags.fail and not flags.capacity:
        raise ConfigError("needs --capacity: else nothing says where the models of a lost device go", key="--fail")
    workload, costs = _inputs(flags, flags.requests)
    if flags.artifact_mode:
        known = ", ".join(sorted(artifact.KINDS))
        for model, kind in workload.kinds.items():
            if kind not in artifact.KINDS:
                raise ConfigError(f"no such kind in the artifact: {show(kind)}; known: {known}", key=model)
        costs = {kind: artifact.costs(kind) for kind in workload.kinds.values()}
    else:
        check_costs(workload, costs, gpu(flags.gpu))
    per_gb = 2**30 if flags.artifact_mode else 1e9  # the artifact's GB
    made = system(flags.policy, flags.gpus, flags.gpu, flags.link_gbs * per_gb, flags.prefill_gpus, flags.artifact_mode)
    if flags.capacity:
        pool = LivePool.of(
            made.specs,
            flags.policy,
            {model: costs[kind] for model, kind in workload.kinds.items()},
            _slo(flags),
            LiveCapacity() if flags.capacity == "live" else None,
            LiveSettings(host_bytes=parse_bytes(flags.host_memory, "--host-memory")),
            [_failure(text, flags.gpus) for text in flags.fail],
        )
        result = {**pool.run(workload).to_json(), **pool.moves_to_json()}
    else:
        result = run_system(made, workload, costs.__getitem__, _slo(flags)).to_json()
    print(f"{len(workload.requests)} requests for {len(workload.kinds)} models on {flags.gpus} x {flags.gpu}")
    print(f"  tokens on time                 {result['token_deadline_pct']:6.2f} %")
    print(f"  requests with all on time      {result['request_all_tokens_pct']:6.2f} %")
    print(f"  time-weighted (artifact)       {result['artifact_slo_pct']:6.2f} %")
    print(f"  first token, p50 / p99         {result['ttft_p50_s']:.2f} s / {result['ttft_p99_s']:.2f} s")
    print(f"  failed / not finished          {result['n_failed']} / {result['n_unfinished']}")
    print(f"  busy / waiting / link in use   {_percents(result)}")
    if flags.capacity:
        print(f"  moves                          {len(result['moves'])}, {result['moved_bytes'] / 1e9:.0f} GB copied")
    write_json(flags.json, result)
    return 0


def plan_gpus(words: list[str]) -> int:
    """Run `tokenpool plan`; raises ConfigError for settings and files that cannot be."""
    parser = Parser("tokenpool plan", description="Find the least number of GPUs for a trace, dedicated and pooled.")
    _add_common(parser, "--trace")
    parser.add_argument("--target", type=float, default=0.99, help="share of tokens on time (default: %(default)s)")
    parser.add_argument("--max-requests", type=int, default=20_000, help="simulate the first N (default: %(default)s)")
    parser.add_argument("--png", type=Path, help="draw attainment over GPUs there; needs matplotlib")
    flags = parser.parse_args(words)
    workload, costs = _inputs(flags, flags.trace)
    limits = {"link_bytes_per_s": flags.link_gbs * 1e9, "max_requests": flags.max_requests}
    answer = plan(workload, costs, gpu(flags.gpu), _slo(flags), flags.target, **limits)
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


def _add_common(parser: argparse.ArgumentParser, file_flag: str) -> None:
    add = parser.add_argument
    add(file_flag, type=Path, required=True, help="requests as CSV or CSV.gz; layouts: docs/planning.md")
    add("--models", type=Path, help="YAML: model name or '*' -> kind, or {weights, kv_bytes_per_token, num_gpus}")
    add("--gpu", required=True, help="such as h100-80g")
    add("--link-gbs", type=float, default=LINK_BYTES_PER_S / 1e9, help="GB/s from host memory (default: %(default)g)")
    add("--ttft", default="10s", help="time to the first token (default: %(default)s)")
    add("--tpot", default="100ms", help="time per further token (default: %(default)s)")
    add("--json", type=Path, help="write the result there")


def _slo(flags: argparse.Namespace) -> SLO:
    return SLO(parse_seconds(flags.ttft, "--ttft"), parse_seconds(flags.tpot, "--tpot"))


def _inputs(flags: argparse.Namespace, path: Path) -> tuple[Workload, dict[str, ModelCosts]]:
    """The requests, with kinds as `--models` says, and the costs by kind."""
    workload = read_requests(path)
    if not workload.requests:
        raise ConfigError("there are no requests in it", source=str(path))
    named = _read_models(flags.models) if flags.models else {}
    # Models that nobody asked for need an instance too, where each has its own.
    idle = {name: name for name in named if name != "*" and name not in workload.kinds}
    kinds, costs = {}, {}
    for model, kind in {**workload.kinds, **idle}.items():
        entry = named.get(model, named.get("*", kind))
        with config_errors_under(model):
            if isinstance(entry, Mapping):
                kinds[model] = name = f"own costs of {model if model in named else '*'}"
                if name not in costs:
                    costs[name] = _own_costs(entry, flags.gpu)
            elif isinstance(entry, str):
                kinds[model] = entry
                if entry not in costs and not getattr(flags, "artifact_mode", False):
                    costs[entry] = costs_of(entry, flags.gpu)
            else:
                raise ConfigError(f"expected a kind or a mapping of sizes, not {show(entry)}")
    return Workload(workload.requests, kinds), costs


def _read_models(path: Path) -> Mapping[str, Any]:
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot be read: {error}", source=str(path)) from error
    if not isinstance(read, Mapping):
        raise ConfigError("expected a mapping of model names, or '*', to kinds", source=str(path))
    return {str(name): entry for name, entry in read.items()}


def _own_costs(entry: Mapping[str, Any], gpu_name: str) -> ModelCosts:
    known = ("weights", "kv_bytes_per_token", "num_gpus")
    for key in entry:
        if key not in known:
            raise ConfigError(f"unknown; known: {', '.join(known)}", key=str(key))
    for key in known[:2]:
        if key not in entry:
            raise ConfigError("is missing: give the bytes of all devices together", key=key)
    count = entry.get("num_gpus", 1)
    if not isinstance(count, int) or isinstance(count, bool):
        raise ConfigError(f"must be a whole number, not {show(count)}", key="num_gpus")
    weights, per_token = (parse_bytes(entry[key], key) for key in known[:2])
    return estimate_costs(weights, per_token, gpu(gpu_name), count)


def _failure(text: str, num_gpus: int) -> tuple[float, int]:
    seconds, _, device = text.partition(":")
    try:
        at_s, index = float(seconds), int(device)
    except ValueError:
        raise ConfigError(f"expected SECONDS:DEVICE such as 60:0, not {show(text)}", key="--fail") from None
    if not (0 <= at_s and 0 <= index < num_gpus):
        raise ConfigError(f"{show(text)}: there are devices 0 to {num_gpus - 1}, and times from 0 on", key="--fail")
    return at_s, index


def _percents(result: Mapping[str, float]) -> str:
    return " / ".join(f"{100 * result[key]:.0f} %" for key in ("busy_frac", "waited_frac", "link_frac"))


def write_json(path: Path | None, values: Mapping[str, Any]) -> None:
    """Write a result to `path`, unless it is None; raises ConfigError."""
    if path is not None:
        try:
            path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot be written: {error.strerror}", source=str(path)) from error


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
