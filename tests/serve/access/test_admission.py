# SPDX-License-Identifier: Apache-2.0
"""Which requests the frontend takes in: bounded queues, refusals of what would be late, and that nothing is lost."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from tests.serve.gateway.test_router import CHAT, fetch, make_router, make_scope
from tokenpool.config import SLO, Admission
from tokenpool.serve.access.admission import EngineQueue, Gate, Ticket
from tokenpool.serve.gateway.model_app import ModelApp
from tokenpool.serve.gateway.router import ModelRouter

pytestmark = pytest.mark.cpu

POST = make_scope()
STRICT = Admission(max_waiting=None, on_miss="reject")


class SlowApp:
    """Answers when it is told to: streams begin at once and have their first event when `go` is set."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.end = asyncio.Event()
        self.bodies: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        body = await request.json()
        self.bodies.append(body)
        if body.get("stream"):
            response: Response = StreamingResponse(self._events())
        else:
            await self.go.wait()
            await self.end.wait()
            response = JSONResponse({"id": body["id"]})
        await response(scope, receive, send)

    async def _events(self) -> Any:
        await self.go.wait()
        yield b"data: first\n\n"
        await self.end.wait()
        yield b"data: [DONE]\n\n"


def slow_router(settings: Admission, slo: SLO | None = None) -> tuple[ModelRouter, ModelApp, SlowApp]:
    """A router whose model `a` answers slowly; `b` answers at once."""
    router, app = make_router("b"), SlowApp()
    model = ModelApp("a", app, "ready", gate=Gate.of("a", settings, slo))
    router.add(model)
    return router, model, app


