# SPDX-License-Identifier: Apache-2.0
"""Which app gets a request, what it gets to see of it, and what the router answers itself."""

from __future__ import annotations

import asyncio
import json
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from tokenpool.serve.gateway.model_app import ModelApp
from tokenpool.serve.gateway.router import ModelRouter

pytestmark = pytest.mark.cpu

METHODS = ["GET", "POST", "PUT", "DELETE", "OPTIONS"]
CHAT = "/v1/chat/completions"
LIMIT = 1000
GONE = {"type": "http.disconnect"}


def make_app(name: str) -> Starlette:
    """Return an app that tells its name and what it saw of the request."""

    async def echo(request: Request) -> JSONResponse:
        body = await request.body() if request.method != "OPTIONS" else b""  # vLLM's apps read none there
        seen = {key: request.scope[key] for key in ("path", "root_path")} | {"body": body.decode("latin-1")}
        return JSONResponse({"app": name, "raw_path": request.scope["raw_path"].decode(), **seen})

    async def socket(websocket: WebSocket) -> None:
        await websocket.accept(name)
        await websocket.close(1000)

    anything = "/{rest:path}"
    return Starlette(routes=[Route(anything, echo, methods=METHODS), WebSocketRoute(anything, socket)])


def make_router(*names: str, max_request_bytes: int = LIMIT) -> ModelRouter:
    router = ModelRouter(make_app("outer"), max_request_bytes=max_request_bytes)
    for name in names:
        router.add(ModelApp(name, make_app(name), "ready"))
    return router


def two() -> ModelRouter:
    return make_router("a", "org/b", max_request_bytes=1 << 20)


def serve_raw(app: Any) -> tuple[ModelRouter, ModelApp]:
    """Return a router whose only model, `a`, is this ASGI callable."""
    router = make_router()
    router.add(model := ModelApp("a", app, "ready"))
    return router, model


def set_vllm_state(model: ModelApp, adapters: Any = (), responses: Any = (), **models: Any) -> None:
    """Give the app the attributes that vLLM's ``init_app_state`` sets."""
    state: Any = model.app.state  # type: ignore[attr-defined]
    served = [SimpleNamespace(name=f"served-{model.name}", model_path=model.name)]
    state.openai_serving_models = SimpleNamespace(base_model_paths=served, lora_requests=adapters, **models)
    state.openai_serving_responses = SimpleNamespace(response_store=responses)


def fetch(app: Any, method: str, path: str, **request: Any) -> httpx.Response:
    async def main() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://pool") as client:
            return await client.request(method, path, **request)

    return asyncio.run(main())


def post(app: Any, path: str = CHAT, **request: Any) -> httpx.Response:
    return fetch(app, "POST", path, **request)


def choose(app: Any, method: str, path: str, **request: Any) -> str | int:
    """Return the name of the app that answered, or the status if the router did."""
    response = fetch(app, method, path, **request)
    return response.json()["app"] if response.status_code == 200 else response.status_code


def make_scope(path: str = CHAT, headers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "root_path": ""}
    return scope | {"headers": raw, "query_string": b"", "server": ("pool", 80), "scheme": "http"} | fields


def call(app: Any, scope: Any, *messages: Any, into: list[Any] | None = None) -> list[dict[str, Any]]:
    """Call an ASGI app with these messages, then with a client that has gone; return what it sent."""
    sent: list[dict[str, Any]] = [] if into is None else into
    incoming = iter(messages)

    async def receive() -> dict[str, Any]:
        return next(incoming, GONE)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent


def chunk(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def answer(status: int) -> list[dict[str, Any]]:
    start = {"type": "http.response.start", "status": status, "headers": []}
    return [start, {"type": "http.response.body", "body": b"own", "more_body": False}]


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/v1/models/a", "/v1/models/org/b", "/metrics", "/health", "/ready", "/live", "/load"]
    + ["/version", "/ping", "/v1/pool", "/v1/pool/state", "/added"],
)
def test_pool_paths_go_to_the_outer_app(path: str) -> None:
    """A path that is about the whole pool never reaches one model's app, whatever its body says."""
    router = two()
    router.outer_paths.add("/added")

    assert choose(router, "GET", path) == "outer"
    assert choose(router, "POST", path, content=b'{"model":"a"}') == "outer"


