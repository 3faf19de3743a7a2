# SPDX-License-Identifier: Apache-2.0
"""Whoever reads the events of a stored response gets those of that response, and is let go when it has ended."""

from __future__ import annotations

import asyncio
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.serve.access.test_stored_responses import Serving
from tokenpool.serve.access.stored_responses import keep_apart

pytestmark = pytest.mark.cpu
_LIMIT_S = 10.0


class FaithfulServing(Serving):
    """Stores in the order in which vLLM's Responses API does: the events of a response once its task runs."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[asyncio.Event] = []
        self._num_made = 0

    async def create_responses(self, request: Any, raw_request: Any = None) -> Any:
        self._num_made += 1
        name, made, steps = request.request_id, self._num_made, asyncio.Event()
        self.msg_store[name] = ["a message"]
        self.response_store[name] = SimpleNamespace(status="queued", made=made)
        if not request.background:
            return made
        self.steps.append(steps)
        task = asyncio.create_task(self._run(name, made, steps, stream=request.stream))
        self.background_tasks[name] = task
        task.add_done_callback(lambda _: self.background_tasks.pop(name, None))
        return made

    async def _run(self, name: str, made: int, steps: asyncio.Event, *, stream: bool) -> None:
        events: deque[Any] = deque()
        news = asyncio.Event()
        if stream:
            self.event_store[name] = (events, news)
        try:
            for kind in ("response.created", "response.delta", "response.completed"):
                await steps.wait()
                steps.clear()
                events.append(SimpleNamespace(type=kind, made=made))
                news.set()
            self.response_store[name] = SimpleNamespace(status="completed", made=made)
        finally:
            news.set()


async def _read(events: Any) -> set[int]:
    return {event.made async for event in events}


_ids = st.sampled_from("ab")
_again = st.tuples(st.just("again"), _ids)
_acts = st.one_of(
    _again,
    st.tuples(st.just("make"), _ids, st.booleans(), st.booleans()),
    st.tuples(st.just("read"), _ids, st.sampled_from([None, 0, 1, 5])),
    st.tuples(st.just("step"), st.integers(0, 5)),
    st.tuples(st.just("cancel"), _ids),
    st.tuples(st.just("turns"), st.integers(1, 4)),
)


@given(st.lists(_acts, max_size=30))
def test_readers_get_what_they_asked_for_and_end(acts: list[Any]):
    """Whatever ids are used again, whoever is cancelled, and whenever somebody begins to read."""

    async def main() -> None:
        serving: Any = FaithfulServing()
        keep_apart(serving)
        readers: list[tuple[int, asyncio.Task[set[int]]]] = []
        for act, *how in acts:
            if act == "make":
                name, background, stream = how
                await serving.create_responses(
                    SimpleNamespace(request_id=name, previous_response_id=None, background=background, stream=stream)
                )
            elif act == "read" and (stored := serving.response_store.get(how[0])) is not None:
                found = await serving.retrieve_responses(how[0], how[1], True)
                if not isinstance(found, dict):
                    readers.append((stored.made, asyncio.create_task(_read(found))))
                    await asyncio.sleep(0)  # a generator looks when it is asked first
            elif act == "step" and serving.steps:
                serving.steps[how[0] % len(serving.steps)].set()
            elif act == "again" and how[0] not in serving.background_tasks:  # one that is cancelled, then another one
                for stream in (True, False):
                    request = SimpleNamespace(
                        request_id=how[0], previous_response_id=None, background=True, stream=stream
                    )
                    await serving.create_responses(request)
                    await asyncio.sleep(0)
                    if stream:
                        serving.background_tasks[how[0]].cancel()
                        await asyncio.sleep(0.001)
            elif act == "cancel" and (task := serving.background_tasks.get(how[0])) is not None:
                task.cancel()
            elif act == "turns":
                for _ in range(how[0]):
                    await asyncio.sleep(0)
        async with asyncio.timeout(_LIMIT_S):
            while serving.background_tasks:
                for steps in serving.steps:
                    steps.set()
                await asyncio.sleep(0)
            for made, reader in readers:
                assert await reader <= {made}

    asyncio.run(main())


def test_a_reader_of_an_id_that_is_used_again_ends():
    """The first response streams and is cancelled, the second one has no events."""

    async def main() -> None:
        serving: Any = FaithfulServing()
        keep_apart(serving)
        request = SimpleNamespace(request_id="r", previous_response_id=None, background=True, stream=True)
        await serving.create_responses(request)
        await asyncio.sleep(0)
        serving.background_tasks["r"].cancel()
        for _ in range(3):
            await asyncio.sleep(0)
        await serving.create_responses(SimpleNamespace(**{**vars(request), "stream": False}))
        refused = await serving.retrieve_responses("r", 5, True)
        assert (400, "stream") == (refused["status_code"], refused["param"])

    asyncio.run(main())
