# SPDX-License-Identifier: Apache-2.0
"""A folder for a store, whose keeper ends with the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node_store.asking import kill_keeper


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """That of the store; it is not there yet."""
    place = tmp_path / "store"
    yield place
    kill_keeper(place)
