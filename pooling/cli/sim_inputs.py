# SPDX-License-Identifier: Apache-2.0
"""What `tokenpool sim` and `tokenpool plan` read: requests, models and their costs. Imports no vLLM."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tokenpool.cli.parser import Parser
from tokenpool.config import SLO
from tokenpool.errors import ConfigError, config_errors_under, show
from tokenpool.policy.capacity import LINK_BYTES_PER_S
from tokenpool.sim.costs import costs_of, estimate_costs
from tokenpool.sim.gpus import gpu
from tokenpool.sim.traces.client_windows import client_requests, is_client_file, read_client_windows
from tokenpool.sim.traces.trace_files import read_requests
from tokenpool.sim.workload import ModelCosts, Workload
from tokenpool.units import parse_bytes, parse_seconds

_SEED = 1
"""Of what is drawn from rates of clients."""


def add_inputs(parser: Parser, file_flag: str) -> None:
    """Add the flags that say what is served, where and how fast; `file_flag` names the file of requests."""
    add = parser.add_argument
    costs = "YAML: model name or '*' -> kind, or {weights, kv_bytes_per_token, num_gpus}"
    link = "GB/s from host memory (default: %(default)g)"
    add(file_flag, type=Path, required=True, metavar="FILE", help="requests as CSV or CSV.gz; see docs/planning.md")
    add("--models", type=Path, metavar="FILE", help=costs)
    add(
        "--from", dest="from_s", default="0s", metavar="TIME", help="leave out what comes before (default: %(default)s)"
    )
    add("--for", dest="for_s", metavar="TIME", help="so much of it; needed where a file holds rates of clients")
    add("--scale", type=float, default=1.0, metavar="N", help="times the rates of clients (default: %(default)g)")
    add("--gpu", required=True, metavar="NAME", help="such as h100-80g")
    add("--link-gbs", type=float, default=LINK_BYTES_PER_S / 1e9, metavar="N", help=link)
    add("--ttft", default="10s", metavar="TIME", help="time to the first token (default: %(default)s)")
    add("--tpot", default="100ms", metavar="TIME", help="time per further token (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the result there")


def slo_of(flags: argparse.Namespace) -> SLO:
    """The due times that the flags give."""
    return SLO(parse_seconds(flags.ttft, "--ttft"), parse_seconds(flags.tpot, "--tpot"))


def read_inputs(flags: argparse.Namespace, path: Path) -> tuple[Workload, dict[str, ModelCosts]]:
    """The requests, with kinds as `--models` says, and the costs by kind."""
    workload = _read_part(flags, path)
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
                    is_named = model in named or "*" in named
                    costs[entry] = costs_of(entry, flags.gpu) if is_named else _costs_of_trace(entry, flags.gpu)
            else:
                raise ConfigError(f"expected a kind or a mapping of sizes, not {show(entry)}")
    return Workload(workload.requests, kinds), costs


def _read_part(flags: argparse.Namespace, path: Path) -> Workload:
    """The requests in the time that `--from` and `--for` give."""
    from_s = parse_seconds(flags.from_s, "--from")
    for_s = math.inf if flags.for_s is None else parse_seconds(flags.for_s, "--for")
    if is_client_file(path):
        if for_s == math.inf:
            raise ConfigError("holds rates of clients: give a time with --for, such as 20m", source=str(path))
        with config_errors_under(None, source=str(path)):
            windows = read_client_windows(path)
            return client_requests(windows, from_s=from_s, span_s=for_s, seed=_SEED, scale=flags.scale)
    if flags.scale != 1.0:
        raise ConfigError("--scale is for files with rates of clients; this one holds requests", source=str(path))
    read = read_requests(path)
    kept = [r._replace(arrival_s=r.arrival_s - from_s) for r in read.requests if 0 <= r.arrival_s - from_s < for_s]
    if not kept:
        where = "" if not from_s and for_s == math.inf else " in the time of --from and --for"
        raise ConfigError(f"there are no requests in it{where}", source=str(path))
    return Workload(kept, read.kinds)


def _costs_of_trace(kind: str, gpu_name: str) -> ModelCosts:
    """Costs of a kind that the trace names, or of a model that it names and nothing else says a kind for."""
    gpu(gpu_name)
    try:
        return costs_of(kind, gpu_name)
    except ConfigError as error:
        problem = "the trace does not say what it costs: give --models FILE with a line such as '*': qwen2.5-7b"
        raise ConfigError(problem) from error


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
