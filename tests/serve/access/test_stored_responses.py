# SPDX-License-Identifier: Apache-2.0
"""Stored responses belong to the tenant who made them, whatever ids others choose."""

from __future__ import annotations

import asyncio
from collections import deque
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tests.serve.access.test_tenants import Pool, tenant
from tokenpool.serve.access.stored_responses import MAX_ID_CHARS, TenantStore, has_response, keep_apart
from tokenpool.serve.access.tenant_call import CURRENT_CALL
from tokenpool.serve.gateway.model_app import ModelApp

pytestmark = pytest.mark.cpu


def responses_app() -> Starlette:
    """As vLLM's Responses API keeps what it stores."""
    serving = SimpleNamespace(response_store={}, msg_store={}, event_store={}, background_tasks={}, other={})

    async def create(request: Request) -> JSONResponse:
        body = await request.json()
        if (before := body.get("previous_response_id")) is not None and before not in serving.response_store:
            return JSONResponse({"error": before}, 404)
        serving.response_store[body["request_id"]] = body["input"]
        return JSONResponse({"id": body["request_id"]})

    async def show(request: Request) -> JSONResponse:
        found = serving.response_store.get(request.path_params["id"])
        return JSONResponse({"output": found}, 200 if found is not None else 404)

    app = Starlette(routes=[
        Route("/v1/responses", create, methods=["POST"]), Route("/v1/responses/{id}", show),
        Route("/v1/responses/{id}/cancel", show, methods=["POST"]),
    ])  # fmt: skip
    app.state.openai_serving_responses = serving
    keep_apart(serving)
    return app


