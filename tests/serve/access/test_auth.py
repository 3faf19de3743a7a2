# SPDX-License-Identifier: Apache-2.0
"""Keys: who may reach which path, and that no spelling of a path changes that."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from tokenpool.serve.access.auth import CLIENT_KEY, ApiKeyAuth, route_path, scope_below, touches_pool_api
from tokenpool.serve.gateway.model_app import ModelApp
from tokenpool.serve.gateway.router import ModelRouter

pytestmark = pytest.mark.cpu

USER = {"authorization": "Bearer user-key"}
ADMIN = {"authorization": "Bearer admin-key"}
METHODS = ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"]

POOL_SPELLINGS = [
    "/v1/pool",
    "/v1/pool/",
    "/v1/pool/state",
    "//v1/pool/state",
    "/v1//pool/state",
    "/v1/./pool/state",
    "/v1/x/../pool/state",
    "/v1/pool/../pool/state",
    "/v1/pool/../chat/completions",
    "/x/%2e%2e/v1/pool/state",
    "/v1%2fpool/state",
    "/v1%252fpool/state",
    "/v1/%70ool/state",
    "/v1/%2570ool/state",
    "/v1\\pool/state",
    "/models/a/v1/pool/state",
    "/models/org/b/v1/pool/state",
    "/models/unknown/v1/pool/state",
    "/models/a//v1/pool",
    "/models/a/models/a/v1/pool/state",
    "/models/a/../../v1/pool/state",
    "/models/a/v1/%2e/pool/state",
    "/health/../v1/pool/state",
]


async def _endpoint(request: Request) -> JSONResponse:
    return JSONResponse({"path": request.scope["path"]})


async def _socket(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.close(1000)


def make_app(name: str = "app") -> Starlette:
    app = Starlette(routes=[Route("/{rest:path}", _endpoint, methods=METHODS), WebSocketRoute("/{rest:path}", _socket)])
    app.state.name = name
    return app


def make_auth(app: Any = None, api_keys: Any = ("user-key",), admin_keys: Any = ("admin-key",)) -> ApiKeyAuth:
    return ApiKeyAuth(app or make_app(), api_keys=api_keys, admin_keys=admin_keys)


def fetch(app: Any, path: str, headers: Any = None, method: str = "GET") -> httpx.Response:
    async def main() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://pool") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(main())


def call(app: Any, path: str, headers: dict[str, str] | None = None, **scope: Any) -> list[dict[str, Any]]:
    """Call with exactly this path, which httpx would normalise."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"} if scope.get("type") == "websocket" else {"type": "http.request"}

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    full = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "root_path": ""}
    full |= {"query_string": b"", "headers": raw, "server": ("pool", 80), **scope}
    asyncio.run(app(full, receive, send))
    return sent


def status(app: Any, path: str, headers: dict[str, str] | None = None, **scope: Any) -> int:
    return call(app, path, headers, **scope)[0]["status"]


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (None, 401),
        (USER, 200),
        (ADMIN, 200),
        ({"authorization": "bearer user-key"}, 200),
        ({"authorization": "Bearer  user-key "}, 200),
        ({"x-api-key": "user-key"}, 200),
        ({"x-api-key": "admin-key"}, 200),
        ({"x-api-key": "user-key", "authorization": "Bearer of-a-proxy"}, 200),
        ({"authorization": "Bearer user-ke"}, 401),
        ({"authorization": "Bearer user-keyx"}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": "Basic user-key"}, 401),
        ({"authorization": "user-key"}, 401),
        ({"x-api-key": ""}, 401),
    ],
)
def test_api_paths_need_a_key(headers: dict[str, str] | None, expected: int) -> None:
    """A public path is served with any configured key, in either header, and with nothing else."""
    assert expected == fetch(make_auth(), "/v1/chat/completions", headers).status_code


