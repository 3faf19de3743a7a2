# SPDX-License-Identifier: Apache-2.0
"""How close the simulator comes to that of Aegaeon's artifact on the same requests; `bench.sim_compare` prints it."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tokenpool.config import SLO
from tokenpool.sim.compared import artifact
from tokenpool.sim.compared.systems import run_system, system
from tokenpool.sim.traces.trace_files import read_requests

_POLICIES = {"sllm": "sllm", "sllm+": "sllm+", "mix6": "aegaeon"}
_MEASURES = ("artifact_slo_pct", "token_deadline_pct", "request_all_tokens_pct")


class FidelityRow(NamedTuple):
    """One policy at one load; percent."""

    policy: str
    """As the artifact's results name it."""
    num_models: int
    rate: float
    """Nominal requests per second and model."""
    our_artifact_slo_pct: float
    our_token_deadline_pct: float
    our_request_all_tokens_pct: float
    their_artifact_slo_pct: float
    their_token_deadline_pct: float
    their_request_all_tokens_pct: float

    @property
    def token_points(self) -> float:
        """Difference of the share of tokens on time, ours less theirs, in points."""
        return self.our_token_deadline_pct - self.their_token_deadline_pct

    @property
    def max_difference(self) -> float:
        """Largest of the three differences, in points."""
        return max(abs(ours - theirs) for ours, theirs in zip(self[3:6], self[6:9], strict=True))


def fidelity(data_dir: Path) -> list[FidelityRow]:
    """Replay every load of DIR/results_sim.csv whose requests are in DIR/sim_effective."""
    return list(_rows(Path(data_dir)))


def _rows(data_dir: Path) -> Iterator[FidelityRow]:
    with open(data_dir / "results_sim.csv", newline="", encoding="utf-8") as file:
        results = list(csv.DictReader(file))
    for row in results:
        num_models, rate, slo = int(row["num_models"]), float(row["nominal_rate"]), SLO(10.0, 0.1)
        is_base = row["variant"] == "base" and row["seed"] == "0"
        is_slo = (float(row["ttft_slo_s"]), float(row["tpot_slo_s"])) == (slo.ttft_s, slo.tpot_s)
        scales = f"{row['inlen_scale']}-{row['outlen_scale']}"
        path = data_dir / "sim_effective" / f"eff-{num_models}-{rate:g}-{scales}-seed0.csv"
        if row["policy"] not in _POLICIES or not (is_base and is_slo) or scales != "1.0-1.0" or not path.exists():
            continue
        ours = run_system(
            system(_POLICIES[row["policy"]], 16, "h100-80g", artifact.LINK_BYTES_PER_S, artifact_mode=True),
            read_requests(path),
            artifact.costs,
            slo,
        ).to_json()
        theirs = [float(row[name]) for name in _MEASURES]
        yield FidelityRow(row["policy"], num_models, rate, *(ours[name] for name in _MEASURES), *theirs)
