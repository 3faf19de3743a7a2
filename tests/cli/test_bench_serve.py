# SPDX-License-Identifier: Apache-2.0
"""The bench client sends what its flags say, and reports what a client saw by rules that can be checked by hand."""

from __future__ import annotations

import asyncio
import itertools
import json
from argparse import Namespace
from collections import Counter
from typing import Any

import pytest
from aiohttp import web

from tokenpool.cli.bench.client import PLAIN_TOKENS, BenchRequest, Outcome, counts, replay, wait_until_idle
from tokenpool.cli.bench.command import _keys, _slo, make_requests
from tokenpool.cli.bench.report import report, table
from tokenpool.cli.main import run
from tokenpool.cli.tree import command_tree
from tokenpool.config import SLO
from tokenpool.errors import ConfigError

pytestmark = pytest.mark.cpu


def flags_of(*words: str) -> Namespace:
    return command_tree(["bench"]).parse_args(["bench", "serve", *words])


def requests(words: str, *tenants: str) -> list[BenchRequest]:
    return make_requests(flags_of(*words.split()), list(tenants))


def test_made_up_requests_follow_the_flags():
    """Rate, duration, lengths and shares are those asked for, and a seed names the requests."""
    words = "--models a,b --rate 50 --duration 40s --input-len 10-20 --output-len 5 --share y=3 --seed 7"
    made = requests(words, "x", "y")

    assert made == requests(words, "x", "y") != requests(words.replace("7", "8"), "x", "y")
    assert 1800 < len(made) < 2200
    assert made == sorted(made, key=lambda request: request.arrival_s)
    assert made[-1].arrival_s < 40
    assert set(range(10, 21)) == {request.input_len for request in made}
    assert {5} == {request.output_len for request in made}
    models, tenants = (Counter(getattr(request, name) for request in made) for name in ("model", "tenant"))
    assert {"a", "b"} == models.keys() and abs(models["a"] / len(made) - 0.5) < 0.05
    assert {"x", "y"} == tenants.keys() and abs(tenants["y"] / len(made) - 0.75) < 0.05


def test_burstiness_is_that_of_vllm():
    """The gaps of a model have the coefficient of variation 1 / sqrt(burstiness)."""
    words = "--models a --rate 100 --duration 60s --input-len 5 --output-len 5 --burstiness 0.25"
    times = [request.arrival_s for request in requests(words)]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    cv = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 / mean

    assert 1.7 < cv < 2.3


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "t.csv"
    rows = [f"{i * 1000},m{i % 3},{100 + i},{10 + i}" for i in range(12)]
    path.write_text("arrival_ms,model,input_len,output_len\n" + "\n".join(rows) + "\n")
    return path


def test_a_trace_is_played_as_it_is(trace):
    """Without other flags: its times, models and lengths."""
    made = requests(f"--trace {trace}")

    assert [BenchRequest(float(i), f"m{i % 3}", 100 + i, 10 + i) for i in range(12)] == made


def test_a_trace_can_be_sped_up_cut_and_dealt_out(trace):
    """Models are dealt out in the order in which they come; names that are served keep theirs."""
    made = requests(f"--trace {trace} --models m2,b --speed 2 --duration 4s --max-input-len 103 --max-output-len 12")

    assert [i / 2 for i in range(9)] == [request.arrival_s for request in made]
    assert ["m2", "b", "m2"] == [request.model for request in made[:3]]
    assert [100, 101, 102, 103, 103] == [request.input_len for request in made[:5]]
    assert [10, 11, 12, 12] == [request.output_len for request in made[:4]]
    assert 4 == len(requests(f"--trace {trace} --num-prompts 4"))
    assert pytest.approx(12 / 60) == requests(f"--trace {trace} --rate 60")[-1].arrival_s


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("", "give --trace, or --models and --rate"),
        ("--models a", "give --trace, or --models and --rate"),
        ("--models a --rate 1 --input-len 5", "give --input-len and --output-len, or none of them"),
        ("--models a --rate 1 --input-len 9-5 --output-len 1", "expected N or LOW-HIGH from 1"),
        ("--models a --rate 1 --share x=1", "--share: no tenant 'x': give its --key"),
        ("--models a --rate 1 --key x", "--key: write NAME=KEY or NAME=env:VARIABLE"),
        ("--models a --rate 1 --key x=env:NOT_SET_AT_ALL", "--key: environment variable NOT_SET_AT_ALL is not set"),
        ("--models a --rate 1 --goodput e2el:5", "--goodput: 'e2el:5' is none of ttft:MS and tpot:MS"),
        ("--models a --rate 1 --url localhost", "--url: 'localhost' is no address"),
        ("--models a --rate 0.0001 --duration 1s", "there is no request to send"),
        ("--trace nowhere.csv", "nowhere.csv: cannot be read"),
    ],
)
def test_mistakes_are_told_before_anything_is_sent(words, problem):
    """One line that names the flag."""
    with pytest.raises(ConfigError) as error:
        run(["bench", "serve", *words.split()])
    assert problem in str(error.value)


