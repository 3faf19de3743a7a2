# SPDX-License-Identifier: Apache-2.0
"""The bench of faults counts what it says."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import socket
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from bench import chaos
from bench.faults.asking import Asker
from bench.faults.bed import client_ports
from bench.faults.streams import Stream, Verdict, judge
from bench.parts import common

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]
RIGHT = [7, 8, 9, 10]


def stream(*tokens: int, problem: str = "", server: int = 0, port: int = 1) -> Stream:
    return Stream("m", (1, 2), len(RIGHT), server, list(tokens), [0.0] * len(tokens), problem, port)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (stream(*RIGHT), Verdict(0, 0, 0, 0, [])),
        (stream(7, 8, problem="reset", server=1), Verdict(1, 0, 0, 0, [])),
        (stream(7, 9, problem="reset", server=1), Verdict(1, 0, 1, 0, ["m, prompt 1 2 ...: token 1 is 9, not 8"])),
        (stream(7, 8, problem="reset", server=1, port=2), Verdict(0, 1, 0, 0, ["reset"])),
        (stream(7, 8, problem="status 503"), Verdict(0, 1, 0, 0, ["status 503"])),
        (stream(7, 8, 9, server=1), Verdict(0, 1, 0, 0, ["too few tokens"])),
        (stream(7, 8, 9, 11), Verdict(0, 0, 1, 0, ["m, prompt 1 2 ...: token 3 is 11, not 10"])),
        (stream(7, 8, 8, 9, 10), Verdict(0, 0, 1, 1, ["m, prompt 1 2 ...: token 2 is 8, not 9"])),
        (stream(*RIGHT, 10), Verdict(0, 0, 0, 1, [])),
    ],
)
def test_what_is_lost_wrong_doubled_or_broken_is_counted(given: Stream, found: Verdict) -> None:
    """A stream breaks only with a connection to what was killed; what came before is compared too."""
    hit = chaos.Hit("a frontend", server=1, ports=frozenset({1}))
    assert judge([stream(*RIGHT), given], {given.key: RIGHT}, hit.is_dead) == found


@pytest.mark.parametrize(
    ("status", "chunks", "problem"),
    [
        (200, [{"choices": [{"token_ids": RIGHT}]}, {"choices": [{"token_ids": None}]}, {"choices": []}], ""),
        (200, [{"choices": [{"token_ids": RIGHT}]}, {"error": "it fell"}, {"choices": []}], "it fell"),
        (503, [{"choices": [{"token_ids": RIGHT}]}], "status 503"),
    ],
)
def test_what_a_server_says_instead_of_tokens_is_kept(status: int, chunks: list[dict[str, Any]], problem: str) -> None:
    """Also when more follows it."""

    async def answer(request: web.Request) -> web.Response:
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        return web.Response(text="".join([*lines, "data: [DONE]\n\n"]), status=status)

    async def ask(given: Stream) -> None:
        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        async with TestServer(app) as server, aiohttp.ClientSession() as session:
            await given.run(session, str(server.make_url("")).rstrip("/"))

    given = stream()
    asyncio.run(ask(given))
    assert given.problem.startswith(problem) and bool(given.problem) == bool(problem)
    assert given.tokens == (RIGHT if status == 200 else [])


ANSWERS = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Answer(BaseHTTPRequestHandler):
    def do_POST(self):
        model = json.loads(self.rfile.read(int(self.headers["content-length"])))["model"]
        if model != "cut":
            self.send_response(503 if model == "refused" else 200)
            self.end_headers()
            self.wfile.write(b"{" if model == "half" else b'{"why": "no host"}')

HTTPServer(("127.0.0.1", int(sys.argv[-1])), Answer).serve_forever()
"""
"""A server by whose models it depends what a request is answered."""


def test_what_comes_instead_of_a_new_request_s_token_is_kept(tmp_path: Path) -> None:
    """Status and body, or why there is none; an answer is no refusal."""
    server = common.Server(("-c", ANSWERS), ["answered", "cut", "half", "refused"], tmp_path / "server.log")

    async def ask() -> Asker:
        asker = Asker(server)
        asking = asyncio.create_task(asker.run())
        while asker.asked < 4 or len(asker.refusals) < 3:
            assert not asking.done()
            await asyncio.sleep(0.01)
        asking.cancel()
        return asker

    def listens() -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", server.port)) == 0

    try:
        while not listens():
            assert server.process.poll() is None, server.log.read_text()
        asker = asyncio.run(ask())
    finally:
        server.close()
    told = [refusal.partition(f", port {server.port}, ")[2] for refusal in asker.refusals]
    assert told[0].startswith("cut: RemoteDisconnected: ")
    assert told[1].startswith("half: JSONDecodeError: ")
    assert told[2] == 'refused: status 503: {"why": "no host"}'
    assert not [refusal for refusal in told if refusal.startswith("answered")]


def test_each_kind_has_its_round_in_an_order_by_the_seed() -> None:
    first, again, other = (chaos.order_of(chaos.KINDS, 2 * len(chaos.KINDS) + 3, random.Random(s)) for s in (1, 1, 2))
    assert first == again != other
    assert sorted(first[: len(chaos.KINDS)]) == sorted(chaos.KINDS)
    assert {first.count(kind) for kind in chaos.KINDS} == {2, 3}


def test_each_kind_stands_in_the_table_of_what_dies_and_in_the_last_run() -> None:
    """docs/failure.md says what follows; bench/results/chaos_cpu.json had each, in which nothing was left out."""
    table = [line for line in (ROOT / "docs/failure.md").read_text().splitlines() if line.startswith("| ")]
    named = [kind for line in table for part in line.split("chaos ")[1:] for kind in re.findall(r"`(\w+)`", part)]
    assert sorted(named) == sorted(chaos.KINDS)
    values = json.loads((ROOT / "bench/results/chaos_cpu.json").read_text())["values"]
    assert {run["kind"] for run in values["rounds"]} == set(chaos.KINDS) and values["left_out"] == {}
    killed = {run["kind"] for run in values["rounds"] if run["broken"]}
    assert killed <= {"first_server", "server", "frontend"}


def test_connections_of_a_process_are_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_connection(listening.getsockname()) as one:
        own = listening.accept()[0]
        port = one.getsockname()[1]
        assert port in client_ports(os.getpid())
        own.close()
        one.close()
        assert port not in client_ports(os.getpid())
