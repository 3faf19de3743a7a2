# SPDX-License-Identifier: Apache-2.0
"""Choose the vLLM app that serves a request, by the model it names, and replay the request to it.

Every model has vLLM's own FastAPI app, so each route vLLM has, or will have, works without code here. The
request body is buffered to read the model's name (vLLM buffers it too). This module imports no vLLM: an app
is any ASGI callable, and the few attributes read from ``app.state`` are optional.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from starlette.datastructures import Headers, QueryParams
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .admission import Gate, Ticket, waits_for_tokens
from .auth import POOL_PREFIX, TENANT_KEY, error_response, route_path, scope_below, touches_pool_api
from .request_body import MAX_DEPTH, UnreadableModelError, adapter_name, body_model, is_too_deep, replay
from .sequences import count_sequences
from .stored_responses import has_response
from .tenant_line import TenantLine
from .tenants import CURRENT_CALL, Account, Call, TenantBook

logger = logging.getLogger(__name__)

ModelState = Literal["loading", "resident", "draining", "unavailable", "failed"]

OUTER_PATHS = frozenset(
    {"/v1/models", "/metrics", "/health", "/ready", "/live", "/load", "/version", "/ping", "/pool", POOL_PREFIX}
)
"""Answered once for the whole pool."""

OUTER_PREFIXES = ("/v1/models/", f"{POOL_PREFIX}/")

ANY_MODEL_PATHS = frozenset({"/", "/docs", "/openapi.json", "/redoc"})
"""Pages that are alike in every model's app."""

_MODELS_PREFIX = "/models/"
_RESPONSES_PREFIX = "/v1/responses/"
_LOAD_ADAPTER = "/v1/load_lora_adapter"
_BODILESS_METHODS = frozenset({"GET", "HEAD", "DELETE", "OPTIONS"})
_MAX_RETRY_AFTER_S = 3600.0


@dataclass(slots=True, eq=False)
class ModelApp:
    """One model of the pool and the app that serves it; owned by the event loop's thread."""

    name: str
    app: ASGIApp
    state: ModelState = "loading"
    retry_after_s: float = 1.0
    """When a client refused now should come back."""
    reason: str = ""
    """Why it is `failed`, in one line; empty in other states."""
    inflight: int = 0
    """Calls into `app` that have not returned."""
    gate: Gate = field(default_factory=Gate)
    """Which requests are taken in, and how many of them wait."""

    def answer_with(self, client: Any) -> None:
        """Send its requests to this client of its engines, a `ModelClient` or what stands for one."""
        self.app = client.app
        self.gate.serve_from(client.queue, client.num_seats)

    def aliases(self) -> set[str]:
        """Return the names this model answers to: its own, vLLM's served names, LoRA adapters now loaded."""
        models = self.handler("openai_serving_models")
        served = (path.name for path in getattr(models, "base_model_paths", ()))
        return {self.name, *served, *getattr(models, "lora_requests", ())}

    def resolves_adapters(self) -> bool:
        """Tell whether vLLM may find an adapter for a name it has not seen (LoRA resolver plugins)."""
        return bool(getattr(self.handler("openai_serving_models"), "lora_resolvers", ()))

    def has_response(self, response_id: str, owner: str = "") -> bool:
        """Tell whether vLLM's Responses API of this model has stored `response_id`, for that tenant if there are any.
        """
        return has_response(self.handler("openai_serving_responses"), response_id, owner)

    def refusal(self) -> Response:
        """Return a 503 that says why the model does not answer, with Retry-After in whole seconds, >= 1."""
        wait_s = math.ceil(min(max(1.0, self.retry_after_s), _MAX_RETRY_AFTER_S))
        reason = "did not answer" if self.state == "resident" else f"is {self.state}"
        if self.reason:
            reason += f" ({self.reason})"
        message = f"The model `{self.name}` {reason}; retry after {wait_s} s."
        headers = {"retry-after": str(wait_s)}
        return error_response(503, "ServiceUnavailableError", message, "model", headers)

    def handler(self, attribute: str) -> Any:
        """Return one of the handlers that vLLM keeps in ``app.state``, or None."""
        return getattr(getattr(self.app, "state", None), attribute, None)


