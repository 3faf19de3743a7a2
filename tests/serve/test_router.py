# SPDX-License-Identifier: Apache-2.0
"""Which app gets a request, what it gets to see of it, and what the router answers itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from tokenpool.serve.router import ModelApp, ModelRouter

pytestmark = pytest.mark.cpu

METHODS = ["GET", "POST", "PUT", "DELETE", "OPTIONS"]
CHAT = "/v1/chat/completions"
LIMIT = 1000


def make_app(name: str) -> Starlette:
    """Return an app that tells its name and what it saw of the request."""

    async def echo(request: Request) -> JSONResponse:
        body = await request.body()
        seen = {"app": name, "path": request.scope["path"], "root_path": request.scope["root_path"]}
        return JSONResponse(
            seen | {"raw_path": request.scope["raw_path"].decode(), "body": body.decode("latin-1")}
        )

    async def socket(websocket: WebSocket) -> None:
        await websocket.accept(name)
        await websocket.close(1000)

    return Starlette(
        routes=[Route("/{rest:path}", echo, methods=METHODS), WebSocketRoute("/{rest:path}", socket)]
    )


def make_router(*names: str, max_request_bytes: int = LIMIT) -> ModelRouter:
    router = ModelRouter(make_app("outer"), max_request_bytes=max_request_bytes)
    for name in names or ("a", "org/b"):
        router.add(ModelApp(name, make_app(name), "resident"))
    return router


def serve_vllm_state(
    model: ModelApp, *, names: Iterable[str] = (), adapters: Any = None, responses: Iterable[str] = ()
) -> None:
    """Give the app the attributes that vLLM's ``init_app_state`` sets."""
    paths = [SimpleNamespace(name=name, model_path=name) for name in names]
    state: Any = model.app.state  # type: ignore[attr-defined]
    state.openai_serving_models = SimpleNamespace(
        base_model_paths=paths, lora_requests={} if adapters is None else adapters
    )
    state.openai_serving_responses = SimpleNamespace(response_store=dict.fromkeys(responses))


def fetch(app: Any, method: str, path: str, **request: Any) -> httpx.Response:
    async def main() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://pool") as client:
            return await client.request(method, path, **request)

    return asyncio.run(main())


def post(app: Any, path: str = CHAT, **request: Any) -> httpx.Response:
    return fetch(app, "POST", path, **request)


def make_scope(path: str = CHAT, headers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": b"/",
        "root_path": "",
        "headers": raw,
    }
    return scope | {"query_string": b"", "server": ("pool", 80), "scheme": "http"} | fields


async def call(app: Any, scope: Any, *messages: dict[str, Any]) -> list[dict[str, Any]]:
    """Call an ASGI app with these messages, then with a client that has gone; return what it sent."""
    sent: list[dict[str, Any]] = []
    incoming = iter(messages)

    async def receive() -> dict[str, Any]:
        return next(incoming, {"type": "http.disconnect"})

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


def chunk(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


# --- which app ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/v1/models/a", "/v1/models/org/b", "/metrics", "/health", "/ready", "/live", "/load"]
    + ["/version", "/ping", "/v1/pool", "/v1/pool/state"],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_pool_paths_go_to_the_outer_app(path: str, method: str) -> None:
    """A path that is about the whole pool never reaches one model's app, whatever its body says."""
    assert fetch(make_router(), method, path, content=b'{"model":"a"}').json()["app"] == "outer"


def test_pool_paths_can_be_added() -> None:
    """The frontend may give the outer app more paths."""
    router = make_router()
    router.outer_paths.add("/status")

    assert fetch(router, "GET", "/status").json()["app"] == "outer"


@pytest.mark.parametrize("path", [CHAT, "/tokenize", "/invocations", "/v1/poolside", "/modelsx", "/healthz"])
@pytest.mark.parametrize("name", ["a", "org/b"])
def test_json_names_the_model(path: str, name: str) -> None:
    """Any other path goes to the app the JSON body names, with path and body unchanged."""
    body = json.dumps({"x": [1, {"model": "nested"}], "model": name})
    seen = post(make_router(), path, content=body).json()

    assert (name, path, "", body) == (seen["app"], seen["path"], seen["root_path"], seen["body"])


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "org/b", "temperature": NaN}',
        '{"model": "org/b"}'.encode("utf-8-sig"),
        '{"model": "org/b"}'.encode("utf-16"),
        b'{"mod\\u0065l": "org\\/b"}',
        b'{"model": "a", "model": "org/b"}',
        b'{"user": "\\ud800", "model": "org/b"}',
    ],
)
def test_json_is_read_as_vllm_reads_it(body: bytes) -> None:
    """What Python's json module understands, which vLLM uses, names its model here too."""
    assert post(make_router(), content=body).json()["app"] == "org/b"


