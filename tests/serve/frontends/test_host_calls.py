# SPDX-License-Identifier: Apache-2.0
"""Calls to other processes wait for their answers and not for each other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tokenpool.errors import HostError
from tokenpool.serve.client import host_calls
from tokenpool.serve.client.host_calls import call_beside
from tokenpool.wire.control import ControlServer

pytestmark = pytest.mark.cpu

KEY = b"k" * 32
MANY = 100
"""More than there are threads for questions."""
_LIMIT_S = 30.0


class Supervisor:
    """Adds models once all frontends have said that they joined."""

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / "s")
        self.joined = threading.Event()
        calls = ControlServer(self.address, KEY, lambda job: Future())
        calls.serve({}, {"add_model": self.wait, "joined": self.joined.set, "state": self.wait})

    def wait(self) -> bool:
        return self.joined.wait(_LIMIT_S)

    async def call(self, method: str) -> Any:
        return await call_beside(self.address, KEY, method, timeout_s=_LIMIT_S)


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    made = Supervisor(tmp_path)
    yield made
    made.joined.set()  # the threads of a test that has failed end


def test_changes_that_wait_for_another_call_of_their_caller_hear_of_it(supervisor: Supervisor) -> None:
    """However many models somebody adds at once: the frontend that asks can still say that it has joined the first."""

    async def test() -> None:
        adding = [asyncio.create_task(supervisor.call("add_model")) for _ in range(MANY)]
        await asyncio.sleep(0)  # all of them have been sent off
        await supervisor.call("joined")
        assert await asyncio.gather(*adding) == [True] * MANY

    asyncio.run(test())


def test_questions_that_nobody_answers_hold_up_no_change(supervisor: Supervisor) -> None:
    """And however many are asked, there are no more threads for them than there were."""

    async def test() -> None:
        asking = [asyncio.create_task(supervisor.call("state")) for _ in range(MANY)]
        await asyncio.sleep(0)
        await supervisor.call("joined")
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("pool-question")]
        assert len(threads) <= 32
        assert await asyncio.gather(*asking) == [True] * MANY

    asyncio.run(test())


def test_what_a_call_raises_reaches_its_caller(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for which no thread can be started says so as one that is not answered."""

    async def test() -> None:
        with pytest.raises(KeyError):
            await supervisor.call("nothing")

        def refuse(*_: Any, **__: Any) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(host_calls.threading, "Thread", refuse)
        with pytest.raises(HostError, match="can't start new thread"):
            await supervisor.call("joined")

    asyncio.run(test())
