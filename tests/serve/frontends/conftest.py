# SPDX-License-Identifier: Apache-2.0
"""Runs tests of a supervisor and its frontends that have no processes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.serve.frontends.door import Door

LIMIT_S = 20.0
"""For what would take for ever."""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Door], Awaitable[None]]], None]:
    """Runs a test with a pool of two frontends that has started."""
    from tests.serve.frontends.door import door

    def run(test: Callable[[Door], Awaitable[None]]) -> None:
        async def within_limit() -> None:
            async with asyncio.timeout(LIMIT_S), door(monkeypatch, tmp_path) as d:
                await test(d)

        asyncio.run(within_limit())

    return run