@pytest.mark.parametrize(
    "body",
    [b"{", b"[]", b"3", b'"org/b"', b"null", b'{"model": 3}', b'{"model": ["org/b"]}', b'{"model": {}}']
    + [b'{"x": ' + b"[" * 100_000, b'{"model": "\xff"}', b"\x00", b" "],
)
def test_unreadable_bodies_go_to_an_app(body: bytes) -> None:
    """A body no model can be read from is for vLLM's own validation to refuse, so it reaches an app whole."""
    router = make_router(max_request_bytes=1 << 20)
    seen = post(router, content=body).json()

    assert ("a", body.decode("latin-1")) == (seen["app"], seen["body"])


def test_unreadable_bodies_go_to_an_app_that_can_answer() -> None:
    """Validation needs an app that runs: the first resident one."""
    router = make_router()
    router.models["a"].state = "loading"

    assert post(router, content=b"{").json()["app"] == "org/b"


@pytest.mark.parametrize("files_first", [False, True])
def test_a_multipart_field_names_the_model(files_first: bool) -> None:
    """An audio upload is routed by its `model` field, before or after the file, and arrives whole."""
    audio = bytes(range(256)) * 2000
    parts = [("model", (None, "org/b")), ("file", ("x.wav", audio)), ("language", (None, "en"))]
    router = make_router(max_request_bytes=1 << 20)
    seen = post(router, "/v1/audio/transcriptions", files=parts[::-1] if files_first else parts).json()

    assert seen["app"] == "org/b"
    assert audio.decode("latin-1") in seen["body"]


def test_an_urlencoded_field_names_the_model() -> None:
    """A form is routed by its `model` field."""
    assert post(make_router(), data={"x": "1", "model": "org/b"}).json()["app"] == "org/b"


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b"no boundary in here"),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n"),
        (
            "multipart/form-data; boundary=b; charset=undefined",
            b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nx\r\n--b--\r\n',
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="model"; filename="m"\r\n\r\nx\r\n--b--\r\n',
        ),
    ],
)
def test_broken_forms_go_to_an_app(content_type: str, body: bytes) -> None:
    """A form that does not parse, or whose `model` is a file, is for an app to refuse."""
    assert post(make_router(), content=body, headers={"content-type": content_type}).json()["app"] == "a"


@pytest.mark.parametrize("body", [b"", b"{}", b'{"model": null}', b'{"model": ""}', b'{"input": "x"}'])
def test_the_query_names_the_model_if_the_body_does_not(body: bytes) -> None:
    """The query counts only where the body is silent; null and "" are silence, as for vLLM."""
    router = make_router()

    assert post(router, f"{CHAT}?x=1&model=org%2Fb", content=body).json()["app"] == "org/b"
    assert post(router, f"{CHAT}?model=org/b", json={"model": "a"}).json()["app"] == "a"
    assert post(router, f"{CHAT}?models=a", content=body).status_code == 400


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_the_path_names_the_model(method: str) -> None:
    """A path prefix beats body and query and moves to the root path, also from the encoded path."""
    path = "/models/org%2Fb/v1/x%20y?model=a"
    seen = fetch(make_router(), method, path, content=b'{"model":"a"}').json()

    assert (seen["app"], seen["path"], seen["raw_path"], seen["root_path"]) == (
        "org/b",
        "/v1/x y",
        "/v1/x%20y",
        "/models/org/b",
    )


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/models/a/b/tokenize", ("a/b", "/tokenize")),
        ("/models/a/b", ("a/b", "/")),
        ("/models/a/bc/tokenize", ("a", "/bc/tokenize")),
        ("/models/a/v1/models", ("a", "/v1/models")),
        ("/models/a/metrics", ("a", "/metrics")),
    ],
)
def test_the_longest_name_in_the_path_wins(path: str, expected: tuple[str, str]) -> None:
    """Names with slashes are told apart by the longest one that ends at a slash."""
    seen = fetch(make_router("a", "a/b"), "GET", path).json()

    assert expected == (seen["app"], seen["path"])


