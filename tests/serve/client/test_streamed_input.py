# SPDX-License-Identifier: Apache-2.0
"""Streamed input by itself: each piece comes to the engine that has the session, once and in order, whatever dies.

Engines answer what the test tells them to. A host may be away when the first piece comes, and when others do.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serve.client.test_failover_client import Setup, with_setup

pytestmark = pytest.mark.vllm

ACTS = ("join", "lose", "piece", "piece", "answer", "answer", "end", "abort", "fail")
_END = 0


class Play:
    """One session with at most one host at a time, and what should come of it."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        setup.client.fail = self._fail
        self.engine: Any = None
        self.sent: list[int] = []
        self.owner: Any = None
        self.failed = self.aborted = self.ended = self.given_up = False
        self.num_answered = 0
        self._feed: asyncio.Queue[int] = asyncio.Queue()
        self._feeder = asyncio.create_task(self._send())

    async def _send(self) -> None:
        """As AsyncLLM's task of the session does."""
        from tests.helpers.told_engine import make_request

        while True:
            number = await self._feed.get()
            request = make_request("a", resumable=number != _END)
            request.prompt_token_ids = [number]
            await self.setup.client.add_request_async(request)

    def _fail(self, request_id: str, error: Exception) -> None:
        self.failed = True
        self._feeder.cancel()  # as ModelClient does

    @property
    def is_over(self) -> bool:
        return self.failed or self.aborted or self.ended

    async def act(self, what: str) -> None:
        if what == "join" and self.engine is None:
            self.engine = await self.setup.join(f"h{len(self.setup.engines)}")
            if self.sent and not self.is_over and self.owner is None:
                self.owner = self.engine
        elif what == "lose" and self.engine is not None:
            self.setup.client.lost(self.setup.client.hosts[0])
            self.engine = None
        elif what == "piece" and not self.is_over and _END not in self.sent:
            self._put(len(self.sent) + 1)
        elif what == "end" and self.sent and not self.is_over and _END not in self.sent:
            self._put(_END)
        elif what == "abort" and self.sent and not self.is_over:
            self.aborted = True
            self._feeder.cancel()
            await self.setup.client.abort_requests_async(["a"])
        elif what == "answer":
            await self._answer()
        elif what == "fail":
            await self._fail_at_engine()
        await self._settle()

    def _put(self, number: int) -> None:
        self.sent.append(number)
        self._feed.put_nowait(number)
        self.owner = self.owner or self.engine

    async def _answer(self) -> None:
        """The engine ends the oldest piece that it has not answered; with the last one the session ends."""
        if self.is_over or self.engine is None or self.owner is not self.engine:
            return
        if self.num_answered < len(await self.heard_pieces()):
            self.num_answered += 1
            self.engine.say({"a": [7]}, finished={"a"})
            await self.setup.next_tokens()

    async def _fail_at_engine(self) -> None:
        """The engine gives up the session, and forgets the pieces that it has not answered."""
        from vllm.v1.engine import FinishReason

        if self.is_over or self.engine is None or self.owner is not self.engine:
            return
        if self.num_answered < len(await self.heard_pieces()):
            self.given_up = True
            self.engine.say({"a": []}, finished={"a"}, why=FinishReason.ERROR)
            while not self.failed:
                await asyncio.sleep(0.001)

    async def _settle(self) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        if self.engine is not None:
            await self.setup.client.is_sleeping_async()  # it has all that was sent before
        if _END in self.sent and self.num_answered == len(self.sent) - 1 and not self.failed:
            self.ended = True

    async def heard(self, engine: Any) -> list[int]:
        """All that an engine was sent of the session, and the end as `_END`."""
        heard = engine.__dict__.setdefault("heard", [])
        while not engine._added.empty():
            message = await engine.added()
            assert message.request_id == "a" and message.resumable == (message.prompt_token_ids != [_END])
            heard += message.prompt_token_ids
        return heard

    async def heard_pieces(self) -> list[int]:
        return [number for number in await self.heard(self.engine) if number != _END]

    async def check(self) -> None:
        from tokenpool.serve.client.journal import OPEN_PIECES

        for engine in self.setup.engines:
            heard = await self.heard(engine)
            if engine is not self.owner:
                assert heard == []
                continue
            assert heard == self.sent[: len(heard)], "nor does a piece come after the session failed"
            pieces = [number for number in heard if number != _END]
            assert len(pieces) - self.num_answered <= OPEN_PIECES + 1
            if engine is self.engine and not self.is_over:
                room = len(pieces) - self.num_answered <= OPEN_PIECES
                assert not room or heard == self.sent
        lost_its_host = self.owner is not None and self.owner is not self.engine and not (self.aborted or self.ended)
        assert self.failed == (lost_its_host or self.given_up)
        if self.is_over:
            assert len(self.setup.client.journal) == 0
            assert all(self.setup.client.load(host) == 0 for host in self.setup.client.hosts)


@given(st.lists(st.sampled_from(ACTS), max_size=24))
@settings(deadline=None)
def test_each_piece_comes_once_and_in_order(acts: list[str]) -> None:
    async def test(setup: Setup) -> None:
        session = Play(setup)
        for what in acts:
            await session.act(what)
            await session.check()
        session._feeder.cancel()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(with_setup(Path(folder), test))


def test_who_sends_faster_than_the_model_hears_waits(tmp_path: Path) -> None:
    """It goes on with each answer, and at once when the session is over."""
    from tokenpool.serve.client.journal import OPEN_PIECES

    async def test(setup: Setup) -> None:
        session = Play(setup)
        await session.act("join")
        for _ in range(OPEN_PIECES + 3):
            await session.act("piece")
        assert len(await session.heard_pieces()) == OPEN_PIECES + 1
        await session.act("answer")
        assert len(await session.heard_pieces()) == OPEN_PIECES + 2
        waiting = asyncio.create_task(setup.client.journal.get("a").heard())  # type: ignore[union-attr]
        await asyncio.sleep(0)
        assert not waiting.done()
        await session.act("abort")
        await asyncio.wait_for(waiting, 30)

    asyncio.run(with_setup(tmp_path, test))