@pytest.mark.parametrize("path", [CHAT, "/tokenize", "/invocations", "/v1/poolside", "/modelsx", "/healthz"])
@pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
def test_json_names_the_model(path: str, method: str) -> None:
    """Any other path goes to the app the JSON body names, with path and body unchanged, by any method."""
    body = json.dumps({"x": [1, {"model": "nested"}], "model": "org/b"})
    seen = fetch(two(), method, path, content=body).json()

    assert ("org/b", path, "", body) == (seen["app"], seen["path"], seen["root_path"], seen["body"])


@pytest.mark.parametrize(
    "body",
    ['{"model": "org/b"}'.encode("utf-8-sig"), '{"model": "org/b"}'.encode("utf-16")]
    + [b'{"model": "org/b", "temperature": NaN}', b'{"mod\\u0065l": "org\\/b"}']
    + [b'{"model": "a", "model": "org/b"}', b'{"user": "\\ud800", "model": "org/b"}'],
)
def test_json_is_read_as_vllm_reads_it(body: bytes) -> None:
    """What Python's json module understands, which vLLM uses, names its model here too."""
    assert choose(two(), "POST", CHAT, content=body) == "org/b"


@pytest.mark.parametrize(
    "body",
    [b"{", b"[]", b"3", b'"org/b"', b"null", b'{"model": 3}', b'{"model": ["org/b"]}', b'{"model": {}}']
    + [b'{"x": ' + b"[" * 100, b'{"model": "\xff"}', b"\x00", b" "],
)
def test_unreadable_bodies_go_to_an_app(body: bytes) -> None:
    """A body no model can be read from reaches an app that is ready whole: vLLM's own validation refuses it."""
    router = two()
    seen = post(router, content=body).json()

    assert (seen["app"], seen["body"]) == ("a", body.decode("latin-1"))
    router.models["a"].state = "loading"
    assert choose(router, "POST", CHAT, content=body) == "org/b"


@pytest.mark.parametrize("files_first", [False, True])
def test_a_form_field_names_the_model(files_first: bool) -> None:
    """An audio upload is routed by its `model` field, before or after the file, and arrives whole."""
    audio = bytes(range(256)) * 2000
    parts = [("model", (None, "org/b")), ("file", ("x.wav", audio)), ("language", (None, "en"))]
    seen = post(two(), "/v1/audio/transcriptions", files=parts[::-1] if files_first else parts).json()

    assert seen["app"] == "org/b"
    assert audio.decode("latin-1") in seen["body"]
    assert choose(two(), "POST", CHAT, data={"x": "1", "model": "org/b"}) == "org/b"


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ("", b'; name="model"'),
        ("; boundary=x", b'; name="model"'),
        ("; boundary=b", b""),
        ("; boundary=b; charset=undefined", b'; name="model"'),
        ("; boundary=b", b'; name="model"; filename="m"'),
    ],
)
def test_broken_forms_go_to_an_app(parameters: str, field: bytes) -> None:
    """A form that does not parse, or whose `model` is a file, is for an app to refuse."""
    form = b"--b\r\nContent-Disposition: form-data" + field + b"\r\n\r\norg/b\r\n--b--\r\n"
    headers = {"content-type": f"multipart/form-data{parameters}"}

    assert choose(two(), "POST", CHAT, content=form, headers=headers) == "a"


