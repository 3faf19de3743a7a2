# SPDX-License-Identifier: Apache-2.0
"""Limits answer 429 with when it would pass, a flood waits for itself, and what a tenant uses is counted once."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from tests.serve.gateway.test_router import CHAT, GONE, make_router, make_scope
from tokenpool.config import Admission
from tokenpool.policy.leases import Lease
from tokenpool.serve.access.admission import Gate
from tokenpool.serve.access.auth import TENANT_KEY, ApiKeyAuth
from tokenpool.serve.access.tenant_call import CURRENT_CALL, Call
from tokenpool.serve.access.tenant_line import ENGINE_QUEUE, TenantLine
from tokenpool.serve.access.tenants import Account, TenantBook
from tokenpool.serve.gateway.model_app import ModelApp
from tokenpool.serve.gateway.router import ModelRouter
from tokenpool.tenant_config import TenantConfig

pytestmark = pytest.mark.cpu

POST = make_scope()


class Engine:
    """An app that registers engine requests as the meter does, one or `prompts`, and answers when it is told to."""

    def __init__(self, prompt_tokens: int = 10, completion_tokens: int = 3) -> None:
        self.request_states: dict[str, Any] = {}
        self.order: list[str] = []
        """Tenants, in the order in which their calls came."""
        self.going: dict[str, list[asyncio.Event]] = {}
        self.sizes = prompt_tokens, completion_tokens

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        body = await request.json()
        call = CURRENT_CALL.get()
        assert call is not None
        work = asyncio.gather(*(self.compute(call, i, **body) for i in range(body.get("prompts", 1))))
        if body.get("background"):
            call.keep_for(work)
        else:
            await work
        await JSONResponse({"ok": True})(scope, receive, send)

    async def compute(self, call: Call, index: int, quick: bool = False, **_: Any) -> None:
        """One sequence, from when vLLM's frontend knows it."""
        tenant = call.account.config.name
        request_id = f"{tenant}-{id(call)}-{index}"
        self.request_states[request_id] = call
        call.add_engine_request(request_id, self.sizes[0], self)
        try:
            await call.admit(request_id)
            self.order.append(tenant)
            if not quick:
                go = asyncio.Event()
                self.going.setdefault(tenant, []).append(go)
                await go.wait()
            call.put_out(request_id, self.sizes[1])
        finally:
            del self.request_states[request_id]
            call.end(request_id)

    def finish(self, tenant: str) -> None:
        """Let the oldest running call of a tenant end."""
        self.going[tenant].pop(0).set()

    def num_running(self) -> int:
        return sum(len(events) for events in self.going.values())


class Pool:
    """A router with one model `a` and clients of several tenants."""

    def __init__(self, *tenants: TenantConfig, engine: Any = None, settings: Admission | None = None) -> None:
        self.engine = engine or Engine()
        self.book = TenantBook(tenants)
        self.router = ModelRouter(PlainTextResponse("outer"), max_request_bytes=1 << 20, tenants=self.book)
        gate = Gate.of("a", settings or Admission(), None)
        self.model = ModelApp("a", self.engine, "ready", gate=gate)
        self.router.add(self.model)

    async def send(self, tenant: str, path: str = CHAT, **body: Any) -> httpx.Response:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            scope[TENANT_KEY] = self.book.accounts[tenant]
            await self.router(scope, receive, send)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://pool") as client:
            return await client.post(path, json={"model": "a", **body})

    def start(self, tenant: str, **body: Any) -> asyncio.Task[httpx.Response]:
        return asyncio.create_task(self.send(tenant, **body))


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(50):
        await asyncio.sleep(0)


def tenant(name: str, **settings: Any) -> TenantConfig:
    return TenantConfig(name, keys=(name.encode().ljust(32),), **settings)


def check_refusal(answer: httpx.Response, limit: str, retry_after_s: int) -> None:
    error = answer.json()["error"]
    assert (429, "RateLimitError", limit, 429) == (answer.status_code, error["type"], error["param"], error["code"])
    assert f"The limit {limit} of the tenant" in error["message"]
    assert str(retry_after_s) == answer.headers["retry-after"]


