# SPDX-License-Identifier: Apache-2.0
"""What a frontend has to tell its supervisor is heard, and counts for that for which it was said."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.frontends.door import Door, Frontend
from tokenpool.errors import HostError
from tokenpool.serve.frontends import shared_hosts

pytestmark = pytest.mark.vllm


class Deaf:
    """The supervisor does not hear the first words of each frontend, by what they say."""

    def __init__(self, method: str, num_lost: int = 3) -> None:
        self.lost: list[int] = []
        self._method, self._num_lost = method, num_lost

    async def __call__(self, frontend: Frontend, method: str, args: tuple[Any, ...]) -> None:
        index = frontend.settings.index
        if method == self._method and self.lost.count(index) < self._num_lost:
            self.lost.append(index)
            raise HostError(f"engine host does not answer {method} within 30 s")


@pytest.fixture(autouse=True)
def endless_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No limit helps."""
    monkeypatch.setattr(shared_hosts, "_DRAIN_LIMIT_S", 1e6)


def test_a_model_is_added_though_nobody_hears_that_it_is_joined_at_first(run: Any) -> None:
    async def test(d: Door) -> None:
        d.fate = deaf = Deaf("joined")
        await d.add("a")
        assert d.all_serve("a") and sorted(deaf.lost) == [0, 0, 0, 1, 1, 1]

    run(test)


def test_a_model_is_removed_though_nobody_hears_that_it_is_drained_at_first(run: Any) -> None:
    async def test(d: Door) -> None:
        await d.add("a")
        d.fate = deaf = Deaf("drained")
        await d.operator.remove_model("a", 0.0)
        assert sorted(deaf.lost) == [0, 0, 0, 1, 1, 1]

    run(test)


def test_a_model_gets_cold_though_nobody_hears_that_it_is_drained_at_first(run: Any) -> None:
    async def test(d: Door) -> None:
        await d.add("a")
        d.fate = deaf = Deaf("drained")
        d.rest("a")
        await d.until(lambda: d.supervisor.models["a"].app.state == "cold")
        assert sorted(deaf.lost) == [0, 0, 0, 1, 1, 1]

    run(test)