@pytest.mark.parametrize("body", [b"", b"{}", b'{"model": null}', b'{"model": ""}', b'{"input": "x"}'])
def test_the_query_names_the_model_if_the_body_does_not(body: bytes) -> None:
    """The query counts only where the body is silent; null and "" are silence, as for vLLM."""
    assert choose(two(), "POST", f"{CHAT}?x=1&model=org%2Fb", content=body) == "org/b"
    assert choose(two(), "POST", f"{CHAT}?model=org/b", json={"model": "a"}) == "a"
    assert choose(two(), "POST", f"{CHAT}?models=a", content=body) == 400


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_the_path_names_the_model(method: str) -> None:
    """A path prefix beats body and query and moves to the root path, also from the encoded path."""
    seen = fetch(two(), method, "/models/org%2Fb/v1/x%20y?model=a", content=b'{"model":"a"}').json()

    assert (seen["app"], seen["root_path"]) == ("org/b", "/models/org/b")
    assert (seen["path"], seen["raw_path"]) == ("/v1/x y", "/v1/x%20y")


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/models/a/b/tokenize", ("a/b", "/tokenize")), ("/models/a/b", ("a/b", "/"))]
    + [("/models/a/bc/tokenize", ("a", "/bc/tokenize")), ("/models/a/v1/models", ("a", "/v1/models"))]
    + [("/models/a/metrics", ("a", "/metrics"))],
)
def test_the_longest_name_in_the_path_wins(path: str, expected: tuple[str, str]) -> None:
    """Names with slashes are told apart by the longest one that ends at a slash."""
    seen = fetch(make_router("a", "a/b"), "GET", path).json()

    assert expected == (seen["app"], seen["path"])


@pytest.mark.parametrize("path", ["/models/", "/models/zz/v1/x", "/models/ax/v1/x", "/models//v1/x"])
def test_an_unknown_model_in_the_path_is_not_found(path: str) -> None:
    """A prefix that names no model is answered 404, even with one model only."""
    assert [choose(router, "GET", path) for router in (two(), make_router("a"))] == [404, 404]


def test_a_mounted_router_reads_the_path_below_its_root() -> None:
    """Behind a root path, pool paths and prefixes are found all the same."""
    below, outer = ("a", "/x", "/root/models/a"), ("outer", "/root/v1/models", "/root")
    for path, seen in (("/models/a/x", below), ("/v1/models", outer)):
        scope = make_scope(f"/root{path}", root_path="/root")
        body = json.loads(call(two(), scope, chunk(b""))[1]["body"])
        assert (body["app"], body["path"], body["root_path"]) == seen


def test_served_names_and_adapters_are_aliases() -> None:
    """A model answers to vLLM's served names and to LoRA adapters, as they come and go."""
    router = two()
    model = router.models["org/b"]
    adapters: dict[str, object] = {}
    set_vllm_state(model, adapters)

    assert model.aliases() == {"org/b", "served-org/b"}
    assert choose(router, "POST", CHAT, json={"model": "served-org/b"}) == "org/b"
    assert choose(router, "POST", CHAT, json={"model": "lora-1"}) == 404
    adapters["lora-1"] = object()
    assert model.aliases() == {"org/b", "served-org/b", "lora-1"}
    assert choose(router, "POST", CHAT, json={"model": "lora-1"}) == "org/b"
    assert choose(router, "GET", "/models/lora-1/tokenizer_info") == "org/b"
    adapters["a"] = adapters.pop("lora-1")
    assert choose(router, "POST", CHAT, json={"model": "lora-1"}) == 404
    # An adapter cannot take the name of a model of the pool, wherever that comes in the order.
    router.add(router.remove("a"))
    assert choose(router, "POST", CHAT, json={"model": "a"}) == "a"
    assert choose(router, "GET", "/models/a/x") == "a"


@pytest.mark.parametrize("method", METHODS)
def test_the_only_model_needs_no_name(method: str) -> None:
    """With one model, a request that names none is for that one; another's name is still unknown."""
    assert choose(make_router("a"), method, "/tokenizer_info") == "a"
    if method != "OPTIONS":  # which asks about the path
        assert choose(make_router("a"), method, "/tokenizer_info", json={"model": "x"}) == 404


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/redoc"])
def test_pages_alike_in_all_apps_come_from_one(path: str) -> None:
    """Documentation pages are served by any app that runs."""
    router = two()

    assert choose(router, "GET", path) == "a"
    router.models["a"].state = "failed"
    assert choose(router, "GET", path) == "org/b"
    assert choose(router, "POST", path) == 400