class ModelRouter:
    """ASGI app: pool-level paths go to `outer`, all others to the app of the model they name.

        router = ModelRouter(outer, max_request_bytes=64 << 20)
        router.add(ModelApp("org/a", build_app(...), state="resident"))
        app = ApiKeyAuth(router, api_keys=..., admin_keys=...)

    The model is named by, in this order: the path prefix ``/models/<name>/``, the body's `model` (JSON or
    form field), the query's `model`, having stored the response (``/v1/responses/<id>``), being the only one.
    Lifespan events are not handled: run uvicorn with ``lifespan="off"``.
    """

    def __init__(self, outer: ASGIApp, *, max_request_bytes: int, tenants: TenantBook | None = None) -> None:
        self.outer_paths: set[str] = set(OUTER_PATHS)
        self.outer_prefixes: tuple[str, ...] = OUTER_PREFIXES
        self._outer = outer
        self._max_request_bytes = max_request_bytes
        self._models: dict[str, ModelApp] = {}
        self._tenants = tenants

    @property
    def models(self) -> Mapping[str, ModelApp]:
        """The models by name, in the order they were added; a live, read-only view."""
        return MappingProxyType(self._models)

    def add(self, model: ModelApp) -> None:
        """Start to route to `model`; raises ValueError if its name is taken."""
        if model.name in self._models:
            raise ValueError(f"model {model.name!r} is in the pool already")
        self._models[model.name] = model
        if self._tenants is not None:
            model.gate.line = TenantLine(self._tenants.weight_of)

    def remove(self, name: str) -> ModelApp:
        """Stop to route to model `name` and return it; its calls in flight go on. Raises KeyError."""
        return self._models.pop(name)

    async def let_through(self, limit_s: float) -> None:
        """Wait until no tenant's request is held before an engine, at most `limit_s`; for a shutdown."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline and any(len(m.gate.line or ()) for m in self._models.values()):
            await asyncio.sleep(0.02)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or websocket; what cannot be routed is answered here, never raised."""
        assert scope["type"] in ("http", "websocket"), "run uvicorn with lifespan='off'"
        path = route_path(scope)
        if path in self.outer_paths or path.startswith(self.outer_prefixes):
            await self._outer(scope, receive, send)
            return
        try:
            await self._route(path, scope, receive, send)
        except _RefusedError as refused:
            if scope["type"] == "http":
                await refused.response(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": refused.close_code, "reason": ""})

    async def _route(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        headers, app_receive = Headers(scope=scope), receive
        model, scope = self._by_prefix(path, scope)
        body: bytes | None = b""
        if scope["type"] == "http" and (scope["method"] not in _BODILESS_METHODS or _announces_body(headers)):
            body = await self._read_body(headers, receive)
            if body is None:
                return
            if is_too_deep(body, headers.get("content-type", "")):
                message = f"The JSON of the request is nested deeper than {MAX_DEPTH} levels."
                raise _RefusedError(error_response(400, "BadRequestError", message))
            app_receive = replay(body, receive)
        model = model or await self._by_request(path, scope, headers, body or b"")
        if path.endswith(_LOAD_ADAPTER):
            self._refuse_taken_name(model, adapter_name(body or b""))
        if model.state != "resident":
            raise _RefusedError(model.refusal(), close_code=1013)
        account: Account | None = scope.get(TENANT_KEY)
        sequences = count_sequences(body or b"") if account is not None else 1
        with account.exclusive() if account is not None else nullcontext():
            ticket = self._take_in(model, account, scope, path, sequences)
            call = account.begin(scope, model.name, len(body or b""), sequences) if account is not None else None
        if call is None:
            del body  # from here on the app alone decides how long it lives
            await _call(model, ticket, scope, app_receive, send)
            return
        del body
        try:
            if await _hold(model, call, scope, path, receive):
                await _call_for(model, call, ticket, scope, app_receive, send)
        finally:
            ticket.close()
            call.close()

    def _take_in(
        self, model: ModelApp, account: Account | None, scope: Scope, path: str, sequences: int
    ) -> Ticket:
        if account is not None and (refusal := account.refusal(scope, model.name, sequences)) is not None:
            raise _RefusedError(refusal)
        ticket = model.gate.admit(scope, path, account and account.config.name)
        if isinstance(ticket, Response):
            if account is not None:
                account.refused[model.name, "queue"] += 1
            raise _RefusedError(ticket)
        return ticket

    async def _read_body(self, headers: Headers, receive: Receive) -> bytes | None:
        """Return the whole body, or None if the client went away. One chunk is returned without a copy."""
        announced = headers.get("content-length", "")
        # 18 digits: beyond any limit, and int() refuses very long ones.
        if announced.isascii() and announced.isdigit():
            self._check_size(int(announced.lstrip("0")[:18] or 0))
        chunks: list[bytes] = []
        num_bytes = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            if chunk := message.get("body", b""):
                chunks.append(chunk)
                num_bytes += len(chunk)
                self._check_size(num_bytes)
            if not message.get("more_body", False):
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_request_bytes:
            message = f"The request body is larger than the limit of {self._max_request_bytes} bytes."
            raise _RefusedError(error_response(413, "RequestTooLargeError", message))

    def _by_prefix(self, path: str, scope: Scope) -> tuple[ModelApp | None, Scope]:
        """Return the model a ``/models/<name>/`` path names and the scope below it; the longest name wins."""
        if touches_pool_api(path):
            # The admin API is at its own path only: no other spelling of it reaches any app.
            raise _not_found(f"The path `{path[:200]}` does not exist.", None)
        if not path.startswith(_MODELS_PREFIX):
            return None, scope
        rest = path[len(_MODELS_PREFIX) :]
        known = [(name, model) for model in self._models.values() for name in model.aliases()]
        fits = [(name, model) for name, model in known if rest == name or rest.startswith(f"{name}/")]
        if not fits:
            raise self._unknown_model(rest.partition("/v1/")[0])
        name, model = max(fits, key=lambda fit: (len(fit[0]), fit[0] == fit[1].name))
        return model, scope_below(scope, _MODELS_PREFIX + name)

    async def _by_request(self, path: str, scope: Scope, headers: Headers, body: bytes) -> ModelApp:
        try:
            name = await body_model(headers, body) if body else None
        except UnreadableModelError:
            return self._any_model()  # vLLM's own validation says what is wrong with it
        query = scope.get("query_string", b"")
        if name := name or (QueryParams(query).get("model") if b"model" in query else None):
            return self._by_name(name)
        tail = path[len(_RESPONSES_PREFIX) :] if path.startswith(_RESPONSES_PREFIX) else ""
        response_id, account = tail.partition("/")[0], scope.get(TENANT_KEY)
        owner = account.config.name if account is not None else ""
        for model in self._models.values():
            if len(self._models) == 1 or (response_id and model.has_response(response_id, owner)):
                return model
        if response_id and self._models:
            raise _not_found(f"Response with id '{response_id[:200]}' not found.", "response_id")
        if path in ANY_MODEL_PATHS and scope.get("method") in ("GET", "HEAD"):
            return self._any_model()
        raise self._model_needed()

    def _by_name(self, name: str) -> ModelApp:
        if model := self._models.get(name):
            return model
        models = self._models.values()
        # An adapter not loaded yet: vLLM's LoRA resolver plugins may find it, if one model alone has them.
        resolvers = [model for model in models if model.resolves_adapters()]
        fits = [model for model in models if name in model.aliases()] or resolvers[: len(resolvers) == 1]
        if not fits:
            raise self._unknown_model(name)
        return fits[0]

    def _refuse_taken_name(self, model: ModelApp, adapter: Any) -> None:
        """Refuse an adapter of `model` under a name that leads to another model: nobody would reach it."""
        for other in self._models.values():
            if other is not model and isinstance(adapter, str) and adapter in other.aliases():
                message = f"The name `{adapter[:200]}` belongs to model `{other.name}`: give the adapter another name."
                raise _RefusedError(error_response(400, "BadRequestError", message, "lora_name"))

    def _any_model(self) -> ModelApp:
        models = sorted(self._models.values(), key=lambda model: model.state != "resident")
        if not models:
            raise self._model_needed()
        return models[0]

    def _known(self) -> str:
        return f"Known models: {', '.join(self._models) or '(none)'}"

    def _unknown_model(self, name: str) -> _RefusedError:
        return _not_found(f"The model `{name[:200]}` does not exist. {self._known()}", "model")

    def _model_needed(self) -> _RefusedError:
        message = f"This request must say which `model` it is for. {self._known()}"
        return _RefusedError(error_response(400, "BadRequestError", message, "model"))


class _RefusedError(Exception):
    """The router answers itself: with `response`, or `close_code` on a websocket."""

    def __init__(self, response: Response, close_code: int = 1008) -> None:
        self.response = response
        self.close_code = close_code


def _not_found(message: str, param: str | None) -> _RefusedError:
    return _RefusedError(error_response(404, "NotFoundError", message, param))


def _announces_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0").strip("0") != ""


async def _hold(model: ModelApp, call: Call, scope: Scope, path: str, receive: Receive) -> bool:
    """Wait for the call's turn; False if its client has gone away meanwhile."""
    line = model.gate.line
    if line is None:
        return True
    call.wait_in_line = line.more
    if scope["type"] == "websocket" or scope["method"] != "POST":
        return True  # what it asks the engine for waits when it comes
    model.inflight += 1
    try:
        is_there = await (line.enter if waits_for_tokens(scope, path) else line.enter_aside)(call, receive)
    finally:
        model.inflight -= 1
    if is_there and model.state != "resident":
        raise _RefusedError(model.refusal())
    return is_there


async def _call_for(
    model: ModelApp, call: Call, ticket: Ticket, scope: Scope, receive: Receive, send: Send
) -> None:
    """Run the model's app on a tenant's account."""

    async def dressed(message: Message) -> None:
        call.dress(message)
        await send(message)

    token = CURRENT_CALL.set(call)
    try:
        await _call(model, ticket, scope, receive, dressed)
    finally:
        CURRENT_CALL.reset(token)


async def _call(model: ModelApp, ticket: Ticket, scope: Scope, receive: Receive, send: Send) -> None:
    """Run the model's app; a crash, or a 500 of a model that lost its engine, becomes a 503 to retry."""
    started, replaced = scope["type"] == "websocket", False
    held: Message | None = None  # the start of a 500, until its body comes

    async def guarded(message: Message) -> None:
        nonlocal started, replaced, held
        if replaced:
            return
        if not started:
            if message["type"] == "http.response.start" and message["status"] == 500:
                held = message
                return
            if held is not None and model.state in ("unavailable", "failed"):
                replaced = True
                await model.refusal()(scope, receive, send)
                return
            started = held is not None or message["type"] == "http.response.start"
            if held is not None:
                await send(held)
        ticket.note(message)
        await send(message)

    model.inflight += 1
    try:
        await model.app(scope, receive, guarded)
    except Exception:
        if started:
            raise  # the server cuts the connection: the client must not take half an answer for a whole one
        logger.exception("app raised before it answered model=%s state=%s", model.name, model.state)
        if not replaced:
            await model.refusal()(scope, receive, send)
    finally:
        ticket.close()
        model.inflight -= 1