async def ask(pool: Pool, name: str, method: str, path: str, **body: Any) -> tuple[int, Any]:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["tokenpool.tenant"] = pool.book.accounts[name]
        await pool.router(scope, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://pool") as client:
        answer = await client.request(method, path, json=body or None)
    return answer.status_code, answer.json()


@pytest.mark.parametrize("num_models", [1, 2])
def test_a_response_is_found_by_who_made_it(num_models):
    """Another tenant gets 404 for it, to read, to cancel or to go on from, and cannot overwrite it by its id."""

    async def main() -> None:
        pool = Pool(tenant("a"), tenant("b"), engine=responses_app())
        if num_models == 2:
            pool.router.add(ModelApp("b", responses_app(), "ready"))
        for name in ("a", "b"):
            body = {"request_id": "resp_1", "input": f"of {name}", "model": "a"}
            assert 200 == (await ask(pool, name, "POST", "/v1/responses", **body))[0]
        assert 200 == (await ask(pool, "a", "POST", "/v1/responses", **body | {"request_id": "resp_2"}))[0]
        assert [(200, {"output": f"of {name}"}) for name in ("a", "b")] == [
            await ask(pool, name, "GET", "/v1/responses/resp_1") for name in ("a", "b")
        ]
        for method, path in (("GET", "/v1/responses/resp_2"), ("POST", "/v1/responses/resp_2/cancel")):
            assert (200, 404) == ((await ask(pool, "a", method, path))[0], (await ask(pool, "b", method, path))[0])
        body |= {"request_id": "resp_3", "previous_response_id": "resp_2"}
        assert 404 == (await ask(pool, "b", "POST", "/v1/responses", **body))[0]
        assert 200 == (await ask(pool, "a", "POST", "/v1/responses", **body))[0]

    asyncio.run(main())


def test_only_what_is_stored_is_kept_apart():
    """A model without the API, and attributes of another name, are left as they are."""
    serving = SimpleNamespace(response_store={}, other={})
    keep_apart(serving)
    keep_apart(None)
    assert isinstance(serving.response_store, TenantStore) and isinstance(serving.other, dict)
    assert not has_response(None, "r", "") and has_response(SimpleNamespace(response_store={"r": 1}), "r", "a")


def test_a_mapping_of_one_tenant_is_a_mapping():
    """All that vLLM does with its own works, in a pool without tenants too."""
    store = TenantStore()
    store["r"] = 1
    store["s"] = 2
    assert (["r", "s"], 2, 1, None, 7) == (list(store), len(store), store.pop("r"), store.get("r"), store.pop("r", 7))
    assert store.holds("", "s") and not store.holds("a", "s")


def test_a_background_task_keeps_its_call():
    """The tenant's sequences are counted until the task has ended, also between two of them."""

    async def main() -> None:
        account = Pool(tenant("a")).book.accounts["a"]
        call = account.begin({"type": "http", "method": "POST"}, "m", 0)
        token, ends, store = CURRENT_CALL.set(call), asyncio.Event(), TenantStore()
        store["resp"] = task = asyncio.create_task(ends.wait())
        CURRENT_CALL.reset(token)
        call.close()
        assert 1 == account.num_sequences
        ends.set()
        await task
        await asyncio.sleep(0)
        assert 0 == account.num_sequences

    asyncio.run(main())


class Serving:
    """The parts of vLLM's Responses API that streams of stored responses go through."""

    def __init__(self) -> None:
        self.response_store: Any = {}
        self.msg_store: Any = {}
        self.event_store: Any = {}
        self.background_tasks: Any = {}
        self.ends = asyncio.Event()

    def create_error_response(self, **fields: Any) -> dict[str, Any]:
        return fields

    async def create_responses(self, request: Any, raw_request: Any = None) -> Any:
        self.response_store[request.request_id] = request
        return request

    async def responses_background_stream_generator(self, response_id: str, starting_after: Any = None) -> Any:
        raise NotImplementedError
        yield

    async def retrieve_responses(self, response_id: str, starting_after: Any, stream: Any) -> Any:
        found = self.response_store.get(response_id)
        if found is None or not stream:
            return found
        return self.responses_background_stream_generator(response_id, starting_after)

    def begin(self, response_id: str, *, num_events: int = 3, last: str = "response.completed") -> None:
        """A background stream that has had some events; its last one comes when `ends` is set."""
        events, news = deque(SimpleNamespace(type="delta") for _ in range(num_events)), asyncio.Event()
        self.response_store[response_id] = "a response"
        self.event_store[response_id] = (events, news)

        async def run() -> None:
            try:
                await self.ends.wait()
                events.append(SimpleNamespace(type=last))
            finally:
                news.set()

        task = asyncio.create_task(run())
        self.background_tasks[response_id] = task
        task.add_done_callback(lambda _: self.background_tasks.pop(response_id, None))

    async def events(self, response_id: str, starting_after: Any = None) -> list[str]:
        return [event.type async for event in await self.retrieve_responses(response_id, starting_after, True)]


@pytest.mark.parametrize("end", ["response.completed", "response.failed", "cancelled"])
@pytest.mark.parametrize("after", [None, 1, 1000])
def test_a_stream_of_a_stored_response_ends(end: str, after: int | None):
    """However who makes it ends: of two readers at once, of one that comes later, and of one that asks for what is
    not there yet."""

    async def main() -> None:
        serving = Serving()
        keep_apart(serving)
        serving.begin("r", last=end)
        readers = [asyncio.create_task(serving.events("r", after)) for _ in range(2)]
        await asyncio.sleep(0.01)
        assert not any(reader.done() for reader in readers)
        if end == "cancelled":
            serving.background_tasks["r"].cancel()
        serving.ends.set()
        whole = ["delta"] * 3 + [end] * (end != "cancelled")
        expected = whole if after is None else whole[after + 1 :]
        async with asyncio.timeout(5):
            assert [expected] * 3 == [*await asyncio.gather(*readers), await serving.events("r", after)]

    asyncio.run(main())


@pytest.mark.parametrize(("response_id", "after", "param"), [("plain", None, "stream"), ("r", -1, "starting_after")])
def test_a_stream_that_cannot_be_is_refused(response_id: str, after: Any, param: str):
    """With an error that says why, before anything is sent."""

    async def main() -> None:
        serving = Serving()
        keep_apart(serving)
        serving.begin("r")
        serving.response_store["plain"] = "a response"
        refused = await serving.retrieve_responses(response_id, after, True)
        assert (400, param) == (refused["status_code"], refused["param"])
        assert None is await serving.retrieve_responses("none", after, True)
        serving.ends.set()

    asyncio.run(main())


def test_the_oldest_of_a_tenant_goes_when_it_has_too_much():
    """With all that is stored of it, unless it runs; another tenant's stays, and so does the newest."""

    async def main() -> None:
        accounts, serving = Pool(tenant("a"), tenant("b")).book.accounts, Serving()
        keep_apart(serving)
        shelf = serving.response_store._shelf
        shelf._max_bytes = 14_000  # for three, of which each has some thousand bytes beside its texts

        def as_tenant(name: str) -> None:
            CURRENT_CALL.set(accounts[name].begin({"type": "http", "method": "POST"}, "m", 0))

        as_tenant("b")
        serving.response_store["theirs"] = "x" * 900
        as_tenant("a")
        serving.begin("runs", num_events=10)
        for number in range(4):
            serving.msg_store[f"r{number}"] = ["x" * 100, "x" * 100]
            serving.response_store[f"r{number}"] = "x" * 200
        assert ["runs", "r2", "r3"] == list(serving.response_store) and ["r2", "r3"] == list(serving.msg_store)
        assert serving.response_store.holds("b", "theirs")
        serving.ends.set()
        await asyncio.sleep(0.01)  # its events count when it has ended
        serving.response_store["large"] = "x" * 15_000
        assert ["large"] == list(serving.response_store) and [] == list(serving.event_store)
        assert {"large"} == set(shelf._sizes["a"]) and not shelf._running

    asyncio.run(main())


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"request_id": "x" * (MAX_ID_CHARS + 1)}, "request_id"),
        ({"request_id": "resp_\ud800"}, "request_id"),
        ({"request_id": "runs"}, "request_id"),
        ({"previous_response_id": "x" * 100_000}, "previous_response_id"),
        ({}, None),
        ({"request_id": "x" * MAX_ID_CHARS, "previous_response_id": "none"}, None),
    ],
)
def test_ids_that_cannot_be_kept_are_refused(given: dict[str, str], param: str | None):
    """Long ones, which would come back with each token, ones that are no text, and that of one which is being made."""

    async def main() -> None:
        serving = Serving()
        keep_apart(serving)
        serving.begin("runs")
        request = SimpleNamespace(**{"request_id": "resp_1", "previous_response_id": None} | given)
        answer = await serving.create_responses(request, None)
        if param is None:
            assert answer is request
        else:
            assert (400, param) == (answer["status_code"], answer["param"])
            assert ["runs"] == list(serving.response_store)
        serving.ends.set()

    asyncio.run(main())