@pytest.mark.parametrize("path", ["/models/", "/models/zz/v1/x", "/models/ax/v1/x", "/models//v1/x"])
def test_an_unknown_model_in_the_path_is_not_found(path: str) -> None:
    """A prefix that names no model is answered 404, even with one model only."""
    for router in (make_router(), make_router("a")):
        assert fetch(router, "GET", path).status_code == 404


def test_a_mounted_router_reads_the_path_below_its_root() -> None:
    """Behind a root path, pool paths and prefixes are found all the same."""
    router = make_router()

    async def seen(path: str) -> dict[str, Any]:
        scope = make_scope(f"/root{path}", method="GET", root_path="/root", raw_path=f"/root{path}".encode())
        return json.loads((await call(router, scope, chunk(b"")))[1]["body"])

    assert asyncio.run(seen("/v1/models"))["app"] == "outer"
    below = asyncio.run(seen("/models/a/v1/x"))
    assert (below["app"], below["path"], below["root_path"]) == ("a", "/v1/x", "/root/models/a")


def test_served_names_and_adapters_are_aliases() -> None:
    """A model answers to vLLM's served names and to LoRA adapters, as they come and go."""
    router = make_router()
    model = router.models["org/b"]
    adapters: dict[str, object] = {}
    serve_vllm_state(model, names=["org/b", "short"], adapters=adapters)

    assert {"org/b", "short"} == model.aliases()
    assert post(router, json={"model": "short"}).json()["app"] == "org/b"
    assert post(router, json={"model": "lora-1"}).status_code == 404
    adapters["lora-1"] = object()
    assert {"org/b", "short", "lora-1"} == model.aliases()
    assert post(router, json={"model": "lora-1"}).json()["app"] == "org/b"
    assert fetch(router, "GET", "/models/lora-1/tokenizer_info").json()["app"] == "org/b"
    del adapters["lora-1"]
    assert post(router, json={"model": "lora-1"}).status_code == 404


def test_a_models_own_name_beats_anothers_alias() -> None:
    """An adapter cannot take the name of a model of the pool."""
    router = make_router("a", "b")
    serve_vllm_state(router.models["a"], adapters={"b": object()})

    assert post(router, json={"model": "b"}).json()["app"] == "b"
    assert fetch(router, "GET", "/models/b/x").json()["app"] == "b"


def test_an_unseen_adapter_goes_to_the_one_model_that_may_find_it() -> None:
    """vLLM's LoRA resolver plugins load adapters by name on demand; two such models would be a guess."""
    router = make_router("a", "b", "c")
    for name in ("b", "c"):
        model = router.models[name]
        serve_vllm_state(model)
        model.app.state.openai_serving_models.lora_resolvers = [object()]  # type: ignore[attr-defined]
        assert ("b" if name == "b" else None) == post(router, json={"model": "new"}).json().get("app")


def test_a_stored_response_is_found_where_it_was_made() -> None:
    """GET and cancel of a stored response go to its model; an id nobody has is 404 in vLLM's words."""
    router = make_router()
    serve_vllm_state(router.models["org/b"], responses=["resp_1"])

    assert fetch(router, "GET", "/v1/responses/resp_1?stream=true").json()["app"] == "org/b"
    assert post(router, "/v1/responses/resp_1/cancel").json()["app"] == "org/b"
    unknown = fetch(router, "GET", "/v1/responses/resp_2")
    assert (unknown.status_code, unknown.json()["error"]["message"]) == (
        404,
        "Response with id 'resp_2' not found.",
    )
    assert post(router, "/v1/responses/render", json={"model": "a"}).json()["app"] == "a"
    assert fetch(make_router("a"), "GET", "/v1/responses/resp_2").json()["app"] == "a"


