# SPDX-License-Identifier: Apache-2.0
"""The part `production` of bench/sim_compare.py: GPUs that a pool saves, and the host memory that it needs for that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.parts import common
from bench.parts.sim_sensitivity import GPU, costs_for
from bench.sim.traces_sim import TRACES, workload_of
from tokenpool.config import SLO
from tokenpool.sim import generate, planner
from tokenpool.sim.gpus import gpu
from tokenpool.sim.workload import Workload

_SLO = SLO(10.0, 0.1)
_TARGET = 0.99


def production(seed: int) -> dict[str, Any]:
    """The shape of Aegaeon's deployment, twice as many models: 56 on one GPU each, 38 on four."""
    return _saved("production", generate.deployed(2, 900.0, seed=seed))


def traced(seed: int, folder: Path) -> list[dict[str, Any]]:
    """The conversations and the code of Azure's trace of 2023, spread over 100 and 60 models."""
    return [_saved(trace.name, workload_of(trace, folder, seed)) for trace in TRACES[:2]]


def _saved(name: str, workload: Workload) -> dict[str, Any]:
    made = planner.plan(workload, costs_for(workload), gpu(GPU), _SLO, target=_TARGET, progress=common.progress)
    saved, found = made.saved_frac("slack"), made.systems["slack"]
    memory = max(group.host_bytes_per_node for group in found.groups)
    common.progress(f"{name}: {saved} of the GPUs saved, {memory / 1e12:.2f} TB of host memory per node")
    percent = None if saved is None else 100 * saved
    return {"trace": name} | made.to_json() | {"gpus_saved_pct": percent, "host_bytes_per_node": memory}
