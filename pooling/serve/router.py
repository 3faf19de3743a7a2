# SPDX-License-Identifier: Apache-2.0
"""Choose the vLLM app that serves a request, by the model it names, and replay the request to it.

Every model has vLLM's own FastAPI app, so each route vLLM has, or will have, works without code here. The
request body is buffered to read the model's name (vLLM buffers it too). This module imports no vLLM: an app
is any ASGI callable, and the few attributes read from ``app.state`` are optional.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import nullcontext
from types import MappingProxyType

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .admission import Ticket, waits_for_tokens
from .auth import POOL_PREFIX, TENANT_KEY, route_path
from .blamed_tenants import REASON
from .body_budget import Body, BodyBudget
from .model_app import ModelApp, call_app
from .model_choice import ModelChoice
from .refused import RefusedError, bad_request
from .request_body import adapter_name, fault_of, replay
from .request_note import note_of
from .sequences import count_sequences
from .suspects import SUSPECTS
from .tenant_call import CURRENT_CALL, Call
from .tenant_line import TenantLine
from .tenants import Account, TenantBook

OUTER_PATHS = frozenset(
    {"/v1/models", "/metrics", "/health", "/ready", "/live", "/load", "/version", "/ping", "/pool", POOL_PREFIX}
)
"""Answered once for the whole pool."""

OUTER_PREFIXES = ("/v1/models/", f"{POOL_PREFIX}/")

_LOAD_ADAPTER = {"/v1/load_lora_adapter": "lora_name", "/adapters": "name"}
"""Paths at which vLLM loads an adapter, and the key of its name."""
_BODILESS_METHODS = frozenset({"GET", "HEAD", "DELETE"})


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
        self._bodies = BodyBudget(max_request_bytes)
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
        except RefusedError as refused:
            if scope["type"] == "http":
                await refused.response(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": refused.close_code, "reason": ""})

    async def _route(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        with self._bodies.body() as body:
            await self._serve(path, scope, receive, send, body)

    async def _serve(self, path: str, scope: Scope, receive: Receive, send: Send, buffer: Body) -> None:
        headers, note = Headers(scope=scope), note_of(scope)
        account: Account | None = scope.get(TENANT_KEY)
        note.tenant = account.config.name if account is not None else ""
        choice = ModelChoice(self._models.values(), account)
        model, scope = choice.by_prefix(path, scope)
        body, app_receive = b"", receive
        if _has_body(scope, headers):
            with self._bodies.reading(scope, account, model.name if model else ""):
                read = await buffer.read(headers, receive)
            if read is None:
                return
            content_type = headers.get("content-type", "")
            if (fault := await fault_of(read, content_type)) is not None:
                raise bad_request(fault)
            body, app_receive = read, replay(read, receive, content_type)
        model = model or await choice.by_request(path, scope, headers, body)
        note.model = model.name
        for key in {key for ending, key in _LOAD_ADAPTER.items() if path.endswith(ending)}:
            choice.refuse_adapter(model, key, adapter_name(body, key))
        if model.state != "resident":
            raise RefusedError(model.refusal(), close_code=1013)
        sequences = count_sequences(body) if account is not None else 1
        with account.exclusive() if account is not None else nullcontext():
            ticket = self._take_in(model, account, scope, path, sequences)
            call = account.begin(scope, model.name, len(body), sequences) if account is not None else None
        del body  # from here on the app alone decides how long it lives
        if call is None:
            await call_app(model, ticket, scope, app_receive, send)
            return
        try:
            if await _hold(model, call, scope, path, receive):
                await _call_for(model, call, ticket, scope, app_receive, send)
        finally:
            ticket.close()
            call.close()

    def _take_in(self, model: ModelApp, account: Account | None, scope: Scope, path: str, sequences: int) -> Ticket:
        if account is not None:
            if (refusal := SUSPECTS.tenants.refusal(scope, account.config.name)) is not None:
                account.refused[model.name, REASON] += 1
                raise RefusedError(refusal)
            if (refusal := account.refusal(scope, model.name, sequences)) is not None:
                raise RefusedError(refusal)
        ticket = model.gate.admit(scope, path, account and account.config.name)
        if isinstance(ticket, Response):
            if account is not None:
                account.refused[model.name, "queue"] += 1
            raise RefusedError(ticket)
        return ticket


def _has_body(scope: Scope, headers: Headers) -> bool:
    """Tell whether a body may come and may say which model a request is for; OPTIONS asks about a path alone."""
    if scope["type"] != "http" or scope["method"] == "OPTIONS":
        return False
    announced = "transfer-encoding" in headers or headers.get("content-length", "0").strip("0") != ""
    return announced or scope["method"] not in _BODILESS_METHODS


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
        raise RefusedError(model.refusal())
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
        await call_app(model, ticket, scope, receive, dressed)
    finally:
        CURRENT_CALL.reset(token)
