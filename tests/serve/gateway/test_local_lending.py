# SPDX-License-Identifier: Apache-2.0
"""A model that is to sleep when its requests have ended takes requests in again when nobody asks any more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tokenpool.errors import HostError
from tokenpool.serve.pool.local_lending import LocalLending

pytestmark = pytest.mark.cpu


class Host:
    """Says for some time that requests of the model still run."""

    ended = False

    def __init__(self, then: Callable[[], Any]) -> None:
        self.calls: list[str] = []
        self._then = then

    async def call(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        self.calls.append(method)
        return method == "sleep" and self.calls.count("sleep") > 2 and self._then()


def lending(host: Host) -> LocalLending:
    return LocalLending({}, lambda: host)  # type: ignore[arg-type, return-value]


def test_a_call_that_fails_while_it_waits_lets_the_model_take_requests_in() -> None:
    """Its host takes none in while it waits, and would for ever: the caller was told of an error, and asks no more."""

    def fail() -> Any:
        raise HostError("engine host does not answer sleep: too many open files")

    host = Host(fail)
    with pytest.raises(HostError, match="too many open files"):
        asyncio.run(lending(host).sleep("a", 1, "wait"))
    assert ["sleep", "sleep", "sleep", "wake"] == host.calls


def test_a_call_that_is_given_up_lets_the_model_take_requests_in() -> None:
    """As when the client has gone."""

    async def give_up() -> None:
        host = Host(lambda: False)
        asked = asyncio.create_task(lending(host).sleep("a", 1, "wait"))
        while len(host.calls) < 2:
            await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert "wake" == host.calls[-1]

    asyncio.run(give_up())


def test_a_model_that_has_come_to_rest_sleeps() -> None:
    host = Host(lambda: True)
    book = lending(host)
    asyncio.run(book.sleep("a", 1, "wait"))
    assert (["sleep"] * 3, {"a": 1}) == (host.calls, book.asleep)


def test_a_call_that_fails_at_once_wakes_nobody() -> None:
    """A model that sleeps already stays asleep."""

    class Refusing(Host):
        async def call(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
            self.calls.append(method)
            raise HostError("no room")

    host = Refusing(lambda: True)
    with pytest.raises(HostError, match="no room"):
        asyncio.run(lending(host).sleep("a", 1, "wait"))
    assert ["sleep"] == host.calls


@pytest.mark.parametrize("what", ["removed", "added again", "loaded again"])
def test_the_next_one_of_a_name_does_not_sleep(what: str) -> None:
    """The host's word comes when the model that fell asleep is gone already."""
    models: dict[str, Any] = {"a": SimpleNamespace(client="first")}

    def fall_asleep() -> bool:
        if what == "loaded again":
            models["a"].client = "second"
        elif models.pop("a") and what == "added again":
            models["a"] = SimpleNamespace(client="another")
        return True

    host = Host(fall_asleep)
    book = LocalLending(models, lambda: host)  # type: ignore[arg-type, return-value]
    asyncio.run(book.sleep("a", 1, "wait"))
    assert {} == book.asleep
