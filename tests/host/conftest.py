# SPDX-License-Identifier: Apache-2.0
"""Fixtures of tests with whole engine hosts. Imports no vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of the simulation's stub models."""
    from tests.dst.world import make_checkpoints

    made = tmp_path_factory.mktemp("dst")
    make_checkpoints(made)
    return made