class Clients:
    """Clients of a router, inside one event loop."""

    def __init__(self, router: ModelRouter) -> None:
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(router), base_url="http://pool")  # type: ignore[arg-type]
        self._count = 0

    def start(self, *, stream: bool = False, model: str = "a", path: str = CHAT) -> asyncio.Task[httpx.Response]:
        self._count += 1
        body = {"model": model, "id": self._count, "stream": stream}
        return asyncio.create_task(self._client.post(path, json=body))

    async def settle(self) -> None:
        """Let everything run that can."""
        for _ in range(50):
            await asyncio.sleep(0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_refuses_and_loses_nothing(stream: bool) -> None:
    """Behind `max_waiting` requests the next is 429 with Retry-After; those taken in are all answered."""

    async def main() -> None:
        router, model, app = slow_router(Admission(max_waiting=3))
        clients = Clients(router)
        accepted = [clients.start(stream=stream) for _ in range(3)]
        await clients.settle()
        refused = await clients.start(stream=stream)
        other = await clients.start(model="b")
        app.go.set()
        app.end.set()
        answers = await asyncio.gather(*accepted)

        error = refused.json()["error"]
        assert (429, "RateLimitError", "model", 429) == (
            refused.status_code, error["type"], error["param"], error["code"],
        )  # fmt: skip
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert "3 requests wait for model 'a', its bound is 3" in error["message"]
        assert (200, "b") == (other.status_code, other.json()["app"])
        assert [200] * 3 == [answer.status_code for answer in answers]
        assert [1, 2, 3] == [body["id"] for body in app.bodies]
        assert (0, 0) == (model.gate.unanswered, model.inflight)
        assert 200 == (await clients.start(stream=stream)).status_code

    asyncio.run(main())


def test_a_stream_waits_until_its_first_event() -> None:
    """A stream whose response has begun still waits for its token; with the first event it does not any more."""

    async def main() -> None:
        router, model, app = slow_router(Admission(max_waiting=1))
        clients = Clients(router)
        first = clients.start(stream=True)
        await clients.settle()
        assert 429 == (await clients.start(stream=True)).status_code
        app.go.set()
        await clients.settle()
        assert (0, 1) == (model.gate.unanswered, model.inflight)
        second = clients.start(stream=True)
        app.end.set()

        assert [200, 200] == [(await task).status_code for task in (first, second)]

    asyncio.run(main())


def test_a_request_that_runs_unstreamed_does_not_wait() -> None:
    """What the engine has begun, but answers in one piece, leaves its place in the queue."""

    async def main() -> None:
        router, model, app = slow_router(Admission(max_waiting=1))
        clients = Clients(router)
        first = clients.start()
        await clients.settle()
        assert 429 == (await clients.start()).status_code
        model.gate.engine = lambda: EngineQueue(begun=1)
        second = clients.start()
        await clients.settle()
        assert 429 == (await clients.start()).status_code
        app.go.set()
        app.end.set()

        assert [200, 200] == [(await task).status_code for task in (first, second)]

    asyncio.run(main())


def test_a_client_that_leaves_makes_room() -> None:
    """A request whose client goes before the first token waits no longer."""

    async def main() -> None:
        router, model, _ = slow_router(Admission(max_waiting=1))
        clients = Clients(router)
        task = clients.start()
        await clients.settle()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

        assert (0, 0) == (model.gate.unanswered, model.inflight)

    asyncio.run(main())


def test_waiting_prompt_tokens_are_bounded() -> None:
    """Beyond `max_waiting_tokens` the next request is 429; with nobody waiting it is taken in whatever waits."""
    gate = Gate.of("a", Admission(max_waiting_tokens=100), None)
    gate.engine = lambda: EngineQueue(waiting_tokens=101)
    tickets = [gate.admit(POST, CHAT), gate.admit(POST, CHAT)]

    assert isinstance(tickets[0], Ticket)
    assert isinstance(tickets[1], Response)
    assert (429, "1") == (tickets[1].status_code, tickets[1].headers["retry-after"])
    assert "101 prompt tokens would wait" in json.loads(bytes(tickets[1].body))["error"]["message"]
    gate.engine = lambda: EngineQueue(waiting_tokens=100)
    assert isinstance(gate.admit(POST, CHAT), Ticket)


@pytest.mark.parametrize("on_miss", ["queue", "reject"])
@pytest.mark.parametrize("slo", [None, SLO(2.0, 0.1)])
@pytest.mark.parametrize("wait_s", [1.0, 2.5, math.inf])
def test_a_predicted_miss_is_refused_only_where_asked_for(on_miss: str, slo: SLO | None, wait_s: float) -> None:
    """503 needs `on_miss: reject`, an SLO and a prediction beyond its ttft; Retry-After is the lateness."""
    gate = Gate.of("a", Admission(on_miss=on_miss), slo)
    assert gate.wants_forecast == (on_miss == "reject" and slo is not None)
    assert isinstance(gate.admit(POST, CHAT), Ticket), "nothing is known yet"
    gate.learn({"first_token_in_s": wait_s, "prefill_s": 0.1})
    answer = gate.admit(POST, CHAT)

    if gate.wants_forecast and wait_s > 2.0:
        assert isinstance(answer, Response)
        late = {2.5: "1", math.inf: "60"}
        assert (503, late[wait_s]) == (answer.status_code, answer.headers["retry-after"])
        error = json.loads(bytes(answer.body))["error"]
        assert ("ServiceUnavailableError", 503) == (error["type"], error["code"])
        assert "it is due in 2 s" in error["message"]
    else:
        assert isinstance(answer, Ticket)


def test_requests_since_the_prediction_add_to_it() -> None:
    """Between two predictions each request taken in makes the next one wait longer by its prefill."""
    gate = Gate.of("a", STRICT, SLO(2.0, 0.1))
    gate.learn({"first_token_in_s": 1.0, "prefill_s": 0.25})
    answers = [gate.admit(POST, CHAT) for _ in range(10)]

    assert [True] * 5 + [False] * 5 == [isinstance(answer, Ticket) for answer in answers]
    assert {429: 0, 503: 5} == gate.take_refused()
    assert {429: 0, 503: 0} == gate.take_refused()


@pytest.mark.parametrize(
    ("method", "path", "refused"),
    [("POST", CHAT, True), ("POST", "/v1/embeddings", True), ("POST", "/models/a/v1/completions", True)]
    + [("GET", CHAT, False), ("DELETE", CHAT, False), ("POST", "/tokenize", False)]
    + [("POST", "/models/a/tokenize", False), ("POST", "/v1/load_lora_adapter", False)],
)
def test_only_requests_that_wait_for_tokens_are_refused(method: str, path: str, refused: bool) -> None:
    """A full queue stops no request that never was in it, and such a request takes no place in it."""
    router = make_router("a")
    gate = router.models["a"].gate = Gate.of("a", Admission(max_waiting=1), None)
    ticket = gate.admit(POST, CHAT)

    assert (429 if refused else 200) == fetch(router, method, path, json={"model": "a"}).status_code
    assert isinstance(ticket, Ticket) and gate.unanswered == 1


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 4))
def test_the_count_of_waiting_never_drifts(moves: list[int], bound: int) -> None:
    """Whatever order requests come, begin and end in: the count is that of the tickets still waiting."""
    gate = Gate.of("a", Admission(max_waiting=bound), None)
    body = {"type": "http.response.body", "body": b"x"}
    waiting: list[Ticket] = []
    over: list[Ticket] = []
    for move in moves:
        if move == 0 or not waiting:
            answer = gate.admit(POST, CHAT)
            assert isinstance(answer, Ticket) == (len(waiting) < bound)
            waiting += [answer] if isinstance(answer, Ticket) else []
        else:
            ticket = waiting.pop(0)
            ticket.note({"type": "http.response.start", "status": 200, "headers": []})
            ticket.note({"type": "http.response.body", "body": b"", "more_body": True})
            assert gate.unanswered == len(waiting) + 1
            ticket.close() if move == 1 else ticket.note(body)
            over.append(ticket)
        for ticket in over:
            ticket.note(body)
            ticket.close()
        assert gate.unanswered == len(waiting)
