# SPDX-License-Identifier: Apache-2.0
"""What a client sends over a websocket is looked at before an app parses it, and takes turns with others."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.serve.gateway.test_router import make_scope, serve_raw
from tokenpool.serve.http.request_body import MAX_DEPTH
from tokenpool.serve.http.websocket_frames import WatchedSocket

pytestmark = pytest.mark.cpu

DEEP = "[" * (MAX_DEPTH + 1)
COMMAS = "[" + "1," * 1_000_000 + "1]"
GONE = {"type": "websocket.disconnect", "code": 1005}


class Client:
    """Sends messages, all of which have come already, and keeps what it is sent."""

    def __init__(self, *messages: dict[str, Any]) -> None:
        self.messages = [{"type": "websocket.connect"}, *messages, GONE]
        self.sent: list[Any] = []

    async def receive(self) -> dict[str, Any]:
        return self.messages.pop(0)

    async def send(self, message: Any) -> None:
        self.sent.append(message)


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Accepts, and says how long each frame was, until it hears that the client has gone."""
    while (message := await receive())["type"] != "websocket.disconnect":
        if message["type"] == "websocket.connect":
            await send({"type": "websocket.accept"})
        else:
            await send({"type": "websocket.send", "text": str(len(message.get("text") or message["bytes"]))})
    await send({"type": "websocket.send", "text": f"bye {message['code']}"})


def talk(*messages: dict[str, Any]) -> list[Any]:
    """What a client of a pool's model is sent."""
    router, _ = serve_raw(echo)
    client = Client(*messages)
    scope = make_scope("/v1/realtime", type="websocket")
    scope.pop("method")
    asyncio.run(router(scope, client.receive, client.send))
    return client.sent


def text(frame: str) -> dict[str, Any]:
    return {"type": "websocket.receive", "text": frame}


@pytest.mark.parametrize("frame", [text(DEEP), {"type": "websocket.receive", "bytes": DEEP.encode()}, text(COMMAS)])
def test_a_frame_that_costs_too_much_closes_the_socket(frame):
    """1008 with what is wrong; the app does not see it, nor what comes after it, and what it says then is dropped."""
    accepted, first, closed = talk(text("one"), frame, text("never"))
    assert (accepted["type"], first["text"]) == ("websocket.accept", "3")
    assert ("websocket.close", 1008) == (closed["type"], closed["code"]) and "JSON" in closed["reason"]
    assert len(closed["reason"].encode()) <= 123


def test_other_frames_reach_the_app_as_they_were():
    """Text and bytes, empty ones and lone surrogates too; nothing is sent to a client that has gone."""
    frames = [text("{}"), text(""), text("\ud800"), {"type": "websocket.receive", "bytes": b"1234"}]
    frames += [{"type": "websocket.receive", "bytes": None, "text": "12345"}]
    sent = talk(*frames[:1], *frames[2:])
    assert ["2", "1", "4", "5"] == [message["text"] for message in sent[1:]]


def test_others_have_a_turn_between_frames_that_are_there():
    """A task that only wants to run once is done before all of a hundred frames are taken."""

    async def main() -> None:
        client, taken = Client(*(text("{}") for _ in range(100))), 0
        socket, other = WatchedSocket(client.receive, client.send), asyncio.create_task(asyncio.sleep(0))
        await socket.receive()
        while not other.done():
            assert (await socket.receive())["type"] == "websocket.receive"
            taken += 1
        assert taken < 10

    asyncio.run(main())


def test_a_frame_of_bytes_has_a_text_too() -> None:
    """Apps that read texts would fail with a stack at a frame that has none."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        seen = [await receive() for _ in range(4)]
        await send({"type": "websocket.send", "text": repr([message["text"] for message in seen[1:]])})

    socket = [{"type": "websocket.receive", "bytes": frame} for frame in (b"{}", b"\xff\xfe", b"")]
    router, _ = serve_raw(app)
    client = Client(*socket)
    scope = make_scope("/v1/realtime", type="websocket")
    scope.pop("method")
    asyncio.run(router(scope, client.receive, client.send))
    assert repr(["{}", "\ufffd\ufffd", ""]) == client.sent[-1]["text"]
