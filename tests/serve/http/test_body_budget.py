# SPDX-License-Identifier: Apache-2.0
"""What a frontend keeps of bodies is bounded, and a tenant's limits are judged before its body is read."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, PlainTextResponse

from tests.serve.access.test_tenants import settle, tenant
from tests.serve.gateway.test_router import CHAT, chunk, make_scope
from tokenpool.process.heap import HeapTrimmer
from tokenpool.serve.access.auth import TENANT_KEY
from tokenpool.serve.access.tenants import TenantBook
from tokenpool.serve.gateway.model_app import ModelApp
from tokenpool.serve.gateway.router import ModelRouter
from tokenpool.serve.http.body_budget import LARGEST_BODIES, BodyBudget

pytestmark = pytest.mark.cpu

LIMIT = 1000
LARGE = b'{"model": "a", "x": "' + b" " * (LIMIT - 23) + b'"}'


class Client:
    """One request whose body comes as the test says."""

    def __init__(self, pool: Pool, name: str = "", method: str = "POST", headers: Any = None) -> None:
        self.messages: asyncio.Queue[Any] = asyncio.Queue()
        self.num_reads = 0
        self.sent: list[Any] = []
        scope = make_scope(CHAT, {"transfer-encoding": "chunked", **(headers or {})}, method=method)
        if name:
            scope[TENANT_KEY] = pool.book.accounts[name]
        self.task = asyncio.create_task(pool.router(scope, self.receive, self.send))

    async def receive(self) -> Any:
        self.num_reads += 1
        return await self.messages.get()

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    async def whole(self, body: bytes = LARGE) -> Client:
        """Send the body, in two pieces, and wait until nothing goes on."""
        self.messages.put_nowait(chunk(body[:10], more=True))
        self.messages.put_nowait(chunk(body[10:]))
        await settle()
        return self

    async def status(self) -> int:
        await asyncio.wait_for(self.task, 5)
        return self.sent[0]["status"]

    @property
    def retry_after(self) -> bytes | None:
        return dict(self.sent[0]["headers"]).get(b"retry-after")


class Pool:
    """A router with a model that answers when it may."""

    def __init__(self, *tenants: Any) -> None:
        self.book = TenantBook(tenants)
        self.router = ModelRouter(
            PlainTextResponse("outer"), max_request_bytes=LIMIT, tenants=self.book if tenants else None
        )
        self.may_answer = asyncio.Event()
        self.router.add(ModelApp("a", self.app, "ready"))

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        await self.may_answer.wait()
        await JSONResponse({})(scope, receive, send)


def test_bodies_that_are_there_leave_no_room_for_more():
    """503 with Retry-After for one more than fits, by what it announces or as it comes; an end makes room."""

    async def main() -> None:
        pool = Pool()
        there = [await Client(pool).whole() for _ in range(LARGEST_BODIES)]
        late, announced = Client(pool), Client(pool, headers={"content-length": str(LIMIT)})
        assert (503, 503) == (await announced.status(), await (await late.whole()).status())
        assert (b"2", b"2") == (late.retry_after, announced.retry_after)
        assert (1, 0) == (late.num_reads, announced.num_reads)
        pool.may_answer.set()
        assert {200} == {await client.status() for client in there}
        assert 200 == await (await Client(pool).whole()).status()

    asyncio.run(main())


def test_a_tenant_leaves_room_for_the_bodies_of_others():
    """One that has no other limit is refused when it has as much as it leaves free; who comes then is served."""

    async def main() -> None:
        pool = Pool(tenant("a"), tenant("b"), tenant("c"))
        there = [await Client(pool, "a").whole() for _ in range(LARGEST_BODIES // 2)]
        more = await Client(pool, "a").whole()
        assert (503, b"2") == (await more.status(), more.retry_after)
        there += [await Client(pool, name).whole() for name in ("b", "c", "b")]
        pool.may_answer.set()
        assert {200} == {await client.status() for client in there}
        assert 0 == pool.router._bodies.shares.num_bytes

    asyncio.run(main())


def test_a_client_that_leaves_gives_its_room_back():
    """Nothing counts for bodies whose requests are over, however they ended."""

    async def main() -> None:
        pool = Pool()
        for _ in range(LARGEST_BODIES):
            gone, too_large = Client(pool), Client(pool)
            gone.messages.put_nowait(chunk(LARGE, more=True))
            gone.messages.put_nowait({"type": "http.disconnect"})
            assert 413 == await (await too_large.whole(LARGE * 2)).status()
            await gone.task
        cancelled = await Client(pool).whole()
        cancelled.task.cancel()
        await asyncio.wait({cancelled.task})
        assert 0 == pool.router._bodies.shares.num_bytes

    asyncio.run(main())


@pytest.mark.parametrize("limits", [{"max_concurrent": 1}, {"requests_per_minute": 1}])
def test_a_tenant_over_its_limit_is_refused_before_its_body_is_read(limits):
    """429 without a byte read; another tenant's is read."""

    async def main() -> None:
        pool = Pool(tenant("a", **limits), tenant("b"))
        await Client(pool, "a").whole()
        more = Client(pool, "a")
        assert (429, 0) == (await more.status(), more.num_reads)
        other = await Client(pool, "b").whole()
        pool.may_answer.set()
        assert 200 == await other.status()

    asyncio.run(main())


@pytest.mark.parametrize("method", ["POST", "PUT", "GET"])
def test_a_tenant_has_as_many_bodies_on_the_way_as_requests(method):
    """Bodies that are being read, of any method, are at most its max_concurrent; one that has come is a request."""

    async def main() -> None:
        pool = Pool(tenant("a", max_concurrent=2))
        reading = [Client(pool, "a", method) for _ in range(2)]
        await settle()
        assert 429 == await Client(pool, "a", method).status()
        pool.may_answer.set()
        for client in reading:
            await client.whole()
            assert 200 == await client.status()
        assert 200 == await (await Client(pool, "a", method).whole()).status()

    asyncio.run(main())


def test_the_heap_is_trimmed_after_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a request, not before, it is told how large its body was."""
    freed: list[int] = []
    monkeypatch.setattr(HeapTrimmer, "freed", lambda self, num_bytes: freed.append(num_bytes))

    async def main() -> None:
        async def receive() -> Any:
            return chunk(b"x" * 500)

        with BodyBudget(LIMIT).body() as body:
            await body.read(Headers({}), receive)
            assert not freed

    asyncio.run(main())
    assert freed == [500]
