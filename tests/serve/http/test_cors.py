# SPDX-License-Identifier: Apache-2.0
"""What a browser is told: preflights without a key, and headers on every answer of the port."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient, WebSocketDenialResponse
from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware

from tokenpool.config import ModelSpec
from tokenpool.errors import ConfigError
from tokenpool.serve.access.auth import ApiKeyAuth
from tokenpool.serve.gateway.endpoints import build_outer_app
from tokenpool.serve.gateway.model_app import ModelApp
from tokenpool.serve.gateway.router import ModelRouter
from tokenpool.serve.http.cors import drop_cors, with_cors
from tokenpool.serve.launch.flags import parse_serve_flags
from tokenpool.serve.launch.launch_plan import plan_model

pytestmark = pytest.mark.vllm

UI = "http://ui.example"
PREFLIGHT = {"Origin": UI, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
KEY = {"Authorization": "Bearer k", "Origin": UI}
ALLOWED = "access-control-allow-origin"
ANY = ("--allowed-origins", '["*"]')
PATHS = (
    "/v1/chat/completions",
    "/v1/models",
    "/v1/models/a",
    "/v1/messages",
    "/models/a/v1/chat/completions",
    "/models/nobody/v1/completions",
    "/v1/pool/state",
    "/health",
)


async def answer(request: Request) -> JSONResponse:
    return JSONResponse({}, status_code=int(request.query_params.get("status", 200)))


def make_port(*names: str, flags: tuple[str, ...] = ANY) -> Any:
    """The apps of a pool as `PoolServer` and `run` put them together; models answer with the status asked for."""
    router = ModelRouter(build_outer_app(), max_request_bytes=100)
    for name in names:
        app = Starlette(routes=[Route("/{rest:path}", answer, methods=["GET", "POST"])])
        router.add(ModelApp(name, app, "ready"))
    auth = ApiKeyAuth(router, api_keys=("k",), admin_keys=())
    return with_cors(auth, parse_serve_flags(["org/a", *flags]))


def port(*names: str, **options: Any) -> TestClient:
    return TestClient(make_port(*names, **options))


@pytest.mark.parametrize("names", [("a",), ("a", "b")], ids=len)
@pytest.mark.parametrize("path", PATHS)
def test_a_preflight_needs_neither_a_key_nor_a_model(path, names):
    """It is answered as vLLM's own middleware answers it."""
    plain = TestClient(with_cors(Starlette(), parse_serve_flags(["org/a", *ANY]))).options(path, headers=PREFLIGHT)
    response = port(*names).options(path, headers=PREFLIGHT)

    assert (200, "*") == (response.status_code, response.headers[ALLOWED])
    assert response.headers.items() == plain.headers.items()


@pytest.mark.parametrize(
    ("status", "path", "changes"),
    [
        (200, "/v1/completions", {"json": {"model": "b"}}),
        (429, "/v1/completions?status=429", {"json": {"model": "b"}}),
        (500, "/v1/completions?status=500", {"json": {"model": "a"}}),
        (400, "/v1/completions", {"json": {"prompt": "x"}}),
        (404, "/v1/completions", {"json": {"model": "nobody"}}),
        (404, "/models/nobody/v1/completions", {"json": {}}),
        (405, "/health", {"json": {}}),
        (413, "/v1/completions", {"content": b"x" * 101}),
        (401, "/v1/completions", {"json": {"model": "a"}, "headers": {"Origin": UI}}),
        (403, "/v1/pool/models", {"json": {}}),
    ],
)
def test_every_answer_may_be_read(status, path, changes):
    """Those of any model, and the pool's own refusals."""
    response = port("a", "b").post(path, **{"headers": KEY, **changes})

    assert (status, "*") == (response.status_code, response.headers.get(ALLOWED)), response.text


def test_a_model_that_is_away_may_be_read():
    """503 with when to come back."""
    router = ModelRouter(build_outer_app(), max_request_bytes=100)
    router.add(ModelApp("a", answer, "unavailable"))
    client = TestClient(with_cors(router, parse_serve_flags(["org/a", *ANY])))
    response = client.post("/v1/completions", json={"model": "a"}, headers=KEY)

    assert (503, "*") == (response.status_code, response.headers[ALLOWED])


def test_only_the_origins_of_the_flags_are_allowed():
    """Another origin gets answers, which its browser will not show."""
    client = port("a", "b", flags=("--allowed-origins", f'["{UI}"]', "--allow-credentials"))
    body = {"model": "b"}
    good = client.post("/v1/completions", json=body, headers=KEY)
    bad = client.post("/v1/completions", json=body, headers=KEY | {"Origin": "http://other.example"})

    assert (good.headers[ALLOWED], good.headers["access-control-allow-credentials"]) == (UI, "true")
    assert (200, None) == (bad.status_code, bad.headers.get(ALLOWED))
    assert 400 == client.options("/v1/models", headers=PREFLIGHT | {"Origin": "http://other.example"}).status_code


def test_without_the_flag_no_origin_is_allowed():
    """As with vLLM."""
    client = port("a", "b", flags=())

    assert 400 == client.options("/v1/models", headers=PREFLIGHT).status_code
    assert ALLOWED not in client.post("/v1/completions", json={"model": "a"}, headers=KEY).headers


def test_a_websocket_is_let_through():
    """CORS is about HTTP; the key is asked for all the same."""
    with pytest.raises(WebSocketDenialResponse) as caught, port("a").websocket_connect("/v1/realtime"):
        pass
    assert caught.value.status_code == 401


def test_a_models_app_loses_the_middleware_of_its_flags_and_no_other():
    """Else each model would answer by flags of its own, and headers would come twice."""
    args = parse_serve_flags(["org/a", *ANY, "--enable-request-id-headers"])
    app = Starlette(middleware=[Middleware(CORSMiddleware)])
    with_flags = Starlette(middleware=[Middleware(CORSMiddleware)])
    init_entrypoints_middleware(args, with_flags, ("generate",))  # type: ignore[arg-type]
    added = len(with_flags.user_middleware)
    with_flags.middleware_stack = with_flags.build_middleware_stack()  # as vLLM's SageMaker routes do
    drop_cors(with_flags)
    drop_cors(app)

    assert ALLOWED not in TestClient(with_flags).get("/", headers=KEY).headers
    assert len(with_flags.user_middleware) == added - 1
    assert len(app.user_middleware) == 1


@pytest.mark.parametrize(
    ("words", "origins"),
    [
        (("--allowed-origins", "*"), ["*"]),
        (("--allowed-origins", UI, "http://b", "--max-model-len", "8"), [UI, "http://b"]),
        (("--allowed_origins=*",), ["*"]),
        (('--allowed-origins=["*"]',), ["*"]),
        (("--allowed-origins", f'["{UI}", "http://b"]'), [UI, "http://b"]),
        (("--allowed-origins", "[]"), []),
        ((), []),
    ],
)
def test_origins_are_a_list_in_json_or_several_values(words, origins):
    """A YAML list in `args` becomes several values; vLLM's parser alone wants one value in JSON."""
    assert origins == plan_model(ModelSpec("a", "org/a", words)).args.allowed_origins


def test_origins_without_a_value_are_refused():
    """An empty list would be taken for what vLLM refuses."""
    with pytest.raises(ConfigError, match="allowed-origins: expected one argument"):
        plan_model(ModelSpec("a", "org/a", ("--allowed-origins", "--max-model-len", "8")))
