# SPDX-License-Identifier: Apache-2.0
"""Work counts as the engine sees it: prompts times `n`, whatever they came with, for every limit, seat and turn."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.serve.access.test_tenants import POST, Engine, Pool, check_refusal, settle, tenant
from tokenpool.serve.access import tenants
from tokenpool.serve.access.tenant_call import CURRENT_CALL
from tokenpool.serve.access.tenant_line import ALONE_QUEUE, ASIDE_AT_ONCE, ENGINE_QUEUE

pytestmark = pytest.mark.cpu


def many(count: int, **body: Any) -> dict[str, Any]:
    """A body that asks for so many sequences, and what the stand-in for the app then makes of it."""
    return {"prompt": ["p"] * count, "prompts": count, **body}


async def drain(pool: Pool, *names: str) -> None:
    """Let all running sequences end, and those that come in their place."""
    while any(pool.engine.going.get(name) for name in names):
        for name in names:
            if pool.engine.going.get(name):
                pool.engine.finish(name)
        await settle()


@pytest.mark.parametrize(("limit", "body"), [
    ("max_sequences_per_request", many(9)), ("max_sequences_per_request", {"messages": [], "n": 9}),
    ("max_concurrent", many(9)),
])  # fmt: skip
def test_a_request_that_can_never_pass_is_refused_whole(limit, body):
    """400 names the limit and what was asked; the app and the buckets see nothing of it."""

    async def main() -> None:
        settings = {"max_sequences_per_request": None, limit: 8}
        pool = Pool(tenant("a", requests_per_minute=10, **settings))
        answer = await pool.send("a", **body)
        error = answer.json()["error"]
        assert (400, limit) == (answer.status_code, error["param"])
        assert "9 sequences" in error["message"] and "8" in error["message"]
        assert [] == pool.engine.order
        assert {limit: 1} == pool.book.report()["a"]["refused"]
        assert 200 == (await pool.send("a", **many(8, quick=True))).status_code

    asyncio.run(main())


def test_the_cap_is_there_by_default():
    """64 sequences pass, 65 do not; null lifts the cap."""

    async def main() -> None:
        pool = Pool(tenant("a"), tenant("free", max_sequences_per_request=None))
        assert [200, 400] == [(await pool.send("a", **many(n, quick=True))).status_code for n in (64, 65)]
        assert 200 == (await pool.send("free", **many(500, quick=True))).status_code

    asyncio.run(main())


def test_max_concurrent_counts_sequences():
    """Six of eight leave room for two more, not for three."""

    async def main() -> None:
        pool = Pool(tenant("a", max_concurrent=8))
        first = pool.start("a", **many(6))
        await settle()
        assert 6 == pool.book.report()["a"]["inflight"]
        check_refusal(await pool.send("a", **many(3)), "max_concurrent", 1)
        second = pool.start("a", **many(2))
        await settle()
        assert 8 == pool.book.report()["a"]["inflight"]
        await drain(pool, "a")
        assert (200, 200) == ((await first).status_code, (await second).status_code)
        assert 0 == pool.book.report()["a"]["inflight"]

    asyncio.run(main())


def test_requests_per_minute_counts_sequences():
    """A list takes as much of the bucket as it has prompts, also beyond what was left, which is waited off."""

    async def main() -> None:
        pool = Pool(tenant("a", requests_per_minute=60))
        answer = await pool.send("a", **many(50, quick=True))
        assert "10" == answer.headers["x-ratelimit-remaining-requests"]
        assert 200 == (await pool.send("a", **many(20, quick=True))).status_code
        check_refusal(await pool.send("a", quick=True), "requests_per_minute", 11)
        usage = pool.book.accounts["a"].usage["a"]
        assert (2, 70) == (usage.requests, usage.sequences)

    asyncio.run(main())


def test_sequences_that_no_body_tells_of_count_as_they_come():
    """A request that turns out to have more than it said takes more of the limits from then on."""

    async def main() -> None:
        pool = Pool(tenant("a", max_concurrent=8, requests_per_minute=100))
        task = pool.start("a", prompts=7)
        await settle()
        assert 7 == pool.book.report()["a"]["inflight"]
        assert 93 == pool.book.report()["a"]["remaining"]["requests"]
        check_refusal(await pool.send("a", **many(2)), "max_concurrent", 1)
        await drain(pool, "a")
        assert 200 == (await task).status_code

    asyncio.run(main())


def test_a_list_does_not_go_before_others():
    """Of a list of 64 prompts four go to the engine while others use the model; who comes goes before the rest."""

    async def main() -> None:
        pool = Pool(tenant("flood"), tenant("polite"))
        await pool.send("polite", quick=True)
        flood = pool.start("flood", **many(64))
        await settle()
        assert ENGINE_QUEUE == pool.engine.num_running()
        assert 64 - ENGINE_QUEUE == len(pool.model.gate.line)
        polite = pool.start("polite")
        await settle()
        pool.engine.finish("flood")
        await settle()
        assert "polite" == pool.engine.order[1 + ENGINE_QUEUE]
        await drain(pool, "flood", "polite")
        assert (200, 200) == ((await flood).status_code, (await polite).status_code)
        assert 0 == len(pool.model.gate.line) == pool.model.gate.line.shares.taken("flood")

    asyncio.run(main())


def test_a_list_takes_only_its_tenants_seats():
    """Of eight seats one request with twenty sequences gets five beside a tenant with two."""

    async def main() -> None:
        pool = Pool(tenant("flood"), tenant("polite"))
        assert pool.model.gate.line is not None
        pool.model.gate.line.shares.seats = 8
        polite, flood = pool.start("polite", **many(2)), pool.start("flood", **many(20))
        for _ in range(30):
            await settle()
            for request_id, call in list(pool.engine.request_states.items()):
                call.put_out(request_id, 1)
        assert {"polite": 2, "flood": 5} == {name: pool.engine.order.count(name) for name in ("polite", "flood")}
        await drain(pool, "polite", "flood")
        assert (200, 200) == ((await polite).status_code, (await flood).status_code)

    asyncio.run(main())


def test_a_list_fills_the_engine_while_nobody_else_is_there():
    """Alone on the model its further sequences go to the engine together; who comes then does not wait for its rest."""

    async def main() -> None:
        pool = Pool(tenant("a", max_sequences_per_request=None), tenant("b"))
        task = pool.start("a", **many(200))
        await settle()
        assert ALONE_QUEUE == pool.engine.num_running()
        other = pool.start("b")
        await settle()
        for _ in range(ALONE_QUEUE - ENGINE_QUEUE):
            pool.engine.finish("a")
            await settle()
        assert ["a"] * ALONE_QUEUE + ["b"] == pool.engine.order
        await drain(pool, "a", "b")
        assert (200, 200) == ((await task).status_code, (await other).status_code)

    asyncio.run(main())


def test_a_client_that_goes_away_takes_its_held_sequences_along():
    """Neither the line nor the seats nor the counts know them any more, and the next client is served."""

    async def main() -> None:
        pool = Pool(tenant("a", max_concurrent=300, max_sequences_per_request=None), tenant("b"))
        pool.model.gate.line.shares.seats = 300
        await pool.send("b", quick=True)
        task = pool.start("a", **many(200))
        await settle()
        assert 200 - ENGINE_QUEUE == len(pool.model.gate.line)
        task.cancel()
        await settle()
        assert (0, 0) == (len(pool.model.gate.line), pool.model.gate.line.shares.taken("a"))
        assert 0 == pool.book.accounts["a"].num_sequences == pool.model.inflight == pool.model.gate.unanswered
        assert 200 == (await pool.send("a", **many(9, quick=True))).status_code

    asyncio.run(main())


def test_a_sequence_that_is_aborted_while_it_is_held_takes_no_seat():
    """Its place, when it comes, goes to the next one."""

    async def main() -> None:
        pool = Pool(tenant("a"))
        account, line = pool.book.accounts["a"], pool.model.gate.line
        call = account.begin(POST, "a", 0, 2)
        call.wait_in_line = line.more
        line.shares.seats, engine = 4, Engine()
        running = [await line.more(call) for _ in range(3)]
        engine.request_states["r"] = call
        call.add_engine_request("r", 1, engine)
        held = asyncio.create_task(call.admit("r"))
        await settle()
        assert not held.done()
        del engine.request_states["r"]
        call.end("r")
        for seat in running:
            seat.close()
        await held
        call.close()
        assert (0, 0) == (line.shares.taken("a"), account.num_sequences)

    asyncio.run(main())


def test_what_a_websocket_asks_for_waits_in_the_line_and_for_the_limits(monkeypatch):
    """A connection that stays open is no way round them: each sequence after the first is charged and paced."""
    monkeypatch.setattr(tenants, "_LONGEST_NAP_S", 0.001)

    async def main() -> None:
        pool = Pool(tenant("a", requests_per_minute=60, tokens_per_minute=600))
        account, engine = pool.book.accounts["a"], pool.engine
        call = account.begin({"type": "websocket"}, "a", 0)
        call.wait_in_line = pool.model.gate.line.more
        for i in range(2):
            engine.request_states[f"r{i}"] = call
            call.add_engine_request(f"r{i}", 100, engine)
            await call.admit(f"r{i}")
            call.put_out(f"r{i}", 1)
        assert 2 == pool.model.gate.line.shares.taken("a")
        assert 58 == round(account.request_bucket.level(0.0))
        account.token_bucket.take(0.0, 10_000)
        engine.request_states["r2"] = call
        call.add_engine_request("r2", 100, engine)
        held = asyncio.create_task(call.admit("r2"))
        await settle()
        assert not held.done()
        account.token_bucket.take(0.0, -20_000)
        await held
        call.close()
        assert 3 == account.num_sequences, "what it began goes on"
        engine.request_states.clear()
        assert 0 == account.num_sequences

    asyncio.run(main())


def test_a_background_response_is_charged_and_keeps_its_seat_until_it_ends():
    """Its HTTP call is over at once; the tenant's turn and seat follow what the engine did for it."""

    async def main() -> None:
        pool = Pool(tenant("a"), tenant("b"), engine=Engine(10, 1000))
        line = pool.model.gate.line
        assert 200 == (await pool.send("a", background=True)).status_code
        await settle()
        assert 1 == line.shares.taken("a")
        pool.engine.finish("a")
        await settle()
        assert 0 == line.shares.taken("a")
        assert 10 + 2 * 1000 == line._queue._mean_cost["a"]

    asyncio.run(main())


def test_calls_without_sequences_have_places_of_their_own():
    """Of a tenant's calls that only tokenize a few run at a time, which the line and other tenants do not feel."""

    async def main() -> None:
        running: dict[str, list[asyncio.Event]] = {"flood": [], "polite": []}

        async def app(scope: Any, receive: Any, send: Any) -> None:
            call, go = CURRENT_CALL.get(), asyncio.Event()
            assert call is not None
            running[call.account.config.name].append(go)
            await go.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})

        pool = Pool(tenant("flood"), tenant("polite"), engine=app)
        paths = ("/tokenize", "/v1/messages/count_tokens")
        flood = [asyncio.create_task(pool.send("flood", paths[i % 2])) for i in range(20)]
        await settle()
        assert ASIDE_AT_ONCE == len(running["flood"])
        polite = asyncio.create_task(pool.send("polite", "/tokenize"))
        flood.pop().cancel()
        await settle()
        assert (1, 0) == (len(running["polite"]), len(pool.model.gate.line))
        while not all(task.done() for task in (*flood, polite)):
            for events in running.values():
                while events:
                    events.pop().set()
            await settle()
        assert {200} == {task.result().status_code for task in (*flood, polite)}

    asyncio.run(main())