@pytest.mark.parametrize("method", METHODS)
def test_the_only_model_needs_no_name(method: str) -> None:
    """With one model, a request that names none is for that one."""
    assert fetch(make_router("a"), method, "/tokenizer_info").json()["app"] == "a"


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/redoc"])
def test_pages_alike_in_all_apps_come_from_one(path: str) -> None:
    """Documentation pages are served by any app that runs."""
    router = make_router()

    assert fetch(router, "GET", path).json()["app"] == "a"
    router.models["a"].state = "failed"
    assert fetch(router, "GET", path).json()["app"] == "org/b"
    assert post(router, path).status_code == 400


# --- what the router answers itself ------------------------------------------------------------------------


def test_a_request_without_a_model_is_told_the_names() -> None:
    """With several models and none named, the 400 says what to add."""
    response = post(make_router(), json={"input": "x"})
    message = "This request must say which `model` it is for. Known models: a, org/b"

    assert response.status_code == 400
    assert {
        "error": {"message": message, "type": "BadRequestError", "param": "model", "code": 400}
    } == response.json()


@pytest.mark.parametrize("names", [("a", "org/b"), ("a",)])
def test_an_unknown_model_is_not_found(names: tuple[str, ...]) -> None:
    """A name nobody answers to is an OpenAI 404, also with one model."""
    response = post(make_router(*names), json={"model": "x"})
    message = f"The model `x` does not exist. Known models: {', '.join(names)}"

    assert response.status_code == 404
    assert {
        "error": {"message": message, "type": "NotFoundError", "param": "model", "code": 404}
    } == response.json()


def test_an_unknown_model_is_not_echoed_without_end() -> None:
    """A name of any length and content gives a short, valid error."""
    router = make_router(max_request_bytes=1 << 20)
    response = post(router, content=b'{"model": "\\ud800' + b"x" * 10_000 + b'"}')

    assert response.status_code == 404
    assert len(response.json()["error"]["message"]) < 400


def test_an_empty_pool_answers() -> None:
    """Without models, requests are refused as the client's, not crashed on."""
    router = ModelRouter(make_app("outer"), max_request_bytes=LIMIT)

    assert post(router, json={"model": "a"}).status_code == 404
    for request in ({"json": {}}, {"content": b"{"}):
        assert post(router, **request).status_code == 400
    assert fetch(router, "GET", "/docs").status_code == 400
    assert fetch(router, "GET", "/v1/responses/r").status_code == 400


def test_models_come_and_go() -> None:
    """A removed model is unknown at once; a name can be added once only."""
    router = make_router("a", "b")

    with pytest.raises(ValueError, match="in the pool already"):
        router.add(ModelApp("a", make_app("a")))
    assert router.remove("b").name == "b"
    assert list(router.models) == ["a"]
    assert post(router, json={"model": "b"}).status_code == 404
    with pytest.raises(KeyError):
        router.remove("b")


@pytest.mark.parametrize("state", ["loading", "draining", "unavailable", "failed"])
@pytest.mark.parametrize(
    ("retry_after_s", "header"),
    [(0.0, "1"), (1.2, "2"), (30.0, "30"), (float("inf"), "3600"), (float("nan"), "1")],
)
def test_a_model_that_is_not_resident_is_retried_later(state: Any, retry_after_s: float, header: str) -> None:
    """A model that cannot serve now answers 503, its state and whole seconds to wait; others go on."""
    router = make_router()
    router.models["a"].state = state
    router.models["a"].retry_after_s = retry_after_s
    for response in (post(router, json={"model": "a"}), fetch(router, "GET", "/models/a/x")):
        error = response.json()["error"]
        assert (503, header) == (response.status_code, response.headers["retry-after"])
        assert (error["type"], error["param"], error["code"]) == ("ServiceUnavailableError", "model", 503)
        assert f"The model `a` is {state}; retry after {header} s." == error["message"]

    assert post(router, json={"model": "org/b"}).status_code == 200


# --- the body ----------------------------------------------------------------------------------------------


