# SPDX-License-Identifier: Apache-2.0
"""A small part of the bench of faults."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.server import REPOSITORY

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_small_part_of_it_loses_nothing(tmp_path: Path) -> None:
    """A host, the server that started the pool and a frontend die, on Ray nodes of this machine."""
    pytest.importorskip("ray")
    result, kinds = tmp_path / "chaos.json", ["host_decode", "first_server", "frontend"]
    words = ["--kinds", *kinds, "--streams", "24", "--tokens", "60", "--json", str(result), "--seed", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.chaos", *words], cwd=REPOSITORY, capture_output=True,
        text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    values = json.loads(result.read_text())["values"]
    assert [values[key] for key in ("lost", "wrong", "duplicated", "refused")] == [0] * 4
    assert sorted(run["kind"] for run in values["rounds"]) == sorted(kinds)
    assert all(run["tokens_before"] > 0 for run in values["rounds"])
    assert {run["kind"]: run["broken"] > 0 for run in values["rounds"]}["first_server"]
    assert "lost=0 wrong=0 duplicated=0 broken=" in done.stdout