@pytest.mark.parametrize(
    ("body", "status", "kind", "message"),
    [
        ({"input": "x"}, 400, "BadRequestError", "This request must say which `model` it is for."),
        ({"model": "x"}, 404, "NotFoundError", "The model `x` does not exist."),
    ],
)
def test_a_request_for_no_model_is_told_the_names(body: Any, status: int, kind: str, message: str) -> None:
    """A missing or unknown name is an OpenAI error that lists the names there are."""
    response = post(two(), json=body)
    error = {"message": f"{message} Known models: a, org/b", "type": kind, "param": "model", "code": status}

    assert (response.status_code, response.json()) == (status, {"error": error})


def test_an_unknown_model_is_not_echoed_without_end() -> None:
    """A name of any length and content gives a short, valid error."""
    response = post(two(), content=b'{"model": "\\ud800' + b"x" * 10_000 + b'"}')

    assert response.status_code == 404
    assert len(response.json()["error"]["message"]) < 400


def test_an_empty_pool_answers() -> None:
    """Without models, requests are refused as the client's, not crashed on."""
    assert choose(make_router(), "POST", CHAT, json={"model": "a"}) == 404
    assert choose(make_router(), "POST", CHAT, json={}) == 400
    assert choose(make_router(), "POST", CHAT, content=b"{") == 400
    assert choose(make_router(), "GET", "/docs") == 400
    assert choose(make_router(), "GET", "/v1/responses/r") == 400


def test_models_come_and_go() -> None:
    """A removed model is unknown at once; a name can be added once only."""
    router = make_router("a", "b")

    with pytest.raises(ValueError, match="in the pool already"):
        router.add(ModelApp("a", make_app("a")))
    assert router.remove("b").name == "b"
    assert list(router.models) == ["a"]
    assert choose(router, "POST", CHAT, json={"model": "b"}) == 404
    with pytest.raises(KeyError):
        router.remove("b")


@pytest.mark.parametrize("state", ["draining", "unavailable", "failed"])
@pytest.mark.parametrize(
    ("retry_after_s", "header"),
    [(0.0, "1"), (1.2, "2"), (30.0, "30"), (float("inf"), "3600"), (float("nan"), "1")],
)
def test_a_model_that_is_not_ready_is_retried_later(state: Any, retry_after_s: float, header: str) -> None:
    """A model that cannot serve now answers 503, its state and whole seconds to wait; others go on."""
    router = two()
    router.models["a"].state = state
    router.models["a"].retry_after_s = retry_after_s
    for response in (post(router, json={"model": "a"}), fetch(router, "GET", "/models/a/x")):
        error = response.json()["error"]
        assert (503, header) == (response.status_code, response.headers["retry-after"])
        assert (error["type"], error["param"], error["code"]) == ("ServiceUnavailableError", "model", 503)
        assert f"The model `a` is {state}; retry after {header} s." == error["message"]

    assert choose(router, "POST", CHAT, json={"model": "org/b"}) == "org/b"


@pytest.mark.parametrize(("size", "status"), [(LIMIT, 200), (LIMIT + 1, 413)])
def test_a_body_over_the_limit_is_refused(size: int, status: int) -> None:
    """A body may be exactly as large as the limit, announced or streamed, and no larger."""
    announced = make_scope(headers={"content-length": str(size)})
    streamed = make_scope(headers={"transfer-encoding": "chunked"})
    pieces = [chunk(b" " * (size - 10), more=True), chunk(b" " * 10)]

    assert call(make_router("a"), announced, chunk(b" " * size))[0]["status"] == status
    assert call(make_router("a"), streamed, *pieces)[0]["status"] == status