def test_a_body_over_the_limit_is_refused() -> None:
    """A body may be exactly as large as the limit, announced or streamed, and no larger."""

    async def main() -> None:
        router = make_router("a")
        for size, status in ((LIMIT, 200), (LIMIT + 1, 413)):
            announced = make_scope(headers={"content-length": str(size)})
            assert status == (await call(router, announced, chunk(b" " * size)))[0]["status"]
            streamed = make_scope(headers={"transfer-encoding": "chunked"})
            pieces = [chunk(b" " * (size - 10), more=True), chunk(b" " * 10)]
            assert status == (await call(router, streamed, *pieces))[0]["status"]

    asyncio.run(main())


@pytest.mark.parametrize("length", ["1001", "00001001", "9" * 30, "9" * 5000])
def test_an_announced_body_over_the_limit_is_not_read(length: str) -> None:
    """A client that announces too much is refused before a byte of it is taken."""

    async def receive() -> Any:
        raise AssertionError("must not read")

    async def main() -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await make_router("a")(make_scope(headers={"content-length": length}), receive, send)
        return sent

    start, body = asyncio.run(main())

    assert start["status"] == 413
    assert "limit of 1000 bytes" in json.loads(body["body"])["error"]["message"]


@pytest.mark.parametrize("length", ["", "-1", "x", "٣", "0x10"])
def test_a_nonsense_content_length_does_not_crash(length: str) -> None:
    """What the server lets through as content length is not trusted to be a number."""
    scope = make_scope(headers={"x": ""})
    scope["headers"] = [(b"content-length", length.encode())]

    assert asyncio.run(call(make_router("a"), scope, chunk(b"{}")))[0]["status"] == 200


def test_a_client_that_leaves_while_sending_reaches_no_app() -> None:
    """A body that never ends is nobody's request: no answer, no call."""
    router = make_router("a")

    assert asyncio.run(call(router, make_scope(), chunk(b'{"model": "a"', more=True))) == []


def test_the_body_is_replayed_once_and_then_the_client_is_heard() -> None:
    """The app gets one message with the whole body, then the client's own, so it sees a disconnect."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([await receive(), await receive(), await receive()])

    router = make_router("x")
    router.add(ModelApp("a", app, "resident"))
    asyncio.run(
        call(router, make_scope(), chunk(b'{"mod', more=True), chunk(b"", more=True), chunk(b'el":"a"}'))
    )

    assert [chunk(b'{"model":"a"}'), {"type": "http.disconnect"}, {"type": "http.disconnect"}] == seen


def test_a_body_of_one_piece_is_not_copied() -> None:
    """The bytes object the server received is the one the app gets."""
    body = b'{"model":"a"}'
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(await receive())

    router = make_router("x")
    router.add(ModelApp("a", app, "resident"))
    asyncio.run(call(router, make_scope(), chunk(body)))

    assert body is seen[0]["body"]


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("headers", [{}, {"content-length": "0"}])
def test_requests_without_a_body_are_passed_on_unread(method: str, headers: dict[str, str]) -> None:
    """Where no body is announced, the app gets the server's own receive."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(receive)

    async def receive() -> Any:
        raise AssertionError("must not read")

    router = ModelRouter(make_app("outer"), max_request_bytes=LIMIT)
    router.add(ModelApp("a", app, "resident"))
    asyncio.run(router(make_scope(method=method, headers=headers), receive, receive))

    assert [receive] == seen


def test_a_get_with_a_body_is_routed_by_it() -> None:
    """An announced body counts for any method."""
    assert fetch(make_router(), "GET", "/x", content=b'{"model":"org/b"}').json()["app"] == "org/b"


# --- the call ----------------------------------------------------------------------------------------------


def serve_raw(app: Any, state: Any = "resident") -> tuple[ModelRouter, ModelApp]:
    router = ModelRouter(make_app("outer"), max_request_bytes=LIMIT)
    model = ModelApp("a", app, state)
    router.add(model)
    return router, model