def test_refusal_has_the_openai_shape() -> None:
    """A 401 is an OpenAI error that says which scheme to use, and carries no key."""
    response = fetch(make_auth(), "/v1/models", {"authorization": "Bearer wrong"})
    expected = {
        "message": "Missing or invalid API key.",
        "type": "AuthenticationError",
        "param": None,
        "code": 401,
    }

    assert {"error": expected} == response.json()
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/health", "/ready", "/live", "/ping"])
def test_probes_are_open(path: str) -> None:
    """A probe needs no key, a path that merely resembles it does."""
    auth = make_auth()

    assert status(auth, path) == 200
    assert status(auth, "/root" + path, root_path="/root") == 200
    for near in (f"{path}/", f"/{path}", f"{path}/x", f"/x/..{path}", f"/models/a{path}", path.upper()):
        assert status(auth, near) == 401, near


def test_without_api_keys_the_api_is_open_and_the_pool_is_not() -> None:
    """No API key configured means an open API; the admin API stays behind its own key."""
    auth = make_auth(api_keys=())

    assert status(auth, "/v1/chat/completions") == 200
    assert status(auth, "/v1/pool/state") == 401
    assert status(auth, "/v1/pool/state", ADMIN) == 200


def test_without_admin_keys_the_pool_api_is_off() -> None:
    """No admin key configured means that nobody is admin, whatever key is shown."""
    auth = make_auth(admin_keys=())

    for headers in ({}, USER, ADMIN, {"authorization": "Bearer "}):
        response = fetch(auth, "/v1/pool/state", headers)
        assert response.status_code == 403
        assert "set admin_key" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", POOL_SPELLINGS)
def test_every_spelling_of_the_pool_api_needs_the_admin_key(path: str) -> None:
    """No spelling of an admin path is served with a user's key, even when a root path is set."""
    auth = make_auth()

    assert touches_pool_api(path)
    assert status(auth, path) == 401
    assert status(auth, path, USER) == 401
    assert status(auth, "/root" + path, USER, root_path="/root") == 401
    assert status(auth, path, ADMIN) == 200
    assert status(make_auth(api_keys=()), path, USER) == 401


@pytest.mark.parametrize(
    "path",
    ["/", "/v1/models", "/pooling", "/v1/pooling", "/v1/poolside", "/v2/pool", "/models/pool/v1/score", "/%"],
)
def test_other_paths_are_not_taken_for_the_pool_api(path: str) -> None:
    """A user's key is enough for a path that only resembles the admin API."""
    assert not touches_pool_api(path)
    assert status(make_auth(), path, USER) == 200


@pytest.mark.parametrize("path", POOL_SPELLINGS)
def test_only_the_plain_spelling_reaches_the_pool_api(path: str) -> None:
    """The router hands no disguised admin path to any app, not even with an admin key or without auth."""
    router = ModelRouter(make_app("outer"), max_request_bytes=1000)
    for name in ("a", "org/b"):
        router.add(ModelApp(name, make_app(name), "ready"))
    plain = path == "/v1/pool" or path.startswith("/v1/pool/")

    assert (200 if plain else 404) == status(router, path)


def test_a_path_encoded_without_end_counts_as_admin() -> None:
    """A path that keeps changing under decoding is never given the benefit of the doubt."""
    assert touches_pool_api("/v1/" + "%25" * 1 + "25" * 20 + "70ool")


@given(st.lists(st.sampled_from(["v1", "pool", "models", "a", "..", ".", "", "%70ool", "%2e%2e", "v1%2fpool"])))
def test_a_path_starlette_would_route_to_the_pool_always_counts(parts: list[str]) -> None:
    """Whatever stands in the path, what begins with the admin prefix, decoded or not, needs the admin key."""
    assert touches_pool_api("/v1/pool/" + "/".join(parts))
    assert touches_pool_api("/" + "".join(f"{part}/" for part in parts) + "v1/pool")


