# SPDX-License-Identifier: Apache-2.0
"""Audio that nobody transcribes is bounded, for each connection and for all, and goes with its client."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.websockets import WebSocketDisconnect
from vllm.entrypoints.speech_to_text.realtime import api_router

from tests.serve.access.test_tenants import Pool, tenant
from tokenpool.serve.access.byte_shares import ByteShares
from tokenpool.serve.access.tenant_call import CURRENT_CALL
from tokenpool.serve.media import realtime_bounds

pytestmark = pytest.mark.vllm

SECOND = base64.b64encode(bytes(32_000)).decode()
BYTES = 64_000 + realtime_bounds._ITEM_BYTES  # of its samples and their array


class Socket:
    """A client that sends events when a test says so, and keeps those that it is sent."""

    def __init__(self) -> None:
        self.app = SimpleNamespace(state=SimpleNamespace(openai_serving_realtime=SimpleNamespace()))
        self.events: asyncio.Queue[str | None] = asyncio.Queue()
        self.sent: list[dict[str, Any]] = []

    async def accept(self) -> None: ...

    async def send_text(self, text: str) -> None:
        self.sent.append(json.loads(text))

    async def receive_text(self) -> str:
        if (text := await self.events.get()) is None:
            raise WebSocketDisconnect
        return text

    def say(self, *events: Any) -> None:
        for event in events:
            self.events.put_nowait(json.dumps(event))

    @property
    def errors(self) -> list[str]:
        return [event["code"] for event in self.sent if event["type"] == "error"]


APPEND = {"type": "input_audio_buffer.append", "audio": SECOND}


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> ByteShares:
    """For six seconds, of which a connection may have three."""
    shares = ByteShares(6 * BYTES)
    monkeypatch.setattr(realtime_bounds, "WAITING", shares)
    monkeypatch.setattr(realtime_bounds, "MAX_BYTES_OF_ONE", 3 * BYTES)
    monkeypatch.setattr(api_router, "RealtimeConnection", api_router.RealtimeConnection)
    realtime_bounds.bound_realtime()
    return shares


async def settle() -> None:
    for _ in range(200):
        await asyncio.sleep(0)


def test_audio_that_nobody_hears_is_refused_and_the_socket_stays(room: ByteShares) -> None:
    """An error event says so; other events are answered still; all is given back when the client goes."""

    async def main() -> None:
        socket = Socket()
        task = asyncio.create_task(api_router.realtime_endpoint(socket))
        socket.say(*[APPEND] * 9, ["no object"], 5, {"type": "nonsense"})
        await settle()
        assert socket.errors == ["too_much_audio"] * 6 + ["invalid_event"] * 2 + ["unknown_event"]
        assert room.num_bytes == 3 * BYTES
        socket.events.put_nowait(None)
        await task
        assert room.num_bytes == 0

    asyncio.run(main())


def test_what_is_heard_makes_room(room: ByteShares) -> None:
    """A client that sends as fast as its model hears may send for ever."""

    async def main() -> None:
        socket = Socket()
        connection = api_router.RealtimeConnection(socket, SimpleNamespace())
        heard = connection.audio_stream_generator()
        for _ in range(50):
            await connection.handle_event(APPEND)
            assert len(await anext(heard)) == 16_000
        assert not socket.errors and room.num_bytes == 0

    asyncio.run(main())


def test_a_tenant_leaves_room_for_the_audio_of_others(room: ByteShares) -> None:
    """Many connections of one have half of all; another one's are heard."""
    accounts = Pool(tenant("many"), tenant("few")).book.accounts

    async def of(name: str) -> Socket:
        CURRENT_CALL.set(accounts[name].begin({"type": "websocket"}, "m", 0))
        socket = Socket()
        connection = api_router.RealtimeConnection(socket, SimpleNamespace())
        await connection.handle_event(APPEND)
        return socket

    async def main() -> None:
        many = [await asyncio.create_task(of("many")) for _ in range(5)]
        few = await asyncio.create_task(of("few"))
        assert [len(socket.errors) for socket in [*many, few]] == [0, 0, 0, 1, 1, 0]
        assert room.num_bytes == 4 * BYTES

    asyncio.run(main())


def test_small_chunks_and_ends_are_counted_too(room: ByteShares, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of one sample takes an array; ends without audio between them are one."""
    monkeypatch.setattr(realtime_bounds, "MAX_BYTES_OF_ONE", 100 * realtime_bounds._ITEM_BYTES)

    async def main() -> None:
        socket = Socket()
        connection = api_router.RealtimeConnection(socket, SimpleNamespace())
        connection._is_model_validated = True
        for _ in range(300):
            await connection.handle_event(APPEND | {"audio": base64.b64encode(bytes(2)).decode()})
            await connection.handle_event({"type": "input_audio_buffer.commit", "final": True})
            await connection.handle_event({"type": "input_audio_buffer.commit", "final": True})
        assert 90 < 300 - len(socket.errors) <= 100
        assert connection.audio_queue.qsize() <= 200
        await connection.cleanup()
        assert room.num_bytes == 0

    asyncio.run(main())


@pytest.mark.parametrize(
    "event",
    [
        {"type": "input_audio_buffer.append"},
        {"type": "input_audio_buffer.append", "audio": 5},
        {"type": "input_audio_buffer.append", "audio": ["a"] * 1000},
        {"type": "input_audio_buffer.commit", "final": {}},
        {"type": "session.update", "model": ["a"]},
        {"type": ["session.update"]},
        {},
    ],
)
def test_an_event_with_a_wrong_field_is_an_error_event(event: Any, caplog: pytest.LogCaptureFixture) -> None:
    """And no stack in the log, which one client could fill."""

    async def main() -> None:
        socket = Socket()
        task = asyncio.create_task(api_router.realtime_endpoint(socket))
        socket.say(event)
        await settle()
        assert len(socket.errors) == 1
        socket.events.put_nowait(None)
        await task

    logging.getLogger("vllm").propagate = True
    asyncio.run(main())
    assert not [record for record in caplog.records if record.exc_info]