def test_requests_per_minute():
    """Two pass, the third hears when the next one would; another tenant does not notice."""

    async def main() -> None:
        pool = Pool(tenant("a", requests_per_minute=2), tenant("b"))
        answers = [await pool.send("a", quick=True) for _ in range(3)]
        assert [200, 200, 429] == [answer.status_code for answer in answers]
        check_refusal(answers[2], "requests_per_minute", 30)
        assert ["1", "0"] == [answer.headers["x-ratelimit-remaining-requests"] for answer in answers[:2]]
        assert 200 == (await pool.send("b", quick=True)).status_code
        assert 2 == pool.book.accounts["a"].usage["a"].requests

    asyncio.run(main())


def test_tokens_per_minute():
    """Prompt and completion count; what went over the limit is waited off: 60 + 90 of 120 leave half a second each."""

    async def main() -> None:
        pool = Pool(tenant("a", tokens_per_minute=120), engine=Engine(60, 90))
        assert 200 == (await pool.send("a", quick=True)).status_code
        answer = await pool.send("a", quick=True)
        check_refusal(answer, "tokens_per_minute", 16)  # 30 tokens of debt and the next one, at 2 per second
        assert "0" == answer.headers["x-ratelimit-remaining-tokens"]
        usage = pool.book.accounts["a"].usage["a"]
        assert (1, 60, 90) == (usage.requests, usage.prompt_tokens, usage.completion_tokens)

    asyncio.run(main())


def test_a_burst_cannot_overdraw_before_its_prompts_are_counted():
    """Tokens are set aside for requests that are not tokenized yet, and given back when they are or never will be."""

    async def main() -> None:
        pool = Pool(tenant("a", tokens_per_minute=1000))
        account = pool.book.accounts["a"]
        before = account.token_bucket.level(0.0)
        calls = []
        while account.refusal(POST, "a") is None:
            calls.append(account.begin(POST, "a", 400))
        assert 10 == len(calls)
        for call in calls:
            call.close()
        assert pytest.approx(before, abs=1) == account.token_bucket.level(0.0)
        call = account.begin(POST, "a", 400)
        pool.engine.request_states["r"] = call
        call.add_engine_request("r", 30, pool.engine)
        assert pytest.approx(before - 30, abs=1) == account.token_bucket.level(0.0)
        call.close()

    asyncio.run(main())


def test_max_concurrent_counts_held_and_running_requests():
    """The bound is on what is not answered; an end makes room."""

    async def main() -> None:
        pool = Pool(tenant("a", max_concurrent=2))
        first, second = pool.start("a"), pool.start("a")
        await settle()
        check_refusal(await pool.send("a", quick=True), "max_concurrent", 1)
        pool.engine.finish("a")
        assert 200 == (await first).status_code
        assert 200 == (await pool.send("a", quick=True)).status_code
        pool.engine.finish("a")
        await second

    asyncio.run(main())


def test_work_in_the_background_counts_until_the_engine_ends_it():
    """A response with `background` is answered at once; it holds its place until the engine is done or gone."""

    async def main() -> None:
        pool = Pool(tenant("a", max_concurrent=1))
        assert 200 == (await pool.send("a", background=True)).status_code
        assert 1 == pool.book.accounts["a"].num_sequences, "it counts before its task has begun"
        await settle()
        assert 1 == pool.book.accounts["a"].num_sequences
        check_refusal(await pool.send("a", quick=True), "max_concurrent", 1)
        assert 1 == pool.model.gate.line.shares.taken("a")
        pool.engine.finish("a")
        await settle()
        assert 0 == pool.model.gate.line.shares.taken("a")
        assert 200 == (await pool.send("a", quick=True)).status_code
        account, gone = pool.book.accounts["a"], Engine()
        call = account.begin(POST, "a", 0)
        gone.request_states["r"] = call
        call.add_engine_request("r", 1, gone)
        call.close()
        assert 1 == account.num_sequences
        del gone  # the client of a model that was removed
        gc.collect()
        assert 0 == account.num_sequences

    asyncio.run(main())


