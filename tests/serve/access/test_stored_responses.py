# SPDX-License-Identifier: Apache-2.0
"""Stored responses belong to the tenant who made them, whatever ids others choose."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tests.serve.access.test_tenants import Pool, tenant
from tokenpool.serve.access.stored_responses import TenantStore, has_response, keep_apart
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
