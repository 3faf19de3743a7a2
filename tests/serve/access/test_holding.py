# SPDX-License-Identifier: Apache-2.0
"""Requests for a model that is not loaded wait: in order, within limits, for as long as their client does."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from tests.serve.gateway.test_router import CHAT, make_app, make_scope
from tokenpool.config import Admission
from tokenpool.model_life import MOVES, Life, check_move
from tokenpool.serve.access import holding
from tokenpool.serve.access.admission import Gate
from tokenpool.serve.gateway.model_app import ModelApp
from tokenpool.serve.gateway.router import ModelRouter

pytestmark = pytest.mark.cpu


class Pool:
    """A router with one model `a`, which is cold, and what was answered, in order."""

    def __init__(self, **fields: Any) -> None:
        self.router = ModelRouter(make_app("outer"), max_request_bytes=1 << 20)
        self.model = ModelApp("a", self.app, Life.COLD, **fields)
        self.router.add(self.model)
        self.began: list[int] = []
        self.answers: dict[int, list[dict[str, Any]]] = {}
        self.gone: dict[int, asyncio.Event] = {}

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        body = await Request(scope, receive).json()
        self.began.append(body["id"])
        if body.get("bad"):
            response: Response = JSONResponse({"error": "bad"}, status_code=400)
        elif body.get("stream"):
            response = StreamingResponse(iter([b"data: one\n\n", b"data: [DONE]\n\n"]), media_type="text/event-stream")
        else:
            response = JSONResponse({"id": body["id"]})
        await response(scope, receive, send)

    def ask(self, number: int, path: str = CHAT, **fields: Any) -> asyncio.Task[None]:
        """Send a request, which begins to wait in the next turn of the loop."""
        body = json.dumps({"model": "a", "id": number, **fields}).encode()
        gone, sent = self.gone.setdefault(number, asyncio.Event()), self.answers.setdefault(number, [])
        messages = [{"type": "http.request", "body": body}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = make_scope(path, {"content-length": str(len(body)), "content-type": "application/json"})
        return asyncio.create_task(self.router(scope, receive, send))

    def status(self, number: int) -> int:
        (start,) = (m for m in self.answers[number] if m["type"] == "http.response.start")
        return start["status"]

    def text(self, number: int) -> str:
        assert not self.answers[number][-1].get("more_body", False), "the answer has no end"
        return b"".join(m.get("body", b"") for m in self.answers[number]).decode()


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def run(test: Any) -> None:
    asyncio.run(test())


def test_requests_wait_and_go_in_the_order_in_which_they_came() -> None:
    """One makes the model loading, all of them wait, and an answer is the one that would come later."""

    async def test() -> None:
        pool, wanted = Pool(), []
        pool.model.on_wanted = lambda: wanted.append(pool.model.state)
        tasks = [pool.ask(number) for number in range(5)]
        await turns()
        assert (pool.model.state, len(pool.model.hold), pool.began) == (Life.LOADING, 5, [])
        assert wanted == [Life.LOADING] * 5
        pool.model.move(Life.READY)
        await asyncio.gather(*tasks)
        assert pool.began == [0, 1, 2, 3, 4] and not len(pool.model.hold)
        assert [pool.status(number) for number in range(5)] == [200] * 5

    run(test)


def test_a_failed_load_is_told_to_all_who_wait() -> None:
    """Each gets 503 with the reason and Retry-After; so does who comes while it is failed."""

    async def test() -> None:
        pool = Pool()
        tasks = [pool.ask(number) for number in range(3)]
        await turns()
        pool.model.reason = "no file"
        pool.model.move(Life.FAILED)
        await asyncio.gather(*tasks, pool.ask(3))
        for number in range(4):
            assert pool.status(number) == 503 and "is failed (no file)" in pool.text(number)
        assert pool.began == []

    run(test)


def test_who_goes_away_or_waits_too_long_waits_no_more() -> None:
    """A client that has gone gets nothing, one that waited for the limit a 503; no app sees either."""

    async def test() -> None:
        pool = Pool()
        pool.model.hold.limit_s = 0.05
        going, staying = pool.ask(0), pool.ask(1)
        await turns()
        pool.gone[0].set()
        await asyncio.gather(going, staying)
        assert pool.answers[0] == [] and pool.status(1) == 503 and "within 0.05 s" in pool.text(1)
        assert not len(pool.model.hold) and pool.began == []

    run(test)


def test_a_full_queue_refuses_requests_of_a_cold_model() -> None:
    """Those that are held count for `max_waiting`."""

    async def test() -> None:
        pool = Pool(gate=Gate.of("a", Admission(max_waiting=2), None))
        tasks = [pool.ask(number) for number in range(3)]
        await turns()
        pool.model.move(Life.READY)
        await asyncio.gather(*tasks)
        assert [pool.status(number) for number in range(3)] == [200, 200, 429]

    run(test)


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "DELETE"])
def test_what_only_looks_does_not_load(method: str) -> None:
    """It gets 503, and the model stays cold."""

    async def test() -> None:
        pool, sent = Pool(), []

        async def send(message: Any) -> None:
            sent.append(message)

        await pool.router(make_scope("/models/a/metrics", method=method), asyncio.Event().wait, send)
        assert sent[0]["status"] == 503 and pool.model.state == Life.COLD

    run(test)


def test_a_stream_hears_of_the_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comments come until the model is ready, then its events; an answer in one piece waits in silence."""
    monkeypatch.setattr(holding, "PROGRESS_PERIOD_S", 0.01)

    async def test() -> None:
        pool = Pool(progress=lambda: "40 %")
        tasks = [pool.ask(0, stream=True), pool.ask(1)]
        while len(pool.answers[0]) < 3:
            await asyncio.sleep(0.001)
        assert pool.answers[1] == []
        pool.model.move(Life.READY)
        await asyncio.gather(*tasks)
        text = pool.text(0)
        assert pool.status(0) == 200 and text.startswith(": loading 40 %\n\n: loading 40 %\n\n")
        assert text.endswith("data: one\n\ndata: [DONE]\n\n")
        assert text.replace(": loading 40 %\n\n", "") == "data: one\n\ndata: [DONE]\n\n"

    run(test)


