# SPDX-License-Identifier: Apache-2.0
"""What a connection may send before it is answered is bounded in size and time, with either parser of HTTP."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from tokenpool.serve.http.http_limits import HEAD_BYTES, HEAD_LINES, SILENCE_S, BoundedH11
from tokenpool.serve.http.http_protocol import http_protocol

pytestmark = pytest.mark.cpu

WAIT_S = 20.0
GET = b"GET / HTTP/1.1\r\nhost: x\r\n"
POST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n"
UPGRADE = (
    b"GET /ws HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


class App:
    """An app that answers with the size of a body, slowly if it is asked to."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.has_lost_client = asyncio.Event()
        self.may_end = asyncio.Event()
        routes = [Route("/", self.answer, methods=["GET", "POST"]), Route("/slow", self.slow)]
        self.asgi = Starlette(routes=[*routes, Route("/early", self.early, methods=["POST"]),
                                      WebSocketRoute("/ws", self.socket)])  # fmt: skip

    async def answer(self, request: Request) -> PlainTextResponse:
        self.num_calls += 1
        try:
            return PlainTextResponse(f"{len(await request.body())} bytes")
        except ClientDisconnect:
            self.has_lost_client.set()
            raise

    async def early(self, request: Request) -> PlainTextResponse:
        return PlainTextResponse("without the body")

    async def slow(self, request: Request) -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            yield "first"
            await self.may_end.wait()
            yield "last"

        return StreamingResponse(parts())

    async def socket(self, websocket: WebSocket) -> None:
        await websocket.accept()
        await self.may_end.wait()
        await websocket.send_text("last")
        await websocket.close()


class Connection:
    """A client that sends bytes as they are."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def until(self, part: bytes) -> bytes:
        return await asyncio.wait_for(self.reader.readuntil(part), WAIT_S)

    async def rest(self) -> bytes:
        """All until the server closes the connection."""
        try:
            return await asyncio.wait_for(self.reader.read(), WAIT_S)
        except ConnectionResetError:  # it had not read all
            return b""


@pytest.fixture(params=["h11", "auto"])
def serve(request) -> Callable[..., Any]:
    """Runs a test's coroutine against a server with the parser, which waits for `silence_s` at most."""
    protocol: Any = BoundedH11 if request.param == "h11" else http_protocol()

    def run(test: Callable[[App, Callable[[], Any]], Coroutine[Any, Any, None]], silence_s: float = 60.0) -> None:
        kind = type("Quick", (protocol,), {"silence_s": silence_s})
        asyncio.run(_serve(kind, test))

    return run


@asynccontextmanager
async def _running(server: uvicorn.Server, sock: socket.socket) -> AsyncIterator[None]:
    task = asyncio.create_task(server._serve([sock]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield
    finally:
        server.should_exit = server.force_exit = True
        await task


async def _serve(protocol: Any, test: Any) -> None:
    app = App()
    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app.asgi, http=protocol, lifespan="off", log_level="critical"))

    async def connect() -> Connection:
        return Connection(*await asyncio.open_connection(*sock.getsockname()))

    async with _running(server, sock):
        await test(app, connect)
        app.may_end.set()


