# SPDX-License-Identifier: Apache-2.0
"""Flags of vLLM that are about the port hold for all of it: the pool's own routes and refusals as well as models'."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import uvloop
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from vllm.entrypoints.launchers.app import build_app

from tokenpool.config import ModelSpec
from tokenpool.errors import ConfigError
from tokenpool.serve.access.auth import ApiKeyAuth
from tokenpool.serve.access.tenants import TenantBook
from tokenpool.serve.gateway.endpoints import build_outer_app
from tokenpool.serve.gateway.model_app import ModelApp
from tokenpool.serve.gateway.router import ModelRouter
from tokenpool.serve.http.port import drop_port_parts, while_there, with_port_flags, without_port_flags
from tokenpool.serve.launch.flags import parse_serve_flags
from tokenpool.serve.launch.launch_plan import plan_model
from tokenpool.tenant_config import TenantConfig

pytestmark = pytest.mark.vllm

KEY = {"authorization": "Bearer client-key-0123456789"}
ADMIN = {"authorization": "Bearer admin-key-0123456789"}
TENANT = {"x-api-key": "tenant-key-0123456789"}
NARROW = TenantConfig("t", (hashlib.sha256(TENANT["x-api-key"].encode()).digest(),), models=("b",))
ANSWERS = [
    (200, "GET", "/health", {}),
    (200, "GET", "/ready", {}),
    (200, "GET", "/v1/models", KEY),
    (200, "POST", "/v1/completions", KEY),
    (401, "POST", "/v1/completions", {}),
    (401, "OPTIONS", "/v1/completions", {}),
    (401, "GET", "/v1/pool/state", KEY),
    (404, "GET", "/models/nobody/x", KEY),
    (404, "GET", "/v1/nope", KEY),
    (405, "POST", "/health", KEY),
    (405, "GET", "/v1/completions", KEY),
]


async def answer(request: Request) -> JSONResponse:
    return JSONResponse({"root_path": request.scope["root_path"], "app": request.app.state.name})


def make_model(name: str) -> ModelApp:
    app = Starlette(routes=[Route("/v1/completions", answer, methods=["POST"]), Route("/where", answer)])
    app.state.name = name
    return ModelApp(name, app, "ready")


def port(*flags: str, names: tuple[str, ...] = ("a", "b"), api_keys: Any = ("client-key-0123456789",),
         tenants: Any = ()) -> TestClient:  # fmt: skip
    """The port as `run` makes it, over models without vLLM."""
    outer, book = build_outer_app(), TenantBook(tenants) if tenants else None
    router = ModelRouter(outer, max_request_bytes=1000, tenants=book)
    for name in names:
        router.add(make_model(name))
    outer.state.pool = SimpleNamespace(router=router, ready=True, tenants=book)
    options = book.auth_options() if book else {}
    auth = ApiKeyAuth(router, api_keys=api_keys, admin_keys=("admin-key-0123456789",), **options)
    app = with_port_flags(auth, plan_model(ModelSpec("a", "org/a", flags)).args, outer)
    return TestClient(app, raise_server_exceptions=False)


class Stamp:
    """A middleware by class, as users write them."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def stamped(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-stamp", b"class")]
            await send(message)

        await self.app(scope, receive, stamped)


async def stamp(request: Request, call_next: Any) -> Any:
    """One by function."""
    response = await call_next(request)
    response.headers["x-function"] = type(request.app).__name__
    return response


async def fail(request: Request, call_next: Any) -> Any:
    raise RuntimeError("of a user")


@pytest.fixture
def middleware(monkeypatch):
    module = ModuleType("their_middleware")
    module.Stamp, module.stamp, module.fail, module.number = Stamp, stamp, fail, 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "their_middleware", module)


@pytest.fixture
def root_logger():
    """As it was: what vLLM imports with its first app raises the level."""
    logger = logging.getLogger()
    before = logger.level
    yield
    logger.setLevel(before)


def send(client: TestClient, method: str, path: str, headers: Any) -> Any:
    body = {"json": {"model": "a"}} if method == "POST" else {}
    return client.request(method, path, headers=headers, **body)


@pytest.mark.parametrize(("status", "method", "path", "headers"), ANSWERS)
def test_middleware_and_request_ids_are_on_every_answer(middleware, status, method, path, headers):
    """Of a class or a function, once; an id that the client gave comes back."""
    flags = ("--middleware", "their_middleware.Stamp", "--middleware", "their_middleware.stamp",
             "--enable-request-id-headers")  # fmt: skip
    response = send(port(*flags), method, path, headers | {"x-request-id": "mine"})

    assert (status, "class", "Starlette") == (
        response.status_code, response.headers["x-stamp"], response.headers["x-function"])  # fmt: skip
    assert ["mine"] == response.headers.get_list("x-request-id")


@pytest.mark.parametrize(("status", "method", "path", "headers"), ANSWERS)
def test_without_the_flags_there_is_nothing_of_them(status, method, path, headers):
    """The port adds no header of its own."""
    response = send(port(), method, path, headers)
    assert status == response.status_code
    assert "x-request-id" not in response.headers


@pytest.mark.parametrize(("status", "method", "path", "headers"), ANSWERS)
def test_a_root_path_is_before_every_path_or_not(status, method, path, headers):
    """As with vLLM, a proxy may leave it or take it away: keys are asked for, and routes found, all the same."""
    client = port("--root-path", "/llm")
    assert {status} == {send(client, method, root + path, headers).status_code for root in ("", "/llm")}


def test_a_model_knows_where_its_routes_are():
    """The root path of a request holds that of the proxy and the model's prefix, so that links in its pages work."""
    client = port("--root-path", "/llm")
    below = client.get("/llm/models/b/where", headers=KEY).json()
    assert {"root_path": "/llm/models/b", "app": "b"} == below