def test_inflight_counts_the_whole_call() -> None:
    """A call is in flight until the app returns or raises, also while it streams and if it is cancelled."""

    async def main() -> None:
        going_on = asyncio.Event()

        async def stream(request: Request) -> StreamingResponse:
            async def pieces() -> Any:
                yield b"1"
                await going_on.wait()
                yield b"2"

            return StreamingResponse(pieces())

        async def crash(scope: Any, receive: Any, send: Any) -> None:
            raise OSError("gone")

        router, model = serve_raw(Starlette(routes=[Route("/x", stream)]))
        first = asyncio.Event()
        sent: list[Any] = []

        async def never() -> Any:
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)
            if message.get("body"):
                first.set()

        scope = make_scope("/x", method="GET")
        running, cancelled = (asyncio.create_task(router(scope, never, send)) for _ in range(2))
        await first.wait()
        await asyncio.sleep(0)
        assert (model.inflight, len([m for m in sent if m.get("body") == b"1"])) == (2, 2)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        assert model.inflight == 1
        going_on.set()
        await running
        assert (model.inflight, sent[-2]["body"]) == (0, b"2")
        model.app = crash
        await call(router, scope)
        assert model.inflight == 0

    asyncio.run(main())


def answer(status: int, body: bytes = b"own") -> list[dict[str, Any]]:
    start = {"type": "http.response.start", "status": status, "headers": []}
    return [start, {"type": "http.response.body", "body": body, "more_body": False}]


@pytest.mark.parametrize("before", [[], answer(500)[:1]])
@pytest.mark.parametrize("state", ["resident", "unavailable"])
def test_an_app_that_raises_before_it_answers_gives_503(before: list[Any], state: Any) -> None:
    """A crash before the response started is answered 503 with Retry-After, and not raised to the server."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in before:
            await send(message)
        model.state = state
        raise RuntimeError("engine died")

    router, model = serve_raw(app)
    response = post(router, json={})

    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert "engine died" not in response.text


def test_an_app_that_raises_while_it_streams_cuts_the_stream() -> None:
    """Half an answer is not turned into a whole one: the error goes to the server, which cuts the connection."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(answer(200)[0])
        model.state = "unavailable"
        raise RuntimeError("engine died")

    router, model = serve_raw(app)
    with pytest.raises(RuntimeError, match="engine died"):
        asyncio.run(call(router, make_scope(method="GET")))
    assert model.inflight == 0


@pytest.mark.parametrize(
    ("status", "state", "expected"),
    [(500, "unavailable", 503), (500, "resident", 500), (500, "draining", 500), (400, "unavailable", 400)]
    + [(200, "unavailable", 200), (501, "unavailable", 501)],
)
@pytest.mark.parametrize("reraise", [False, True])
def test_only_a_500_of_a_model_that_became_unavailable_is_replaced(
    status: int, state: Any, expected: int, reraise: bool
) -> None:
    """The app's answer stands, but for the 500 of a dead engine, also where Starlette raises after it."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        model.state = state
        for message in answer(status):
            await send(message)
        if reraise:
            raise RuntimeError("engine died")

    async def main() -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        try:
            await router(make_scope(method="GET"), send, send)
        except RuntimeError:
            assert reraise and expected != 503
        return sent

    router, model = serve_raw(app)
    sent = asyncio.run(main())

    assert expected == sent[0]["status"]
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert (expected != 503) == (sent[1]["body"] == b"own")


def test_messages_before_the_response_do_not_start_it() -> None:
    """An informational message leaves the 503 possible."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.debug", "info": {}})
        raise RuntimeError("engine died")

    sent = asyncio.run(call(serve_raw(app)[0], make_scope(method="GET")))

    assert sent[1]["status"] == 503


# --- websockets --------------------------------------------------------------------------------------------


def connect(router: ModelRouter, path: str, query: bytes = b"", headers: Any = None) -> dict[str, Any]:
    scope = make_scope(path, headers, type="websocket", query_string=query, raw_path=path.encode())
    scope.pop("method")
    return asyncio.run(call(router, scope, {"type": "websocket.connect"}))[0]


def test_a_websocket_is_routed_by_path_query_or_being_the_only_one() -> None:
    """A websocket reaches the model it names, or the only one."""
    router = make_router()

    assert connect(router, "/v1/realtime", b"model=org/b")["subprotocol"] == "org/b"
    assert connect(router, "/models/a/v1/realtime", b"model=org/b")["subprotocol"] == "a"
    assert connect(make_router("a"), "/v1/realtime")["subprotocol"] == "a"
    assert connect(make_router("a"), "/v1/realtime", headers={"content-length": "5"})["subprotocol"] == "a"
    assert connect(router, "/v1/pool/events")["subprotocol"] == "outer"