def test_usual_requests_are_answered(serve):
    """One after the other on a connection, with a body, with headers of half the limit."""

    async def test(app: App, connect: Any) -> None:
        client = await connect()
        for data in (GET + b"\r\n", POST + b"0123456789", GET + b"a: " + b"b" * (HEAD_BYTES // 2) + b"\r\n\r\n"):
            await client.send(data)
            assert b"200 OK" in await client.until(b" bytes")
        assert 3 == app.num_calls

    serve(test)


@pytest.mark.parametrize(
    "head",
    [
        GET + b"a: " + b"b" * HEAD_BYTES + b"\r\n\r\n",
        GET + b"a: b\r\n" * (HEAD_LINES + 1) + b"\r\n",
        GET + (b"a: " + b"b" * 1000 + b"\r\n") * 70 + b"\r\n",
        b"GET /" + b"x" * HEAD_BYTES + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
    ids=["value", "lines", "bytes", "url"],
)
def test_a_head_that_is_too_large_is_refused(serve, head):
    """431, and the connection is closed, when the head comes whole at once; no app sees it."""

    async def test(app: App, connect: Any) -> None:
        client = await connect()
        await client.send(head)
        assert b"HTTP/1.1 431 " in await client.rest()
        assert 0 == app.num_calls

    serve(test)


@pytest.mark.parametrize("piece", [b"a: b\r\n", b"b"], ids=["lines", "one value"])
@pytest.mark.parametrize("head", [GET + b"a: ", POST + b"0123456789" + GET], ids=["first", "second"])
def test_a_head_without_end_is_cut_off(serve, head, piece):
    """Endless headers end, the first request's and a later one's: the server closes while the client still sends."""

    async def test(app: App, connect: Any) -> None:
        client = await connect()
        await client.send(head)
        sent = 0
        with pytest.raises(ConnectionError):
            while sent < 100 * HEAD_BYTES:
                await client.send(piece * 1000)
                sent += 1000 * len(piece)
                await asyncio.sleep(0)
        assert app.num_calls <= 1

    serve(test)


def test_trailers_without_end_are_cut_off(serve):
    """What a parser keeps behind a body counts as well, when the answer is long there."""

    async def test(app: App, connect: Any) -> None:
        client = await connect()
        await client.send(b"POST /early HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\na: ")
        with pytest.raises(ConnectionError):
            for _ in range(10_000):
                await client.send(b"b" * 1000)
                await asyncio.sleep(0)

    serve(test)


@pytest.mark.parametrize("sent", [b"", b"GET / HT", GET, POST + b"0123", POST + b"0123456789" + GET])
def test_half_a_request_ends(serve, sent):
    """A connection without a whole head, or with a body that does not go on, is closed; the app hears of it."""

    async def test(app: App, connect: Any) -> None:
        client = await connect()
        await client.send(sent)
        assert b"HTTP/1.1 408 " in await client.rest()
        if sent.endswith(b"0123"):
            await asyncio.wait_for(app.has_lost_client.wait(), WAIT_S)

    serve(test, silence_s=0.2)


def test_a_websocket_is_left_alone(serve):
    """The bounds are those of HTTP: an open websocket may be silent."""

    async def test(app: App, connect: Any) -> None:
        client = await connect()
        await client.send(UPGRADE)
        assert b"101 Switching" in await client.until(b"\r\n\r\n")
        await asyncio.sleep(0.5)
        app.may_end.set()
        await client.until(b"last")

    serve(test, silence_s=0.1)


class Clock:
    """The running event loop with a time that the test sets."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._timers: list[tuple[float, asyncio.TimerHandle]] = []
        self._now_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def time(self) -> float:
        return self._now_s

    def call_at(self, when_s: float, callback: Any) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when_s, callback, (), self._loop)
        self._timers.append((when_s, timer))
        return timer

    def call_later(self, delay_s: float, callback: Any) -> asyncio.TimerHandle:
        return self.call_at(self._now_s + delay_s, callback)

    def advance(self, seconds: float) -> None:
        """Let time pass, second by second."""
        for _ in range(int(seconds)):
            self._now_s += 1.0
            due = [timer for when_s, timer in self._timers if when_s <= self._now_s and not timer.cancelled()]
            self._timers = [(when_s, timer) for when_s, timer in self._timers if when_s > self._now_s]
            for timer in due:
                timer._run()


class Wire(asyncio.Transport):
    """The server's end of a connection."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.is_closed = b"", False

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


@pytest.fixture(params=["h11", "auto"])
def play(request) -> Callable[..., Any]:
    """Runs a test's coroutine against a connection without a network, whose time the test sets."""

    def run(test: Callable[..., Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            app, clock, wire = App(), Clock(), Wire()
            config = uvicorn.Config(app.asgi, lifespan="off", log_level="critical")
            kind: Any = BoundedH11 if request.param == "h11" else http_protocol()
            protocol = kind(config, uvicorn.server.ServerState(), {}, _loop=clock)
            protocol.connection_made(wire)
            await test(app, protocol.data_received, clock, wire)
            app.may_end.set()
            await settle()
            protocol.connection_lost(None)
            await settle()

        asyncio.run(main())

    return run


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


def test_a_head_that_drips_ends(play):
    """Bytes do not lengthen the time for a head, from when it began."""

    async def test(app: App, send: Any, clock: Clock, wire: Wire) -> None:
        send(GET)
        for _ in range(int(SILENCE_S) - 1):
            clock.advance(1)
            send(b"a: b\r\n")
        assert not wire.is_closed
        clock.advance(1)
        assert wire.written.startswith(b"HTTP/1.1 408 ") and wire.is_closed
        assert 0 == app.num_calls

    play(test)


def test_a_body_that_drips_goes_on(play):
    """Each byte of a body gives it time: slow clients finish."""

    async def test(app: App, send: Any, clock: Clock, wire: Wire) -> None:
        send(POST)
        for _ in range(10):
            clock.advance(SILENCE_S - 1)
            send(b"x")
        await settle()
        assert wire.written.endswith(b"10 bytes")

    play(test)


@pytest.mark.parametrize("behind", [b"", GET], ids=["alone", "with half of the next request"])
def test_an_answer_may_take_its_time(play, behind):
    """A client that waits for an answer is not silent; half a request behind it has its time after it."""

    async def test(app: App, send: Any, clock: Clock, wire: Wire) -> None:
        send(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n" + behind)
        await settle()
        clock.advance(100 * SILENCE_S)
        assert b"first" in wire.written and not wire.is_closed
        app.may_end.set()
        await settle()
        assert b"last" in wire.written
        clock.advance(2 * SILENCE_S)
        assert wire.is_closed

    play(test)


def test_an_idle_connection_has_uvicorns_limit(play):
    """Between two requests uvicorn's keep-alive time holds; bytes that are no request do not lengthen it for ever."""

    async def test(app: App, send: Any, clock: Clock, wire: Wire) -> None:
        for _ in range(20):
            send(GET + b"\r\n")
            await settle()
            clock.advance(4)  # uvicorn closes after 5
        assert 20 == app.num_calls and not wire.is_closed
        for _ in range(int(SILENCE_S) + 2):
            if not wire.is_closed:
                send(b"\r\n")
                clock.advance(1)
        assert wire.is_closed

    play(test)


@pytest.mark.parametrize("sent", [POST, b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"])
def test_a_body_that_nobody_reads_is_not_silence(play, sent):
    """While the server does not read, the client cannot send."""

    async def test(app: App, send: Any, clock: Clock, wire: Wire) -> None:
        send(b"POST /slow" + sent[6:])
        send(b"186a0\r\n" + b"x" * 100_000 if b"chunked" in sent else b"0123456789" + GET)
        clock.advance(10 * SILENCE_S)
        assert not wire.is_closed

    play(test)