@pytest.mark.parametrize("path", [CHAT, "/models/{}/v1/completions"])
def test_a_model_that_a_tenant_may_not_use_is_as_none(path):
    """The answer is that for a name that nobody has, to the letter; nothing reaches the app, and it is counted."""

    async def main() -> None:
        pool = Pool(tenant("a", models=("b*",)))
        pool.router.add(ModelApp("b1", pool.engine, "ready"))
        pool.router.add(ModelApp("c", pool.engine, "ready"))
        hidden, absent = [await pool.send("a", path.format(name), model=name) for name in ("c", "d")]
        assert (404, 404) == (hidden.status_code, absent.status_code)
        assert hidden.text.replace("`c`", "`d`") == absent.text
        assert "The model `c` does not exist. Known models: b1" == hidden.json()["error"]["message"]
        assert [] == pool.engine.order
        assert {("c", "models"): 1} == pool.book.accounts["a"].refused

    asyncio.run(main())


def test_the_only_model_that_a_tenant_may_use_needs_no_name():
    """What it may not use is not there for it."""

    async def main() -> None:
        pool = Pool(tenant("a", models=("a",)), tenant("b"))
        pool.router.add(ModelApp("other", pool.engine, "ready"))
        answers = [await pool.send(name, model=None, quick=True) for name in ("a", "b")]
        assert [200, 400] == [answer.status_code for answer in answers]

    asyncio.run(main())


def test_a_flood_waits_for_itself():
    """Behind 200 requests of one tenant, another one's comes as soon as the engine takes any."""

    async def main() -> None:
        pool = Pool(tenant("flood"), tenant("polite"))
        flood = [pool.start("flood") for _ in range(200)]
        await settle()
        assert ENGINE_QUEUE == pool.engine.num_running()
        assert 200 - ENGINE_QUEUE == len(pool.model.gate.line)
        polite = pool.start("polite")
        await settle()
        pool.engine.finish("flood")
        await settle()
        assert "polite" == pool.engine.order[ENGINE_QUEUE]
        pool.engine.finish("polite")
        assert 200 == (await polite).status_code
        while pool.engine.num_running():
            pool.engine.finish("flood")
            await settle()
        assert {200} == {(await task).status_code for task in flood}
        assert 0 == pool.model.inflight == len(pool.model.gate.line) == pool.model.gate.unanswered

    asyncio.run(main())