@pytest.mark.parametrize("method", [*METHODS, "WEIRD"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/models/a/metrics", "/metrics/", "/v1/pool/state"])
def test_no_method_goes_without_a_key(method: str, path: str) -> None:
    """A key is asked for by path alone; preflights are answered before."""
    assert status(make_auth(), path, method=method) == 401


def test_a_probe_knows_whether_its_client_has_a_key() -> None:
    """The scope says so to the app, which answers probes with and without one; any key will do, no other one."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope.get(CLIENT_KEY))

    for headers in (USER, ADMIN, {}, {"x-api-key": "wrong"}):
        call(make_auth(app), "/ready", headers)
    call(make_auth(app, api_keys=()), "/ready")
    assert seen == [True, True, None, None, True]


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens", "/models/a/v1/messages"])
def test_refusals_have_the_shape_of_the_messages_api(path: str) -> None:
    """Below /v1/messages an error is one of Anthropic's, with the same headers."""
    response = fetch(make_auth(), path, method="POST")
    error = {"type": "AuthenticationError", "message": "Missing or invalid API key."}

    assert (401, {"type": "error", "error": error}) == (response.status_code, response.json())
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/v1/realtime", "/v1/pool/events", "/models/a/v1/pool"])
def test_websockets_need_a_key_too(path: str) -> None:
    """A websocket is closed before it is accepted, or refused with 401 where the server can do that."""
    auth = make_auth()
    plain = call(auth, path, type="websocket")
    denial = call(auth, path, type="websocket", extensions={"websocket.http.response": {}})

    assert [(message["type"], message["code"]) for message in plain] == [("websocket.close", 1008)]
    assert (denial[0]["type"], denial[0]["status"]) == ("websocket.http.response.start", 401)
    assert call(auth, path, ADMIN, type="websocket")[0]["type"] == "websocket.accept"


def test_lifespan_passes() -> None:
    """A scope that is no request is none of the middleware's business."""
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    call(make_auth(app), "/", type="lifespan")

    assert seen == ["lifespan"]


def test_a_key_may_hold_any_text() -> None:
    """A key outside ASCII is compared by its UTF-8 bytes."""
    assert status(make_auth(api_keys=["schlüssel"]), "/v1/models", {"x-api-key": "schlüssel"}) == 200


@pytest.mark.parametrize("keys", [[""], [" "], ["a "], ["a", ""]])
def test_a_key_that_anyone_could_show_is_refused_at_start(keys: list[str]) -> None:
    """An empty key, or one no header can carry, stops the start."""
    for setting in ("api_keys", "admin_keys"):
        with pytest.raises(ValueError, match="must not be empty"):
            make_auth(**{setting: keys})
    with pytest.raises(TypeError, match="got one string"):
        make_auth(api_keys="secret")


def test_keys_are_not_kept() -> None:
    """The middleware holds digests only, so no dump of it shows a key."""
    assert "user-key" not in repr(vars(make_auth()))


@pytest.mark.parametrize(
    ("root", "path", "expected"),
    [
        ("", "/v1/x", "/v1/x"),
        ("/r", "/r/v1/x", "/v1/x"),
        ("/r", "/v1/x", "/v1/x"),
        ("/r", "/rest/x", "/rest/x"),
        ("/r", "/r", ""),
    ],
)
def test_route_path_agrees_with_starlette(root: str, path: str, expected: str) -> None:
    """Auth, router and Starlette's routing read the same path out of a scope."""
    from starlette._utils import get_route_path

    scope = {"root_path": root, "path": path}

    assert expected == route_path(scope) == get_route_path(scope)


@pytest.mark.parametrize(
    ("root", "raw", "below"),
    [
        ("", b"/models/org/a/v1/x", ("/v1/x", b"/v1/x", "/models/org/a")),
        ("", b"/models/org%2Fa/v1/x%20y", ("/v1/x y", b"/v1/x%20y", "/models/org/a")),
        ("/r", b"/r/models/org/a/v1/x", ("/v1/x", b"/v1/x", "/r/models/org/a")),
        ("", b"/models/org/a", ("/", b"/", "/models/org/a")),
    ],
)
def test_scope_below_moves_the_prefix(root: str, raw: bytes, below: tuple[str, bytes, str]) -> None:
    """A prefix leaves path and raw path, however it was encoded there, and is added to the root path."""
    from urllib.parse import unquote

    scope = {"root_path": root, "path": unquote(raw.decode()), "raw_path": raw}
    moved = scope_below(scope, "/models/org/a")

    assert below == (moved["path"], moved["raw_path"], moved["root_path"])
    assert raw == scope["raw_path"], "the caller's scope is untouched"