@pytest.mark.parametrize("path, head", [(CHAT, "data: "), ("/v1/messages", "event: error\ndata: ")])
def test_an_error_ends_a_stream_that_has_begun(monkeypatch: pytest.MonkeyPatch, path: str, head: str) -> None:
    """Of the app or of a load that failed: it is the last event, and the head is not sent twice."""
    monkeypatch.setattr(holding, "PROGRESS_PERIOD_S", 0.01)

    async def test() -> None:
        for number, (state, said) in enumerate([(Life.READY, '{"error":"bad"}'), (Life.FAILED, "is failed")]):
            pool = Pool()
            task = pool.ask(number, path, stream=True, bad=True)
            while not pool.answers[number]:
                await asyncio.sleep(0.001)
            pool.model.move(state)
            await task
            *_, last = (text for text in pool.text(number).split("\n\n") if text and "[DONE]" not in text)
            assert pool.status(number) == 200 and last.startswith(head) and said in last

    run(test)


@pytest.mark.parametrize("seed", range(20))
def test_nobody_is_lost_or_answered_twice(seed: int) -> None:
    """Whatever the model does and whoever goes: each gets one whole answer, or has gone; those let in, in order."""

    async def test() -> None:
        rng, pool, tasks = random.Random(seed), Pool(), {}
        pool.model.hold.limit_s = 60.0
        for number in range(120):
            tasks[number] = pool.ask(number)
            await turns(rng.randrange(4))
            if rng.random() < 0.15:
                pool.gone[rng.randrange(number + 1)].set()
            if rng.random() < 0.3:
                state = rng.choice([*MOVES[pool.model.state]])
                pool.model.is_resting = state == Life.DRAINING and rng.random() < 0.7
                pool.model.move(state)
        await turns()
        for state in (Life.FAILED, Life.READY) if pool.model.state != Life.DRAINING else (Life.READY,):
            if pool.model.state != Life.READY:
                pool.model.move(state)
            await turns()
        async with asyncio.timeout(10):
            await asyncio.gather(*tasks.values())
        assert not len(pool.model.hold) and pool.model.gate.unanswered == 0 and pool.model.inflight == 0
        assert not pool.model.hold.counts and not pool.model.hold.due_by_tenant
        assert len(pool.began) == len(set(pool.began))
        for number in tasks:
            starts = [m for m in pool.answers[number] if m["type"] == "http.response.start"]
            assert len(starts) == 1 or (not starts and pool.gone[number].is_set())
            if starts:
                assert pool.status(number) == (200 if number in pool.began else 503)
                assert pool.text(number)

    run(test)


def test_the_table_of_lives() -> None:
    """Each state is left for those of the table, and for no other one."""
    assert set(MOVES) == set(Life)
    check_move(Life.COLD, Life.LOADING)
    check_move(Life.READY, Life.READY)
    for old in Life:
        for new in set(Life) - MOVES[old] - {old}:
            with pytest.raises(AssertionError, match=f"a model that is {old} cannot become {new}"):
                check_move(old, new)


def socket_task(pool: Pool, gone: asyncio.Event, sent: list[Any]) -> asyncio.Task[None]:
    """A websocket that has sent nothing yet, until its client goes."""
    messages = [{"type": "websocket.connect"}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "websocket.disconnect", "code": 1006}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = make_scope("/v1/realtime", type="websocket")
    del scope["method"]
    return asyncio.create_task(pool.router(scope, receive, send))


def test_a_websocket_whose_client_goes_waits_no_more() -> None:
    """Nobody waits for the model then; one that stays gets its app, which hears of the connection."""

    async def test() -> None:
        pool, heard = Pool(), []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            heard.append((await receive())["type"])

        pool.model.app = app
        gone, stays = asyncio.Event(), asyncio.Event()
        tasks = [socket_task(pool, event, []) for event in (gone, stays)]
        await turns()
        assert len(pool.model.hold) == 2
        gone.set()
        await tasks[0]
        assert len(pool.model.hold) == 1 and not pool.model.hold.counts.get("a")
        pool.model.move(Life.READY)
        await tasks[1]
        assert heard == ["websocket.connect"]

    run(test)


def test_all_that_waits_for_a_model_is_bounded() -> None:
    """Websockets, and requests that want no token, wait in the same queue: beyond `max_waiting` they are refused."""

    async def test() -> None:
        pool = Pool(gate=Gate.of("a", Admission(max_waiting=2), None))
        never, sent = asyncio.Event(), list[Any]()
        held = [socket_task(pool, never, []), pool.ask(0, "/tokenize")]
        await turns()
        await socket_task(pool, never, sent)
        await pool.ask(1, "/tokenize")
        assert (pool.status(1), sent[0]["code"], len(pool.model.hold)) == (429, 1013, 2)
        assert "wait for model" in pool.text(1)
        pool.model.move(Life.READY)
        await held[1]
        assert pool.status(0) == 200
        held[0].cancel()
        await asyncio.wait(held)

    run(test)