def test_goodput_is_written_as_in_vllm():
    """Milliseconds behind a colon, or the pool's own way."""
    flags = flags_of("--goodput", "ttft:1500", "tpot:80")
    assert SLO(1.5, 0.08) == _slo(flags)
    assert SLO(2.0, 0.1) == _slo(flags_of("--ttft", "2s"))


def test_keys_may_come_from_the_environment(monkeypatch):
    """So that they are in no list of processes."""
    monkeypatch.setenv("A_KEY", "secret=1")
    assert {"a": "secret=1", "b": "plain=2"} == _keys(["a=env:A_KEY", "b=plain=2"])


def outcome(tenant: str, times: list[float], problem: str = "", model: str = "m") -> Outcome:
    """A request of four tokens that came at 100."""
    return Outcome(BenchRequest(0.0, model, 10, 4, tenant), 100.0, 100.0, [100 + t for t in times], problem)


def test_a_report_worked_out_by_hand():
    """TTFT 1 s, TPOT 0.5 s: tokens are due after 1, 1.5, 2 and 2.5 s."""
    good = outcome("a", [0.5, 1.0, 1.5, 2.0])
    late = outcome("a", [1.2, 1.4, 2.2, 2.5], model="n")
    refused = outcome("b", [], "status 429: slow down")
    answer = json.loads(json.dumps(report([good, late, refused], SLO(1.0, 0.5))))
    every, a, b = answer["all"], answer["tenants"]["a"], answer["tenants"]["b"]

    assert {"done": 2, "status 429": 1} == every["ended"]
    assert pytest.approx(6 / 12) == every["attainment"]["token"]
    assert pytest.approx(1 / 3) == every["attainment"]["request"]
    assert pytest.approx(6 / 8) == a["attainment"]["token"]
    assert (0.0, 0, {}) == (b["attainment"]["token"], b["output_tokens"], b["ttft_s"])
    assert pytest.approx(6 / 2.5) == every["goodput_tokens_per_s"]  # from the first arrival to the last token
    assert pytest.approx(1 / 2.5) == every["goodput_requests_per_s"]
    assert pytest.approx(0.85) == every["ttft_s"]["p50"] == every["ttft_s"]["mean"]
    assert pytest.approx((0.5 + 1.3 / 3) / 2) == every["tpot_s"]["p50"]
    assert {"m", "n"} == answer["models"].keys()
    shown = table(answer)
    assert "failed: 1 x status 429" in shown
    assert 1 == sum(line.startswith("tenant b ") for line in shown.splitlines())


class Server:
    """Notes what it is sent and streams as many tokens as asked for, or what a model's name says."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("Authorization"))
        if body["model"] == "refused":
            return web.json_response({"error": {}}, status=429)
        answer = web.StreamResponse()
        await answer.prepare(request)
        count = 0
        while count < body["max_tokens"]:
            count = min(count + 3, body["max_tokens"])  # several tokens in one event, an event in two pieces
            event = f'data: {{"choices": [], "usage": {{"completion_tokens": {count}}}}}\n\n'.encode()
            await answer.write(event[:20])
            await answer.write(event[20:])
            if body["model"] == "breaks":
                await answer.write(b'data: {"error": {"message": "engine died"}}\n\n')
                return answer
            if body["model"] == "hangs":
                await asyncio.sleep(60)
        await answer.write(b"data: [DONE]\n\n")
        return answer

    async def load(self, request: web.Request) -> web.Response:
        return web.json_response({"server_load": 0})


def test_the_client_counts_every_token_and_tells_failures_apart():
    """Tokens of joined and cut events, refusals, errors in a stream, and requests that never end."""

    async def main() -> tuple[Server, list[Outcome]]:
        server, app = Server(), web.Application()
        app.router.add_post("/v1/completions", server.complete)
        app.router.add_get("/load", server.load)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        names = ["good", "refused", "breaks", "hangs"]
        sent = [BenchRequest(0.01 * i, name, 5 + i, 10, "t" if i else "") for i, name in enumerate(names)]
        outcomes = await replay(url, sent, seed=1, drain_s=0.5, keys={"t": "secret"})
        await wait_until_idle(url)
        await runner.cleanup()
        return server, outcomes

    server, outcomes = asyncio.run(main())
    good, refused, breaks, hangs = outcomes

    assert (10, "") == (len(good.token_times_s), good.problem)
    assert refused.problem.startswith("status 429: ")
    assert breaks.problem.startswith("error in the stream: ")
    assert (3, "not done at the end") == (len(hangs.token_times_s), hangs.problem)
    assert {"done": 1, "status 429": 1, "error in the stream": 1, "not done at the end": 1} == counts(
        outcomes, by_kind=True
    )
    assert [None, *["Bearer secret"] * 3] == server.keys
    assert [5, 6, 7, 8] == [len(body["prompt"]) for body in server.bodies]
    assert all(token in PLAIN_TOKENS for body in server.bodies for token in body["prompt"])
    assert 4 == len({json.dumps(body["prompt"][:5]) for body in server.bodies})
