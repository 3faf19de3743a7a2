# SPDX-License-Identifier: Apache-2.0
"""The part `sensitivity` of bench/sim_compare.py: one load, one thing changed at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from bench.parts import common
from tokenpool.config import SLO
from tokenpool.sim import generate
from tokenpool.sim.compared.systems import run_system, system
from tokenpool.sim.costs import costs_of
from tokenpool.sim.workload import ModelCosts, Workload

GPU, NUM_GPUS, LINK_BYTES_PER_S = "h100-80g", 16, 16e9
_NUM_MODELS, _RATE_PER_S, _DURATION_S = 140, 0.1, 120.0
_SLO = SLO(10.0, 0.1)


def costs_for(workload: Workload) -> Mapping[str, ModelCosts]:
    """Costs of a workload's kinds on the GPU of these benches, by kind."""
    return {kind: costs_of(kind, GPU) for kind in set(workload.kinds.values())}


def rows(seed: int) -> list[dict[str, Any]]:
    """Shares of all variants; progress goes to the log."""
    found = []
    for title, made, workload in _variants(seed):
        result = run_system(made, workload, costs_for(workload).__getitem__, _SLO).to_json()
        found.append({"variant": title, "system": made.name, **result})
        shares = [f"{result[key]:.1f}" for key in ("token_deadline_pct", "request_all_tokens_pct")]
        common.progress(f"{title}, {made.name}: {' / '.join(shares)}")
    return found


def _variants(seed: int) -> Iterator[tuple[str, Any, Workload]]:
    base = generate.artifact_like(_NUM_MODELS, _RATE_PER_S, _DURATION_S, seed)
    fewer = generate.artifact_like(64, _RATE_PER_S, _DURATION_S, seed)
    for gbs in (8, 16, 32, 64):
        yield f"link {gbs} GB/s, {_NUM_MODELS} models", system("slack", NUM_GPUS, GPU, gbs * 1e9), base
        yield f"link {gbs} GB/s, 64 models", system("aegaeon", NUM_GPUS, GPU, gbs * 1e9), fewer
    plain = system("slack", NUM_GPUS, GPU, LINK_BYTES_PER_S)
    yield "no prefetch", _with(plain, can_prefetch=False), base
    for count in (1, 2, 3):
        yield f"at most {count} resident", _with(plain, max_resident=count), base
    for prefill in (3, 4, 5, 6, 7, 8):
        made = system("aegaeon", NUM_GPUS, GPU, LINK_BYTES_PER_S, prefill_gpus=prefill)
        yield f"{prefill} prefill GPUs, 64 models", made, fewer
    rates = dict.fromkeys(base.kinds, 0.087)
    for cv in (1.0, 2.0, 4.0):
        yield f"bursts, cv {cv}", plain, generate.poisson(rates, _DURATION_S, seed, kinds=base.kinds, cv=cv)
    for skew in (0.5, 1.0, 1.5):
        yield f"skew {skew}", plain, generate.poisson(rates, _DURATION_S, seed, kinds=base.kinds, skew=skew)


def _with(made: Any, **changes: Any) -> Any:
    return replace(made, specs=tuple(replace(spec, **changes) for spec in made.specs))
