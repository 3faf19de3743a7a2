# SPDX-License-Identifier: Apache-2.0
"""Published traces in simulated time: how many GPUs they take, and what every system does with as many.

    python -m bench.sim.traces_sim --data DIR --json bench/results/traces_sim.json

DIR holds the traces that `TRACES` names, as their authors publish them; one whose file is not there is left out, and
that is said. A log of one service becomes many models: each request is given to one of them by Zipf's law (exponent 1).
Logs with models, and clients with rates, keep theirs. Kinds of models are those of Aegaeon's workloads, in turn.

The number of GPUs is the least with which `slack` has 99 % of all tokens on time, from half of the bound up. Then each
other system gets as many: `aegaeon` at its best of QMAX 1, 2, 4 s and a quarter, three eighths and half of the devices
for prefills. TTFT 10 s, TPOT 0.1 s, costs and charges as in bench/sim_compare.py, one seed.
[behind_points: how much more tokens on time, in points, the best other system has than `slack`, on any trace]
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from bench.parts import common
from bench.parts.sim_sensitivity import GPU, LINK_BYTES_PER_S, costs_for
from tokenpool.config import SLO
from tokenpool.sim import generate
from tokenpool.sim.compared.bound import bound
from tokenpool.sim.compared.systems import System, live_settings, run_system, system
from tokenpool.sim.gpus import gpu
from tokenpool.sim.host_costs import HostCosts
from tokenpool.sim.traces.client_windows import client_requests, read_client_windows
from tokenpool.sim.traces.trace_files import read_requests
from tokenpool.sim.workload import Workload

SLO_10S = SLO(10.0, 0.1)
GOAL = 0.99
OTHERS = ("request_level", "round_robin", "sllm", "sleep", "mux")
_MAX_GPUS = 32
_QMAX_S, _SPLITS = (1.0, 2.0, 4.0), (0.25, 0.375, 0.5)
KEPT = (
    "token_deadline_pct", "request_all_tokens_pct", "models_90_pct", "worst_model_pct", "ttft_p50_s", "ttft_p99_s",
)  # fmt: skip


class Trace(NamedTuple):
    """One line of the result."""

    name: str
    file: str
    span_s: float
    num_models: int | None = None
    """Into which its requests are spread; None = as it has them."""
    from_s: float = 0.0
    rate_per_s: float | None = None
    """Of all clients together, where the file holds rates of clients."""


TRACES = (
    Trace("azure 2023, conversation", "azure2023_conv.csv", 600.0, 100),
    Trace("azure 2023, code", "azure2023_code.csv", 900.0, 60),
    Trace("mooncake, synthetic", "mooncake_fast25_synthetic.jsonl.gz", 600.0, 60),
    Trace("prism, 27 models", "prism_real_trace_27models.csv", 600.0),
    Trace("servegen, m-small", "servegen_m-small_clients.csv.gz", 600.0, from_s=264_000.0, rate_per_s=8.0),
)


def workload_of(trace: Trace, folder: Path, seed: int) -> Workload:
    """The requests of a trace, by model, with kinds in turn."""
    path = folder / trace.file
    if trace.rate_per_s is not None:
        windows = read_client_windows(path)
        end_s = trace.from_s + trace.span_s
        rates = [w.rate_per_s for w in windows if trace.from_s <= w.start_s < end_s]
        scale = trace.rate_per_s / sum(rates)
        read = client_requests(windows, from_s=trace.from_s, span_s=trace.span_s, seed=seed, scale=scale)
    else:
        read = read_requests(path)
    requests = [request for request in read.requests if request.arrival_s < trace.span_s]
    if trace.num_models is not None:
        rng, names = random.Random(seed), [f"m{i:03}" for i in range(trace.num_models)]
        drawn = rng.choices(names, [1 / rank for rank in range(1, trace.num_models + 1)], k=len(requests))
        requests = [request._replace(model=model) for request, model in zip(requests, drawn, strict=True)]
    else:
        names = sorted({request.model for request in requests})
    kinds = {name: generate.ARTIFACT_KINDS[i % len(generate.ARTIFACT_KINDS)] for i, name in enumerate(names)}
    return Workload(requests, kinds)


@dataclass(frozen=True, slots=True)
class TracesSim:
    """Results; see the module."""

    behind_points: float
    better: Mapping[str, str]
    traces: Sequence[Mapping[str, Any]]


def run(*, data: Path, only: Sequence[str], seed: int, **_: object) -> TracesSim:
    """Play the traces whose file is there, those that `only` names or all."""
    rows = []
    for trace in TRACES:
        if only and not any(word in trace.name for word in only):
            continue
        if not (data / trace.file).exists():
            common.progress(f"{trace.name}: left out, there is no {trace.file}")
            continue
        rows.append(_row(trace, workload_of(trace, data, seed)))
        common.progress(describe(rows[-1]))
    behind = [max(row["systems"][name]["token_deadline_pct"] for name in row["systems"]) for row in rows]
    own = [row["systems"]["slack"]["token_deadline_pct"] for row in rows]
    most = max((best - ours for best, ours in zip(behind, own, strict=True)), default=0.0)
    return TracesSim(most, {"behind_points": "lower"}, rows)


def describe(row: Mapping[str, Any]) -> str:
    """One line: what a trace takes, and tokens on time of each system."""
    shares = ", ".join(f"{name} {found['token_deadline_pct']:.1f}" for name, found in row["systems"].items())
    return (
        f"{row['trace']}: {row['requests']} requests, {row['models']} models, {row['gpus']} GPUs, "
        f"{row['host_bytes_per_node'] / 1e12:.2f} TB of weights in a node: {shares} % on time"
    )


def _row(trace: Trace, workload: Workload) -> dict[str, Any]:
    charged = {kind: HostCosts().of_model(c, gpu(GPU)) for kind, c in costs_for(workload).items()}
    least = bound(workload, charged, SLO_10S)
    count = max(1, int(least.peak_gpus / 2))
    while (found := _measured(_pool("slack", count), workload))["token_deadline_pct"] < 100 * GOAL:
        common.progress(f"{trace.name}: {found['token_deadline_pct']:.1f} % on {count} GPUs")
        if count >= _MAX_GPUS:
            break
        count += 1
    systems = {"slack": found}
    for name in OTHERS:
        systems[name] = _measured(_pool(name, count), workload)
    best = max((_measured(made, workload) | options for made, options in _aegaeons(count)), key=_tokens, default=None)
    if best is not None:
        systems["aegaeon"] = best
    weights = sum(charged[kind].weight_bytes for kind in workload.kinds.values())
    nodes = -(-count // HostCosts().gpus_per_node)
    return {
        "trace": trace.name,
        "requests": len(workload.requests),
        "models": len(workload.kinds),
        "span_s": trace.span_s,
        "gpus": count,
        "bound_gpus": least.num_gpus,
        "host_bytes_per_node": weights / nodes,
        "host_bytes_per_gpu_allowed": live_settings(_pool("slack", count).specs).host_bytes,
        "systems": systems,
    }


def _tokens(found: Mapping[str, float]) -> float:
    return found["token_deadline_pct"]


def _pool(name: str, count: int) -> System:
    return system(name, count, GPU, LINK_BYTES_PER_S)


def _aegaeons(count: int) -> Iterator[tuple[System, dict[str, float]]]:
    splits = sorted({min(count - 1, max(1, round(share * count))) for share in _SPLITS}) if count > 1 else []
    for qmax_s, split in product(_QMAX_S, splits):
        made = system("aegaeon", count, GPU, LINK_BYTES_PER_S, split, options={"quota_max_s": qmax_s})
        yield made, {"qmax_s": qmax_s, "prefill_gpus": split}


def _measured(made: System, workload: Workload) -> dict[str, float]:
    found = run_system(made, workload, costs_for(workload).__getitem__, SLO_10S, drain_s=120.0).to_json()
    return {key: found[key] for key in KEPT}


def main() -> None:
    """Read the flags, run, report."""
    parser = common.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the traces")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="parts of names, comma between")
    common.report("traces_sim", run, parser.parse_args(), ["behind_points"])


if __name__ == "__main__":
    main()