def test_a_middleware_that_fails_gives_an_error_of_the_api(middleware):
    """500 in the shape that the path asks for, and not what it raised."""
    client = port("--middleware", "their_middleware.fail")
    for path, keys in (("/v1/completions", {"error"}), ("/v1/messages", {"error", "type"})):
        response = client.post(path, json={}, headers=KEY)
        assert (500, keys) == (response.status_code, set(response.json()))
        assert "of a user" not in response.text


@pytest.mark.parametrize("name", ["no_such_module.X", "their_middleware.nope", "their_middleware.number", "plain"])
def test_a_middleware_that_cannot_be_loaded_is_refused(middleware, name):
    """In one line that names the flag and what it was given."""
    with pytest.raises(ConfigError, match=f"--middleware: .*{name}"):
        port("--middleware", name)


def test_pool_paths_that_there_are_not_have_vllms_shape():
    """404 and 405 of the pool's own routes are those of a model's, with the methods that there are."""
    client = port()
    for method, path, status, text in (("POST", "/health", 405, "Method Not Allowed"),
                                       ("GET", "/v1/pool/nope", 404, "Not Found")):  # fmt: skip
        response = client.request(method, path, headers=ADMIN)
        error = {"message": text, "type": text, "param": None, "code": status}
        assert (status, {"error": error}) == (response.status_code, response.json())
    assert "GET" in client.post("/health").headers["allow"]


@pytest.mark.parametrize(
    ("options", "headers", "body"),
    [
        ({}, {}, {"ready": True}),
        ({}, {"authorization": "Bearer wrong"}, {"ready": True}),
        ({}, KEY, {"a": "ready", "b": "ready"}),
        ({}, ADMIN, {"a": "ready", "b": "ready"}),
        ({"api_keys": ()}, {}, {"a": "ready", "b": "ready"}),
        ({"tenants": [NARROW]}, TENANT, {"b": "ready"}),
        ({"tenants": [NARROW]}, {}, {"ready": True}),
    ],
)
def test_ready_names_models_to_those_who_may_use_them(options, headers, body):
    """The status is for probes; names need a key, if the pool asks for any."""
    response = port(**options).get("/ready", headers=headers)
    assert (200, body) == (response.status_code, response.json())


def test_an_unknown_card_names_what_its_reader_may_use():
    """A model that a tenant may not use is not among them, nor is it told from one that does not exist."""
    client = port(tenants=[NARROW])
    texts = [client.get(f"/v1/models/{name}", headers=TENANT).json()["error"]["message"] for name in ("a", "x")]
    assert ["The model `a` does not exist. Known models: b", "The model `x` does not exist. Known models: b"] == texts


def test_a_slash_behind_the_list_of_models_leads_to_it():
    """As behind any other route; without a key it leads nowhere."""
    client = port()
    response = client.get("/v1/models/", headers=KEY, follow_redirects=False)
    assert (307, "http://testserver/v1/models") == (response.status_code, response.headers["location"])
    assert 401 == client.get("/v1/models/", follow_redirects=False).status_code


def test_a_models_app_has_nothing_of_the_port(middleware, root_logger):
    """vLLM's own app, built from flags with all of them: no middleware twice, no metrics of the process, no root."""
    flags = ("--middleware", "their_middleware.Stamp", "--enable-request-id-headers", "--root-path", "/llm",
             "--allowed-origins", '["*"]')  # fmt: skip
    args = parse_serve_flags(["org/a", *flags])
    app: FastAPI = build_app(without_port_flags(args), ("generate",))
    drop_port_parts(app)
    app.state.args, app.state.enable_server_load_tracking = args, False
    client = TestClient(app)
    for method in ("GET", "OPTIONS", "POST"):
        for path in ("/metrics", "/metrics/", "/metricsx", "/metrics/x"):
            assert 404 == client.request(method, path).status_code, (method, path)
    response = client.get("/version", headers={"origin": "http://x"})
    assert 200 == response.status_code
    assert not {"x-stamp", "x-request-id", "access-control-allow-origin"} & set(response.headers)
    assert ("", ["their_middleware.Stamp"]) == (app.root_path, args.middleware)


def test_bodies_of_errors_are_json_for_each_api():
    """What the router refuses before it knows a model has the shape of the path that was asked for."""
    client = port()
    for path, told in (("/v1/completions", "error"), ("/v1/messages", "type")):
        body = b'{"model": "' + b"x" * 2000 + b'"}'
        response = client.post(path, content=body, headers=KEY)
        assert (413, True) == (response.status_code, told in json.loads(response.content))


def test_what_a_client_that_has_gone_would_get_is_dropped():
    """It is nobody's error that uvloop refuses to write to a connection that has just ended; other errors are told."""

    async def main() -> None:
        loop, made = asyncio.get_running_loop(), asyncio.Event()
        transports: list[Any] = []

        class Server(asyncio.Protocol):
            def connection_made(self, transport: Any) -> None:
                transports.append(transport)
                made.set()

        server = await loop.create_server(Server, "127.0.0.1", 0)
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        await made.wait()
        transports[0].abort()
        await asyncio.sleep(0.05)

        async def send(message: Any) -> None:
            transports[0].write(message["body"])

        async def fail(message: Any) -> None:
            raise RuntimeError("another one")

        body = {"type": "http.response.body", "body": b"token"}
        with pytest.raises(RuntimeError, match="the handler is closed$"):
            await send(body)
        await while_there(send)(body)
        with pytest.raises(RuntimeError, match="another one"):
            await while_there(fail)(body)
        writer.close()
        server.close()

    uvloop.run(main())
