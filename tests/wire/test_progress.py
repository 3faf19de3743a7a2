# SPDX-License-Identifier: Apache-2.0
"""What a host tells of a build while it builds, and that it is told although the loop is busy."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import pytest

from tokenpool.host.load.progress import BuildProgress
from tokenpool.wire.control import ControlServer, call_host

pytestmark = pytest.mark.cpu


def test_a_build_has_a_model_and_a_phase_until_it_ends() -> None:
    """The phase's clock starts with each phase, the model's with the build; a failed build ends too."""
    progress = BuildProgress()
    progress.enter("loading weights")
    assert progress.snapshot() is None
    with pytest.raises(ZeroDivisionError), progress.building("a"):
        progress.enter("loading weights")
        step = progress.snapshot()
        assert step is not None
        assert ("a", "loading weights") == (step["model"], step["phase"])
        assert step["elapsed_s"] >= step["phase_s"] >= 0
        raise ZeroDivisionError
    assert progress.snapshot() is None


def test_progress_is_told_while_the_loop_is_busy(tmp_path: Path) -> None:
    """Direct methods never reach the loop; all others do."""

    def busy_loop(call: Any) -> Any:
        raise AssertionError("the loop is busy")

    path, key, progress = str(tmp_path / "control"), secrets.token_bytes(8), BuildProgress()
    ControlServer(path, key, busy_loop).serve({"state": dict}, {"progress": progress.snapshot})
    with progress.building("a"):
        step = call_host(path, key, "progress")
        assert "a" == step["model"]
    with pytest.raises(AssertionError, match="the loop is busy"):
        call_host(path, key, "state")