@pytest.mark.parametrize(
    ("length", "status"),
    [("1001", 413), ("00001001", 413), ("9" * 30, 413), ("9" * 5000, 413)]
    + [(length, 200) for length in ("", "-1", "x", "\xb2", "0x10", "0001000")],
)
def test_an_announced_body_over_the_limit_is_not_read(length: str, status: int) -> None:
    """A client that announces too much is refused for that; what is no number announces nothing."""
    start, body = call(make_router("a"), make_scope(headers={"content-length": length}), chunk(b"{}"))

    assert start["status"] == status
    assert (b"limit of 1000 bytes" in body["body"]) == (status == 413)


def test_a_client_that_leaves_while_sending_reaches_no_app() -> None:
    """A body that never ends is nobody's request: no answer, no call."""
    assert call(make_router("a"), make_scope(), chunk(b'{"model": "a"', more=True)) == []


@pytest.mark.parametrize("cuts", [(), (3,), (0, 3, 3)])
def test_the_body_is_replayed_once_and_then_the_client_is_heard(cuts: tuple[int, ...]) -> None:
    """The app gets the whole body in one message, uncopied if it came in one, then what the client does."""
    body = b'{"model":"a"}'
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([await receive(), await receive(), await receive()])

    edges = [0, *cuts, len(body)]
    messages = [chunk(body[i:j], more=j < len(body)) for i, j in pairwise(edges)]
    call(serve_raw(app)[0], make_scope(), *messages)

    assert seen == [chunk(body), GONE, GONE]
    assert (seen[0]["body"] is body) == (not cuts)


@pytest.mark.parametrize(
    ("method", "headers"),
    [(method, headers) for method in ("GET", "HEAD", "DELETE") for headers in ({}, {"content-length": "0"})]
    + [("OPTIONS", {"content-length": "5"}), ("OPTIONS", {"transfer-encoding": "chunked"})],
)
def test_requests_without_a_body_are_passed_on_unread(method: str, headers: dict[str, str]) -> None:
    """Where no body is announced, and with OPTIONS at all, the app gets the server's own receive."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(receive)

    async def receive() -> Any:
        raise AssertionError("must not read")

    asyncio.run(serve_raw(app)[0](make_scope(method=method, headers=headers), receive, receive))

    assert seen == [receive]


def test_inflight_counts_the_whole_call() -> None:
    """A call is in flight until the app returns, also after the response started, or is cancelled."""

    async def main() -> None:
        going_on = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send(answer(200)[0])
            await going_on.wait()

        async def ignore(message: Any = None) -> None:
            await asyncio.sleep(0)

        router, model = serve_raw(app)
        scope = make_scope(method="GET")
        running, cancelled = (asyncio.create_task(router(scope, ignore, ignore)) for _ in range(2))
        while model.inflight < 2:
            await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        assert model.inflight == 1
        going_on.set()
        await running
        assert model.inflight == 0

    asyncio.run(main())


@pytest.mark.parametrize("before", [[], answer(500)[:1], [{"type": "http.response.debug", "info": {}}]])
@pytest.mark.parametrize("state", ["ready", "unavailable"])
def test_an_app_that_raises_before_it_answers_gives_503(before: list[Any], state: Any) -> None:
    """A crash before the response started is answered 503 with Retry-After, and not raised to the server."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in before:
            await send(message)
        model.state = state
        raise RuntimeError("engine died")

    router, model = serve_raw(app)
    start, body = (message for message in call(router, make_scope(), chunk(b"{}")) if message not in before)

    assert (start["status"], (b"retry-after", b"1") in start["headers"]) == (503, True)
    assert b"engine died" not in body["body"]
    assert model.inflight == 0