@pytest.mark.parametrize("when", ["held", "running"])
def test_a_client_that_goes_away_leaves_nothing_behind(when):
    """Its place is free for the next, whether it was held or let through."""

    async def main() -> None:
        pool = Pool(tenant("a"))
        running = [pool.start("a") for _ in range(ENGINE_QUEUE - (when == "running"))]
        await settle()
        gone = asyncio.Event()
        messages = [{"type": "http.request", "body": b'{"model": "a"}'}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await gone.wait()
            return GONE

        async def send(message: Any) -> None:
            raise AssertionError(f"nobody is there to hear {message}")

        scope = {**POST, "headers": [(b"content-type", b"application/json")], TENANT_KEY: pool.book.accounts["a"]}
        task = asyncio.create_task(pool.router(scope, receive, send))
        await settle()
        assert (1 if when == "held" else 0) == len(pool.model.gate.line)
        if when == "held":
            gone.set()
            await task
        else:  # vLLM's app cancels its work
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        last = pool.start("a")
        await settle()
        for _ in range(ENGINE_QUEUE + 2):
            while pool.engine.going["a"]:
                pool.engine.finish("a")
            await settle()
        assert {200} == {(await task).status_code for task in (*running, last)}
        assert 0 == pool.model.inflight == len(pool.model.gate.line) == pool.book.accounts["a"].num_sequences

    asyncio.run(main())


def test_a_model_that_goes_away_refuses_what_is_held():
    """503 with Retry-After, once the calls before have ended."""

    async def main() -> None:
        pool = Pool(tenant("a"))
        tasks = [pool.start("a") for _ in range(ENGINE_QUEUE + 2)]
        await settle()
        pool.model.state = "unavailable"
        for _ in range(ENGINE_QUEUE):
            pool.engine.finish("a")
        answers = [await task for task in tasks]
        assert [200] * ENGINE_QUEUE + [503, 503] == [answer.status_code for answer in answers]
        assert "retry-after" in answers[-1].headers

    asyncio.run(main())


def test_a_full_queue_refuses_who_filled_it():
    """The flood gets 429 at the model's bound; a tenant with less than its part still comes in."""

    async def main() -> None:
        pool = Pool(tenant("flood"), tenant("polite"), settings=Admission(max_waiting=20))
        flood = [pool.start("flood") for _ in range(30)]
        await settle()
        polite = pool.start("polite")
        await settle()
        assert "polite" == pool.engine.order[-1], "whose turn it is does not wait for the calls of others"
        pool.engine.finish("polite")
        assert 200 == (await polite).status_code
        while pool.engine.num_running():
            pool.engine.finish("flood")
            await settle()
        assert {200: 20, 429: 10} == _count([(await task).status_code for task in flood])
        assert 10 == pool.book.accounts["flood"].refused["a", "queue"]

    asyncio.run(main())


def _count(statuses: list[int]) -> dict[int, int]:
    return {status: statuses.count(status) for status in set(statuses)}


def test_weights_share_a_busy_model():
    """While both wait, a tenant of weight 3 has three times the calls of one of weight 1."""

    async def main() -> None:
        pool = Pool(tenant("big", weight=3.0), tenant("small"))
        tasks = [pool.start(name) for _ in range(80) for name in ("big", "small")]
        await settle()
        while len(pool.engine.order) < 84:
            for name in ("big", "small"):
                if pool.engine.going.get(name):
                    pool.engine.finish(name)
                    await settle()
        served = pool.engine.order[20:84]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert abs(served.count("big") - 48) <= 6

    asyncio.run(main())


def test_servers_share_a_limit():
    """With a third of the limit each, three servers let through what one would."""
    books = [TenantBook([tenant("a", requests_per_minute=30, tokens_per_minute=300, max_concurrent=9)]) for _ in "xyz"]
    passed = 0
    for book in books:
        book.set_leases({"a": Lease(1 / 3, 3)})
        account = book.accounts["a"]
        while account.refusal(POST, "a") is None:
            account.begin(POST, "a", 0).close()
            passed += 1
    assert 30 == passed
    calls = []
    for book in books:
        account = book.accounts["a"]
        account.request_bucket.take(0.0, -1000)
        while account.refusal(POST, "a") is None:
            calls.append(account.begin(POST, "a", 0))
    assert 9 == len(calls)


def test_a_server_without_a_place_of_a_tenant_refuses_until_it_has_one():
    """A small limit may have fewer places than there are servers; the wait is short."""
    account = TenantBook([tenant("a", max_concurrent=1)]).accounts["a"]
    account.set_lease(Lease(0.5, 0))
    refused = account.refusal(POST, "a")
    assert refused is not None and (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    account.set_lease(Lease(0.5, 1))
    assert account.refusal(POST, "a") is None
    account.begin(POST, "a", 0)
    assert account.refusal(POST, "a") is not None


def test_reports_hold_limits_usage_and_no_keys():
    """What an admin sees can be shown to anybody: a number of keys, not their digests."""
    book = TenantBook([tenant("a", requests_per_minute=5, models=("m",)), tenant("b", weight=2.0)])
    account = book.accounts["a"]
    account.begin(POST, "m", 0, 2).put_out("r", 4)
    account.refused["other", "models"] += 1
    report = json.loads(json.dumps(book.report()))

    assert {"a", "b", "default"} == report.keys()
    usage = {"requests": 1, "sequences": 2, "prompt_tokens": 0, "completion_tokens": 4}
    assert {"m": usage} == report["a"]["usage"]
    assert (1, 2, {"models": 1}) == (report["a"]["num_keys"], report["a"]["inflight"], report["a"]["refused"])
    assert 5 == report["a"]["limits"]["requests_per_minute"]
    assert b"a".ljust(32).hex() not in json.dumps(report)


def authenticated(book: TenantBook, **keys: Any) -> Callable[..., Account | int | None]:
    """Tells whom a request with these headers is from, or with which status it is refused."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope.get(TENANT_KEY))
        await Response()(scope, receive, send)

    auth = ApiKeyAuth(app, **{"api_keys": (), "admin_keys": (), **keys}, **book.auth_options())

    async def main(path: str, headers: dict[str, str]) -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(auth), base_url="http://pool") as client:
            answer = await client.get(path, headers=headers)
        return seen.pop() if answer.status_code == 200 else answer.status_code

    return lambda path=CHAT, **headers: asyncio.run(main(path, {k.replace("_", "-"): v for k, v in headers.items()}))


def test_keys_tell_tenants_apart():
    """Each key is its tenant's, the pool's own keys are the default tenant's, and none or a wrong one is refused."""
    a, b = (TenantConfig(n, keys=tuple(_sha(f"{n}{i}") for i in range(3))) for n in "ab")
    book = TenantBook([a, b])
    whose = authenticated(book, api_keys=["api"], admin_keys=["admin"])

    for i in range(3):
        assert book.accounts["a"] is whose(authorization=f"Bearer a{i}")
        assert book.accounts["b"] is whose(x_api_key=f"b{i}")
    assert book.default is whose(authorization="Bearer api") is whose(authorization="Bearer admin")
    assert 401 == whose() == whose(authorization="Bearer a3") == whose(x_api_key="")
    assert 401 == whose("/v1/pool/tenants", authorization="Bearer a0")
    assert whose("/health") is None


def test_without_any_key_everybody_is_the_default_tenant():
    """A pool file with limits for `default` and no keys limits all."""
    book = TenantBook([TenantConfig("default", requests_per_minute=1)])
    whose = authenticated(book)

    assert book.default is whose()
    assert book.default is book.accounts["default"]


def _sha(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def test_without_tenants_nothing_is_held():
    """A pool without tenants has no lines, and its calls no account."""
    router = make_router("a")

    assert router.models["a"].gate.line is None


def test_a_flood_leaves_seats_to_who_uses_the_model_too():
    """Of eight seats a flood gets five beside a tenant with two calls, however fast its first tokens come."""

    async def main() -> None:
        pool = Pool(tenant("flood"), tenant("polite"))
        assert pool.model.gate.line is not None
        pool.model.gate.line.shares.seats = 8
        tasks = [pool.start(name) for name in ("polite", "polite", *["flood"] * 20)]
        await settle()
        for _ in range(20):
            for request_id, call in list(pool.engine.request_states.items()):
                call.put_out(request_id, 1)
            await settle()
        assert {"polite": 2, "flood": 5} == {name: pool.engine.order.count(name) for name in ("polite", "flood")}
        pool.engine.finish("flood")
        await settle()
        assert 6 == pool.engine.order.count("flood"), "a seat that is left is taken again"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())


def test_a_line_tells_how_many_go_before():
    """A new call waits behind its tenant's own, and behind as many of each other tenant's."""

    async def main() -> None:
        book = TenantBook([tenant("a"), tenant("b"), tenant("c")])
        line = TenantLine(book.weight_of, engine_queue=0)
        tasks = []
        for name, count in (("a", 5), ("b", 2)):
            for _ in range(count + 1):  # the first of each goes to the engine
                call = Call(book.accounts[name], "m", 0.0)
                tasks.append(asyncio.create_task(line.enter(call, asyncio.Event().wait)))
        await settle()
        assert {"a": 5 + 2, "b": 2 + 3, "c": 0 + 1 + 1} == {name: line.num_before(name) for name in "abc"}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert 0 == len(line)

    asyncio.run(main())


@settings(max_examples=300, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"authorization", b"x-api-key", b"cookie", b"content-type"]),
            st.binary(max_size=60) | st.sampled_from([b"Bearer", b"Bearer ", b"bearer  a0x", b"Basic a0", b"\xff"]),
        ),
        max_size=6,
    )
)
def test_no_malformed_header_lets_anybody_in(headers):
    """Whatever bytes the headers hold, without a key the answer is 401, and nothing breaks."""
    book = TenantBook([TenantConfig("a", keys=tuple(_sha(f"a{i}") for i in range(3)))])
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("let in")

    async def main() -> None:
        async def send(message: Any) -> None:
            sent.append(message)

        auth = ApiKeyAuth(app, api_keys=["api"], admin_keys=["admin"], **book.auth_options())
        await auth({**POST, "headers": headers}, asyncio.Event().wait, send)

    asyncio.run(main())
    assert 401 == sent[0]["status"]
