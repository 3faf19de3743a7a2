# SPDX-License-Identifier: Apache-2.0
"""The bench of hostile requests sends what it says, and counts what comes back as it says."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
from typing import Any

import pytest

from bench.parts.hostile_bodies import GREEDY, ODD
from bench.parts.hostile_inputs import ALL, KINDS, Keys, make_scripts
from bench.parts.hostile_wire import Answer, Script, Tally, as_values, play_all, serve_refusals

pytestmark = pytest.mark.cpu

KEYS = Keys(
    odd="odd-key-0123456789", greedy="greedy-key-0123456789", view="view-key-012345", metrics="metrics-key-0123"
)
GET = b"GET / HTTP/1.1\r\n\r\n"


@pytest.fixture(scope="module")
def scripts() -> list[Script]:
    return list(make_scripts(1, range(1500), KEYS))


def test_each_kind_comes_and_is_a_script(scripts):
    """Every kind is drawn, ODD and GREEDY bodies with a key, and each script sends bytes and ends some time."""
    assert set(KINDS) == {script.kind for script in scripts}
    for script in scripts:
        assert all(pause_s >= 0 and isinstance(part, bytes) for pause_s, part in script.parts)
        assert b"".join(part for _, part in script.parts) or script.kind == "halves"
        assert sum(pause_s for pause_s, _ in script.parts) < 30, "a sender that is slow, not one that has stopped"
        assert script.reads or script.leaves_after_s is not None
        if script.kind in (*ODD, *GREEDY):
            assert script.keyed == ALL


def test_a_seed_names_the_scripts_whatever_else_is_sent(scripts):
    """The same seed and number give the same script; another seed gives others."""
    assert scripts[700:750] == list(make_scripts(1, range(700, 750), KEYS))
    assert scripts[:50] != list(make_scripts(2, range(50), KEYS))


def test_what_counts_as_without_a_key_has_none(scripts):
    """No script all of whose answers count as without a key carries a key of a tenant for a tenant's route."""
    for script in scripts:
        if script.kind in ("keyless", "paths", "lines", "garbage"):
            sent = b"".join(part for _, part in script.parts)
            assert b"\nAuthorization: Bearer odd-key-0123456789\r\n" not in sent
            assert b"\nx-api-key: odd-key-0123456789\r\n" not in sent
            assert not script.keyed


def test_the_sink_refuses_whatever_comes(scripts):
    """It answers each script that waits for an answer with 400, and stays."""
    spawn = multiprocessing.get_context("spawn")
    told, tells = spawn.Pipe(duplex=False)
    process = spawn.Process(target=serve_refusals, args=(tells,), daemon=True)
    process.start()
    try:
        port = told.recv()
        sent = [script for script in scripts[:200] if script.num_answers == 1 and script.kind in (*ODD, *GREEDY)]
        tally = play_all(port, sent, 200.0, 64)
        assert process.is_alive()
    finally:
        process.kill()
    assert (tally.num_sent, tally.unanswered, tally.errors) == (len(sent), 0, 0)
    waiting = sum(script.leaves_after_s is None for script in sent)
    assert waiting
    assert tally.by_class()["4xx"] >= waiting


def answer(status: int, body: bytes = b"", **headers: str) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} X\r\n{lines}content-length: {len(body)}\r\n\r\n".encode() + body


def chunked(*pieces: bytes, kind: str = "text/event-stream") -> bytes:
    head = f"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-type: {kind}\r\n\r\n".encode()
    return head + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def play(said: bytes, stay: bool = False, **script: Any) -> Tally:
    """Play one script against a server that says `said` to whatever comes, and closes unless it shall `stay`."""

    async def main() -> Tally:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            writer.write(said)
            if stay:
                await reader.read()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        made = Script("k", [(0, GET)], **script)
        async with server:
            return await asyncio.to_thread(play_all, port, [made], 1e9, 1)

    return asyncio.run(asyncio.wait_for(main(), 60))


WEBSOCKET = b"HTTP/1.1 101 X\r\nupgrade: websocket\r\n\r\n\x81\x05hello\x88\x00"


@pytest.mark.parametrize(
    ("said", "script", "num_bytes"),
    [
        (answer(200, b"names"), {}, 5),
        (answer(200, b"names"), {"keyed": 1}, 0),
        (answer(200, b"names"), {"is_open": True}, 0),
        (answer(401, b"no"), {}, 0),
        (answer(200, b"mine") + answer(200, b"another's"), {"keyed": 1, "num_answers": 2}, 9),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + answer(200, b"names"), {}, 5),
        (answer(200, b"names")[:-2], {}, 3),
        (chunked(b"abc", b"de"), {}, 5),
        (b"HTTP/1.0 200 OK\r\n\r\nto the end", {}, 10),
        (WEBSOCKET, {}, 5),
        (WEBSOCKET, {"keyed": ALL}, 0),
    ],
)
def test_bytes_without_a_key_are_counted(said, script, num_bytes):
    """All that a 2xx or a websocket carries beyond the answers that a key was sent for, also if it breaks off."""
    assert num_bytes == play(said, **script).keyless_bytes


@pytest.mark.parametrize(
    ("said", "errors"),
    [
        (answer(500), 1),
        (answer(503), 1),
        (answer(503, retry_after="2"), 0),
        (answer(529, retry_after="2"), 0),
        (answer(501), 0),
        (answer(429), 0),
        (chunked(b"data: {}\n\n", b'data: {"error": {"code": 500}}\n\n'), 1),
        (chunked(b'{"code": 500}', kind="text/plain"), 0),
    ],
)
def test_errors_of_the_server_are_told_from_refusals(said, errors):
    """A 5xx counts, in the status or in a stream, unless it refuses for overload or says what a model cannot do."""
    assert errors == play(said, keyed=ALL).errors


def test_an_end_without_an_answer_is_told_from_leaving():
    """The server's closing and the script's own are named apart, and neither is unanswered."""
    closed, left = play(b""), play(b"", stay=True, leaves_after_s=0.01)
    assert ({"k closed": 1}, {"k left": 1}) == (dict(closed.answers), dict(left.answers))
    assert not closed.unanswered and not left.unanswered


def test_what_never_ends_is_unanswered(monkeypatch: pytest.MonkeyPatch):
    """A script that waits for an answer, or for the rest of one, gives up and is counted."""
    monkeypatch.setattr("bench.parts.hostile_wire.LIMIT_S", 0.1)
    for said in (b"", answer(200, b"abc")[:-1]):
        assert 1 == play(said, stay=True, keyed=ALL).unanswered


def test_tallies_add_up_and_are_json():
    """Counters are summed, the longest wait of each kind is kept, classes of statuses are told."""
    first, second = Tally(1, seconds={"k": 3.0}), play(answer(404), keyed=ALL)
    second.note(Script("k", [(0, b"\xff")]), "why", Answer(500, {}))
    first.add(second)
    assert (2, {"4xx": 1}, 3.0) == (first.num_sent, first.by_class(), first.seconds["k"])
    assert {"k 404": 1} == json.loads(json.dumps(as_values(first)))["answers"]
