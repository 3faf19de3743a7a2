# SPDX-License-Identifier: Apache-2.0
"""What a request hears that names no model, or one that is not there."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tests.serve.gateway.test_router import CHAT, choose, fetch, make_app, make_router, post, set_vllm_state, two
from tokenpool.serve.gateway.model_app import ModelApp

pytestmark = pytest.mark.cpu


def test_a_request_for_no_model_is_told_aliases_too() -> None:
    """Each name that a model answers to is among those that are told, behind the model's own."""
    router = two()
    set_vllm_state(router.models["org/b"], {"lora-1": object()})
    message = post(router, json={"model": "x"}).json()["error"]["message"]

    assert message.endswith("Known models: a, org/b, lora-1, served-org/b")


def make_routed(name: str, *routes: tuple[str, str]) -> ModelApp:
    """Return a model whose app has these methods and paths alone."""

    async def told(request: Request) -> JSONResponse:
        return JSONResponse({"app": name})

    app = Starlette(routes=[Route(path, told, methods=[method]) for method, path in routes])
    return ModelApp(name, app, "ready")


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [("POST", CHAT, 400), ("POST", "/v1/embeddings", 400), ("GET", "/v1/nope", 404), ("POST", "/v1/nope", 404)]
    + [("GET", CHAT, 405), ("DELETE", "/v1/embeddings", 405), ("OPTIONS", CHAT, 405), ("OPTIONS", "/v1/nope", 404)],
)
def test_a_route_that_no_model_has_needs_no_name(method: str, path: str, expected: int) -> None:
    """Unknown paths and wrong methods are answered by an app, as with one model; other requests need a name."""
    router = make_router()
    router.add(make_routed("a", ("POST", CHAT)))
    router.add(make_routed("b", ("POST", "/v1/embeddings")))

    assert choose(router, method, path) == expected
    router.models["b"].app = make_app("not there yet").__call__  # it may have any route
    assert choose(router, method, path) in (expected, 400)


def test_a_model_is_asked_for_in_the_shape_of_the_messages_api() -> None:
    """What the router refuses below /v1/messages is one of Anthropic's errors."""
    for body, status in (({}, 400), ({"model": "x"}, 404)):
        response = post(two(), "/v1/messages", json=body)
        assert (status, "error", {"type", "message"}) == (
            response.status_code, response.json()["type"], set(response.json()["error"]))  # fmt: skip


def test_an_unseen_adapter_goes_to_the_one_model_that_may_find_it() -> None:
    """vLLM's LoRA resolver plugins load adapters by name on demand; two such models would be a guess."""
    router = two()
    set_vllm_state(router.models["org/b"], lora_resolvers=[object()])
    assert choose(router, "POST", CHAT, json={"model": "new"}) == "org/b"
    set_vllm_state(router.models["a"], lora_resolvers=[object()])
    assert choose(router, "POST", CHAT, json={"model": "new"}) == 404


def test_a_stored_response_is_found_where_it_was_made() -> None:
    """GET and cancel of a stored response go to its model; an id nobody has is 404 in vLLM's words."""
    router = two()
    set_vllm_state(router.models["org/b"], responses={"resp_1": object()})

    assert choose(router, "GET", "/v1/responses/resp_1?stream=true") == "org/b"
    assert choose(router, "POST", "/v1/responses/resp_1/cancel") == "org/b"
    assert choose(router, "GET", "/v1/responses/resp_2") == 404
    error = fetch(router, "GET", "/v1/responses/resp_2").json()["error"]
    assert ("Response with id 'resp_2' not found.", "invalid_request_error") == (error["message"], error["type"])
    assert choose(router, "POST", "/v1/responses/render", json={"model": "a"}) == "a"
    assert choose(make_router("a"), "GET", "/v1/responses/resp_2") == "a"
