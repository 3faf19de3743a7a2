# SPDX-License-Identifier: Apache-2.0
"""Plays scripts of raw bytes against a port and counts what comes back. Trusts no HTTP client to send what is wrong.

A script is one connection: bytes with pauses between them, then it waits for answers, or leaves after a while. Whatever
the server writes is read as HTTP/1.1 answers, or as websocket frames behind a 101.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import Any

LIMIT_S = 90.0
"""How long a script waits for its answers."""
_AFTER_S = 0.3  # for answers to what a parser may have taken for one more request
_REFUSAL = b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_REFUSAL_LIMIT_S = 10.0
_MOST_KEPT = 60
_MOST_TEXT = 1500
_LEAST_TOLD_S = 1.0
_INNER_ERROR = re.compile(rb'"code":\s*5\d\d')


@dataclass(frozen=True, slots=True)
class Script:
    """One connection of somebody who means ill; see the module."""

    kind: str
    parts: Sequence[tuple[float, bytes]]
    """Seconds to wait, and what is sent then."""
    keyed: int = 0
    """How many of its answers, from the first one on, a right key was sent for."""
    is_open: bool = False
    """Whether it asks for a probe or is a preflight, which need no key."""
    num_answers: int = 1
    """After so many it ends."""
    leaves_after_s: float | None = None
    """It ends so long after all is sent, with answers or without; None = it waits for its answers."""
    reads: bool = True
    """Whether it reads what comes."""
    has_body: bool = True
    """Whether its answers have bodies: those to HEAD have none."""


@dataclass(slots=True)
class Answer:
    """One answer: its status, how many bytes its body has and the beginning of it."""

    status: int
    headers: dict[str, str]
    num_bytes: int = 0
    text: bytes = b""
    has_inner_error: bool = False
    """Whether a body of events tells of an error of the server."""

    @property
    def is_error(self) -> bool:
        """Whether the server failed: a 5xx, in the status or in a stream, that is no refusal.

        503 and 529 with Retry-After refuse for overload; 501 says that the model cannot do it, as vLLM's own answer.
        """
        if self.status in (503, 529) and "retry-after" in self.headers:
            return False
        return (self.status >= 500 and self.status != 501) or self.has_inner_error


@dataclass(slots=True)
class Tally:
    """What a number of scripts got."""

    num_sent: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    """By kind and status; also `closed`, without an answer, `left`, which did not wait for one, and `unanswered`."""
    keyless_bytes: int = 0
    errors: int = 0
    unanswered: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """The longest wait for an answer, by kind."""
    noted: list[dict[str, Any]] = field(default_factory=list)
    """The first errors, bytes without a key and scripts without an answer, with what was sent."""

    def add(self, other: Tally) -> None:
        """Count those of `other` too."""
        self.num_sent += other.num_sent
        self.answers += other.answers
        self.keyless_bytes += other.keyless_bytes
        self.errors += other.errors
        self.unanswered += other.unanswered
        for kind, seconds in other.seconds.items():
            self.seconds[kind] = max(seconds, self.seconds.get(kind, 0.0))
        self.noted = (self.noted + other.noted)[:_MOST_KEPT]

    def by_class(self) -> dict[str, int]:
        """Answers by the class of their status, and what was no answer."""
        found: Counter[str] = Counter()
        for name, count in self.answers.items():
            last = name.rpartition(" ")[2]
            found[f"{last[0]}xx" if last.isdigit() else last] += count
        return dict(sorted(found.items()))

    def note(self, script: Script, why: str, answer: Answer | None = None) -> None:
        """Keep what was sent and what came, for whoever looks for the cause."""
        sent = b"".join(part for _, part in script.parts)
        told = "" if answer is None else answer.text[:_MOST_TEXT].decode("latin-1")
        if len(self.noted) < _MOST_KEPT:
            text = sent[:_MOST_TEXT].decode("latin-1")
            self.noted.append({"kind": script.kind, "why": why, "bytes": len(sent), "sent": text, "got": told})


def play_all(port: int, scripts: Iterable[Script], per_s: float, most_open: int) -> Tally:
    """Begin a script every 1 / `per_s` seconds, with at most `most_open` at a time, and wait for all."""

    async def play() -> Tally:
        tally, places, tasks = Tally(), asyncio.Semaphore(most_open), set()
        begun_s = time.monotonic()
        for number, script in enumerate(scripts):
            await asyncio.sleep(max(0.0, begun_s + number / per_s - time.monotonic()))
            await places.acquire()
            task = asyncio.create_task(_play(port, script, tally))
            tasks.add(task)
            task.add_done_callback(lambda done: (places.release(), tasks.discard(done)))
        if tasks:
            await asyncio.gather(*tasks)
        return tally

    return asyncio.run(play())


def serve_refusals(told: Connection) -> None:
    """Serve a port, whose number is sent to `told`, that refuses all that comes, as cheaply as can be; never returns.

    Against it the scripts cost what they cost by themselves.
    """

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_REFUSAL_LIMIT_S):
                tail = b""
                while b"\r\n\r\n" not in tail and (piece := await reader.read(1 << 16)):
                    tail = tail[-3:] + piece
                writer.write(_REFUSAL)
                while await reader.read(1 << 16):  # a close before the end of the body would take the answer with it
                    pass
        writer.transport.abort()

    async def serve() -> None:
        server = await asyncio.start_server(refuse, "127.0.0.1", 0)
        told.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


async def _play(port: int, script: Script, tally: Tally) -> None:
    tally.num_sent += 1
    begun_s = time.monotonic()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    except OSError as error:
        tally.answers[f"{script.kind} {type(error).__name__}"] += 1
        tally.note(script, f"no connection: {error}")
        return
    sending = asyncio.create_task(_send(writer, script.parts))
    reading = asyncio.create_task(_take_answers(reader, script, tally))
    try:
        if script.leaves_after_s is None:
            await reading
        else:
            await asyncio.wait([sending, reading], return_when=asyncio.FIRST_COMPLETED, timeout=LIMIT_S)
            if not reading.done():
                await asyncio.wait([reading], timeout=script.leaves_after_s)
    finally:
        sending.cancel()
        reading.cancel()
        await asyncio.gather(sending, reading, return_exceptions=True)
        writer.transport.abort()
        seconds = time.monotonic() - begun_s
        tally.seconds[script.kind] = max(seconds, tally.seconds.get(script.kind, 0.0))


async def _send(writer: asyncio.StreamWriter, parts: Sequence[tuple[float, bytes]]) -> None:
    with contextlib.suppress(OSError):  # the server has closed: what it said is read
        for pause_s, part in parts:
            if pause_s:
                await asyncio.sleep(pause_s)
            writer.write(part)
            await writer.drain()


async def _take_answers(reader: asyncio.StreamReader, script: Script, tally: Tally) -> None:
    if not script.reads:
        tally.answers[f"{script.kind} left"] += 1
        await asyncio.sleep(LIMIT_S)
    num, answer = 0, None
    while answer is None or not _is_last(script, answer, num):
        answer, is_done = None, num >= script.num_answers
        try:
            async with asyncio.timeout(_AFTER_S if is_done else LIMIT_S):
                answer = await read_head(reader)
                await read_body(reader, answer, script.has_body)
        except TimeoutError:
            if not is_done:
                tally.unanswered += 1
                tally.answers[f"{script.kind} unanswered"] += 1
                tally.note(script, "no answer" if answer is None else "no end of the answer", answer)
            break
        except (OSError, EOFError, ValueError):  # closed, or nothing that can be read
            if answer is None:
                tally.answers[f"{script.kind} closed"] += not num
                break
        except asyncio.CancelledError:  # it leaves
            tally.answers[f"{script.kind} left"] += answer is None and not num
            raise
        finally:
            num += 1
            if answer is not None:
                _count(script, answer, num, tally)


def _is_last(script: Script, answer: Answer, num: int) -> bool:
    return answer.headers.get("connection") == "close" or num == script.num_answers == 1


def _count(script: Script, answer: Answer, num: int, tally: Tally) -> None:
    tally.answers[f"{script.kind} {answer.status}"] += 1
    is_served = 200 <= answer.status < 300 or answer.status == 101
    if is_served and num > script.keyed and not script.is_open and answer.num_bytes:
        tally.keyless_bytes += answer.num_bytes
        tally.note(script, f"{answer.num_bytes} bytes without a key", answer)
    if answer.is_error:
        tally.errors += 1
        tally.note(script, f"status {answer.status}", answer)


async def read_head(reader: asyncio.StreamReader) -> Answer:
    """Read the next head; raises EOFError or OSError when the connection ends, ValueError for what is no answer."""
    try:
        while True:
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            if not first.startswith("HTTP/1."):
                raise ValueError(f"no answer: {first[:80]!r}")
            status = int(first.split(" ")[1])
            if status >= 200 or status == 101:
                pairs = (line.partition(":") for line in lines if line)
                return Answer(status, {name.strip().lower(): value.strip().lower() for name, _, value in pairs})
    except asyncio.LimitOverrunError as error:
        raise ValueError(str(error)) from error


async def read_body(reader: asyncio.StreamReader, answer: Answer, has_body: bool = True) -> None:
    """Read what follows a head into `answer`; raises as `read_head` does, when a part of it has been counted."""
    try:
        if answer.status == 101:
            await _read_frames(reader, answer)
        elif has_body and answer.status not in (204, 304):
            await _read_content(reader, answer)
    except asyncio.IncompleteReadError as error:
        _take(answer, error.partial)
        raise


def _take(answer: Answer, piece: bytes) -> None:
    answer.num_bytes += len(piece)
    answer.text += piece[: _MOST_TEXT - len(answer.text)]
    is_stream = answer.headers.get("content-type", "").startswith("text/event-stream")
    answer.has_inner_error |= is_stream and _INNER_ERROR.search(piece) is not None


async def _read_content(reader: asyncio.StreamReader, answer: Answer) -> None:
    if answer.headers.get("transfer-encoding") == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            _take(answer, await reader.readexactly(size))
            await reader.readexactly(2)
        await reader.readuntil(b"\r\n")
    elif "content-length" in answer.headers:
        _take(answer, await reader.readexactly(int(answer.headers["content-length"])))
    else:
        while piece := await reader.read(1 << 16):
            _take(answer, piece)


async def _read_frames(reader: asyncio.StreamReader, answer: Answer) -> None:
    """Count what text and binary frames carry, until the server closes."""
    while True:
        first, size = await reader.readexactly(2)
        size &= 127
        if size > 125:
            size = int.from_bytes(await reader.readexactly(2 if size == 126 else 8))
        piece = await reader.readexactly(size)
        if first & 15 in (0, 1, 2):
            _take(answer, piece)
        elif first & 15 == 8:
            return


def as_values(tally: Tally) -> dict[str, Any]:
    """The tally as a mapping for JSON, with its counters in order."""
    return asdict(tally) | {"answers": dict(sorted(tally.answers.items())), "seconds": _longest(tally.seconds)}


def _longest(seconds: dict[str, float]) -> dict[str, float]:
    longest = sorted(seconds.items(), key=lambda item: -item[1])
    return {kind: round(value, 2) for kind, value in longest if value > _LEAST_TOLD_S}