@pytest.mark.parametrize("second", [{"background": True}, {"background": False}, {"tenant": "b"}])
def test_of_two_that_come_with_one_id_at_once_the_second_is_refused(second: dict[str, Any]):
    """Also while the first is still being begun, as long as it takes to read its images; others may have the id."""

    async def main() -> None:
        accounts, serving, rendered = Pool(tenant("a"), tenant("b")).book.accounts, Serving(), asyncio.Event()
        create = serving.create_responses

        async def slow_create(request: Any, raw_request: Any = None) -> Any:
            await rendered.wait()
            return await create(request)

        serving.create_responses = slow_create  # type: ignore[method-assign]
        keep_apart(serving)

        async def ask(background: bool = True, tenant: str = "a") -> Any:
            CURRENT_CALL.set(accounts[tenant].begin({"type": "http", "method": "POST"}, "m", 0))
            asked = {"request_id": "resp_1", "previous_response_id": None, "background": background}
            return await serving.create_responses(SimpleNamespace(**asked))

        asking = [asyncio.create_task(ask()), asyncio.create_task(ask(**second))]
        await asyncio.sleep(0.01)
        rendered.set()
        first, other = await asyncio.gather(*asking)
        assert first.request_id == "resp_1"
        if "tenant" in second:
            assert other.request_id == "resp_1"
        else:
            assert (400, "request_id") == (other["status_code"], other["param"])
        assert "resp_1" == (await ask()).request_id, "nobody makes one of this id any more"

    asyncio.run(main())


def test_a_reader_waits_for_who_made_what_it_reads():
    """Not for another response that has got the same id since, and may never end."""

    async def main() -> None:
        serving = Serving()
        keep_apart(serving)
        serving.begin("r")
        reader = asyncio.create_task(serving.events("r"))
        await asyncio.sleep(0)
        serving.ends.set()
        serving.ends = asyncio.Event()
        first = serving.background_tasks["r"]
        serving.begin("r")
        async with asyncio.timeout(5):
            await first
            assert 3 <= len(await reader)
        serving.ends.set()

    asyncio.run(main())


def test_others_have_turns_while_a_stored_stream_is_sent():
    """However many events there are, and however fast they are taken."""

    async def main() -> None:
        serving = Serving()
        keep_apart(serving)
        serving.begin("r", num_events=1000)
        serving.ends.set()
        await asyncio.sleep(0.01)
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        assert 1001 == len(await serving.events("r"))
        task.cancel()
        assert turns >= 1000 // 16

    asyncio.run(main())


@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_a_response_that_nobody_makes_any_more_is_not_queued(how: str):
    """It says what became of it; one that was cancelled keeps its word."""

    async def main() -> None:
        serving = Serving()
        keep_apart(serving)
        response = serving.response_store["r"] = SimpleNamespace(status="queued")

        async def run() -> None:
            await serving.ends.wait()
            raise RuntimeError("the engine is gone")

        serving.background_tasks["r"] = task = asyncio.create_task(run())
        if how == "cancelled":
            task.cancel()
        serving.ends.set()
        await asyncio.wait([task])
        await asyncio.sleep(0)
        assert how == response.status

    asyncio.run(main())


def test_what_is_no_text_counts_too():
    """Its size is known although it is no JSON; an id counts, and so do the objects of a small response."""

    class Odd:
        def model_dump_json(self) -> str:
            return "\ud800".encode()  # type: ignore[return-value]

    serving = Serving()
    keep_apart(serving)
    shelf = serving.response_store._shelf
    serving.response_store["x" * 1000] = Odd()
    serving.response_store["small"] = ""
    sizes = shelf._sizes[""]
    assert sizes["x" * 1000] > 5000 and sizes["small"] >= 4096
    assert shelf._totals[""] == sum(sizes.values())