@pytest.mark.parametrize(
    ("path", "query", "code"),
    [
        ("/v1/realtime", b"", 1008),
        ("/v1/realtime", b"model=x", 1008),
        ("/models/x/v1/realtime", b"", 1008),
        ("/models/a/v1/pool", b"", 1008),
        ("/docs", b"", 1008),
        ("/v1/realtime", b"model=org/b", 1013),
    ],
)
def test_a_websocket_that_cannot_be_routed_is_closed(path: str, query: bytes, code: int) -> None:
    """It is closed before it is accepted: 1008 if the request is wrong, 1013 (try again later) if not."""
    router = make_router()
    router.models["org/b"].state = "unavailable"
    closed = connect(router, path, query)

    assert ("websocket.close", code) == (closed["type"], closed["code"])


def test_a_websocket_counts_and_its_errors_are_the_servers() -> None:
    """A websocket is in flight while its app runs; an error is raised, for there is no response to send."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert model.inflight == 1
        raise RuntimeError("engine died")

    router, model = serve_raw(app)
    with pytest.raises(RuntimeError, match="engine died"):
        connect(router, "/v1/realtime")
    assert model.inflight == 0


# --- anything at all ---------------------------------------------------------------------------------------

CONTENT_TYPES = st.one_of(
    st.sampled_from(
        ["application/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=b", ""]
        + [
            "multipart/form-data",
            "multipart/form-data; boundary=b; charset=undefined",
            "Multipart/Form-Data;boundary=",
        ]
    ),
    st.text(st.characters(max_codepoint=255)),
    st.text(st.characters(max_codepoint=255)).map(
        lambda text: f"multipart/form-data; boundary=b; charset={text}"
    ),
)
PARTS = st.lists(
    st.sampled_from(
        [b"--b", b"--b--", b"\r\n", b"model", b"=", b"&", b"{", b"}", b'"', b"%", b"\xff", b"a", b":", b"["]
    )
    | st.sampled_from(
        [b'Content-Disposition: form-data; name="model"', b'"model": ', b'"a"', b"\\ud800", b"NaN"]
    )
    | st.binary(max_size=8)
).map(b"".join)


@settings(deadline=None, max_examples=300)
@given(
    method=st.sampled_from(["GET", "POST", "DELETE", "OPTIONS", "WEIRD"]),
    path=st.sampled_from([CHAT, "/", "/docs", "/models/a", "/v1/responses/", "/v1/responses/x"])
    | st.text(max_size=20).map(lambda text: f"/{text}")
    | st.text(max_size=20).map(lambda text: f"/models/{text}"),
    query=st.sampled_from([b"", b"model=a", b"model", b"model=%ff&model="]) | st.binary(max_size=20),
    content_type=CONTENT_TYPES,
    bodies=st.lists(st.binary(max_size=100) | PARTS, max_size=4),
    hangs_up=st.booleans(),
    num_models=st.integers(0, 2),
)
def test_no_request_breaks_the_router(
    method: str,
    path: str,
    query: bytes,
    content_type: str,
    bodies: list[bytes],
    hangs_up: bool,
    num_models: int,
) -> None:
    """Whatever a client sends, the router answers it, and never with a server error of its own."""
    router = ModelRouter(make_app("outer"), max_request_bytes=150)
    for name in ("a", "org/b")[:num_models]:
        router.add(ModelApp(name, make_app(name), "resident"))
    headers = {"content-type": content_type, "transfer-encoding": "chunked"}
    messages = [chunk(body, more=True) for body in bodies] + ([] if hangs_up else [chunk(b"")])
    sent = asyncio.run(call(router, make_scope(path, headers, method=method, query_string=query), *messages))

    assert not sent or sent[0]["status"] in (200, 400, 404, 405, 413)
    assert sent or hangs_up
    assert all(model.inflight == 0 for model in router.models.values())