@pytest.mark.parametrize(
    ("status", "state", "expected"),
    [(500, "unavailable", 503), (500, "ready", 500), (500, "draining", 500), (400, "unavailable", 400)]
    + [(200, "unavailable", 200), (501, "unavailable", 501)],
)
@pytest.mark.parametrize("reraise", [False, True])
def test_only_a_500_of_a_model_that_became_unavailable_is_replaced(
    status: int, state: Any, expected: int, reraise: bool
) -> None:
    """The app's answer stands, but for the 500 of a dead engine; an error after it goes on to the server.

    Raised to the server, an error in mid-stream cuts the connection: half an answer is not a whole one.
    """

    async def app(scope: Any, receive: Any, send: Any) -> None:
        model.state = state
        for message in answer(status):
            await send(message)
        if reraise:
            raise RuntimeError("engine died")

    router, model = serve_raw(app)
    sent: list[Any] = []
    with pytest.raises(RuntimeError) if reraise and expected != 503 else nullcontext():
        call(router, make_scope(method="GET"), into=sent)

    assert expected == sent[0]["status"]
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert (expected != 503) == (sent[1]["body"] == b"own")


def connect(router: ModelRouter, path: str, query: bytes = b"", headers: Any = None) -> dict[str, Any]:
    scope = make_scope(path, headers, type="websocket", query_string=query)
    scope.pop("method")
    return call(router, scope, {"type": "websocket.connect"})[0]


def test_a_websocket_is_routed_by_path_query_or_being_the_only_one() -> None:
    """A websocket reaches the model it names, or the only one."""
    router = two()

    assert connect(router, "/v1/realtime", b"model=org/b")["subprotocol"] == "org/b"
    assert connect(router, "/models/a/v1/realtime", b"model=org/b")["subprotocol"] == "a"
    assert connect(make_router("a"), "/v1/realtime")["subprotocol"] == "a"
    assert connect(make_router("a"), "/v1/realtime", headers={"content-length": "5"})["subprotocol"] == "a"
    assert connect(router, "/v1/pool/events")["subprotocol"] == "outer"


@pytest.mark.parametrize(
    ("path", "query", "code"),
    [("/v1/realtime", b"", 1008), ("/v1/realtime", b"model=x", 1008), ("/models/x/v1/realtime", b"", 1008)]
    + [("/models/a/v1/pool", b"", 1008), ("/docs", b"", 1008), ("/v1/realtime", b"model=org/b", 1013)],
)
def test_a_websocket_that_cannot_be_routed_is_closed(path: str, query: bytes, code: int) -> None:
    """It is closed before it is accepted: 1008 if the request is wrong, 1013 (try again later) if not."""
    router = two()
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


LATIN_1 = st.text(st.characters(max_codepoint=255))
FORM = "multipart/form-data"
CONTENT_TYPES = (
    st.sampled_from(["application/json", "application/x-www-form-urlencoded", FORM, f"{FORM}; boundary=b"])
    | LATIN_1.map(f"{FORM}; boundary=b; charset={{}}".format)
    | LATIN_1.map(f"{FORM}; boundary={{}}".format)
    | LATIN_1
)
PARTS = st.lists(
    st.sampled_from([b"--b", b"--b--", b"\r\n", b"model", b"=", b"&", b"%", b"\xff", b"a", b":", b"[", b"{"])
    | st.sampled_from([b'Content-Disposition: form-data; name="model"', b'"model": ', b'"a"', b"\\ud800"])
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
    method: str, path: str, query: bytes, content_type: str, bodies: Any, hangs_up: bool, num_models: int
) -> None:
    """Whatever a client sends, the router answers it, and never with a server error of its own."""
    router = make_router(*("a", "org/b")[:num_models], max_request_bytes=150)
    headers = {"content-type": content_type, "transfer-encoding": "chunked"}
    messages = [chunk(body, more=True) for body in bodies] + ([] if hangs_up else [chunk(b"")])
    sent = call(router, make_scope(path, headers, method=method, query_string=query), *messages)

    assert not sent or sent[0]["status"] in (200, 400, 404, 405, 413)
    assert sent or hangs_up
    assert all(model.inflight == 0 for model in router.models.values())
