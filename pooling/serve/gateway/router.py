# SPDX-License-Identifier: Apache-2.0
"""Choose the vLLM app that serves a request, by the model it names, and replay the request to it.

Every model has vLLM's own FastAPI app, so each route vLLM has, or will have, works without code here. The
request body is buffered to read the model's name (vLLM buffers it too). This module imports no vLLM: an app
is any ASGI callable, and the few attributes read from ``app.state`` are optional.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tokenpool import settings
from tokenpool.serve.access.auth import PICKER_PATH, POOL_PREFIX, TENANT_KEY, route_path
from tokenpool.serve.access.dev_routes import REFUSED_PATHS, SLEEP_PATHS
from tokenpool.serve.access.entry import Access, Asked
from tokenpool.serve.access.held_stream import asks_for_stream
from tokenpool.serve.access.refused import RefusedError, bad_request
from tokenpool.serve.access.sequences import count_sequences
from tokenpool.serve.access.tenant_line import TenantLine
from tokenpool.serve.access.tenants import Account, TenantBook
from tokenpool.serve.client.suspects import SUSPECTS
from tokenpool.serve.gateway.lending import SLEEP_MODEL_KEY
from tokenpool.serve.gateway.model_app import ModelApp, call_app
from tokenpool.serve.gateway.model_choice import ModelChoice
from tokenpool.serve.http.body_budget import Body, BodyBudget
from tokenpool.serve.http.request_body import adapter_name, fault_of, replay
from tokenpool.serve.http.request_note import note_of
from tokenpool.serve.http.websocket_frames import WatchedSocket

OUTER_PATHS = frozenset(
    {"/v1/models", "/metrics", "/health", "/ready", "/live", "/load", "/version", "/ping", "/pool", POOL_PREFIX,
     PICKER_PATH}
)  # fmt: skip
"""Answered once for the whole pool."""

OUTER_PREFIXES = ("/v1/models/", f"{POOL_PREFIX}/", f"{PICKER_PATH}/")

_LOAD_ADAPTER = {"/v1/load_lora_adapter": "lora_name", "/adapters": "name"}
"""Paths at which vLLM loads an adapter, and the key of its name."""
_BODILESS_METHODS = frozenset({"GET", "HEAD", "DELETE"})


class ModelRouter:
    """ASGI app: pool-level paths go to `outer`, all others to the app of the model they name.

        router = ModelRouter(outer, max_request_bytes=64 << 20)
        router.add(ModelApp("org/a", build_app(...), state=Life.READY))
        app = ApiKeyAuth(router, api_keys=..., admin_keys=...)

    The model is named by, in this order: the path prefix ``/models/<name>/``, the body's `model` (JSON or
    form field), the query's `model`, having stored the response (``/v1/responses/<id>``), being the only one.
    Lifespan events are not handled: run uvicorn with ``lifespan="off"``.
    """

    def __init__(self, outer: ASGIApp, *, max_request_bytes: int, tenants: TenantBook | None = None) -> None:
        self.outer_paths: set[str] = set(OUTER_PATHS)
        self.outer_prefixes: tuple[str, ...] = OUTER_PREFIXES
        self._dev_mode = bool(settings.DEV_MODE.get())
        self._outer = outer
        self._bodies = BodyBudget(max_request_bytes)
        self._models: dict[str, ModelApp] = {}
        self._tenants = tenants
        self._num_coming = 0
        self._access = Access(lambda scope, tenant: SUSPECTS.tenants.refusal(scope, tenant))

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
        model = self._models.pop(name)
        model.hold.refuse(model.refusal)
        return model

    async def let_through(self, limit_s: float) -> None:
        """Wait until no request is read, or held before an engine for its tenant, at most `limit_s`; for a shutdown."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if not self._num_coming and not any(len(m.gate.line or ()) for m in self._models.values()):
                return
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
        account: Account | None = scope.get(TENANT_KEY)
        with self._bodies.body(account.config.name if account is not None else "") as body, ExitStack() as coming:
            coming.enter_context(self._coming())
            await self._serve(path, scope, receive, send, body, coming.close)

    @contextmanager
    def _coming(self) -> Iterator[None]:
        """A request is read, and the model chosen that it is for."""
        self._num_coming += 1
        try:
            yield
        finally:
            self._num_coming -= 1

    async def _serve(
        self, path: str, scope: Scope, receive: Receive, send: Send, buffer: Body, has_come: Callable[[], None]
    ) -> None:
        headers, note = Headers(scope=scope), note_of(scope)
        account: Account | None = scope.get(TENANT_KEY)
        note.tenant = account.config.name if account is not None else ""
        choice = ModelChoice(self._models.values(), account)
        model, scope = choice.by_prefix(path, scope)
        body, app_receive = b"", receive
        if scope["type"] == "websocket":
            socket = WatchedSocket(receive, send)
            receive, app_receive, send = socket.peek, socket.receive, socket.send
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
        dev_path = route_path(scope) if self._dev_mode else ""
        if dev_path in REFUSED_PATHS:
            raise bad_request(REFUSED_PATHS[dev_path])
        if dev_path in SLEEP_PATHS:
            await self._outer({**scope, SLEEP_MODEL_KEY: model.name}, app_receive, send)
            return
        for key in {key for ending, key in _LOAD_ADAPTER.items() if path.endswith(ending) and model.has_route(scope)}:
            choice.refuse_adapter(model, key, adapter_name(body, key))
        sequences = count_sequences(body) if account is not None else 1
        is_stream = not model.is_ready and asks_for_stream(path, body)
        asked = Asked(scope, path, len(body), sequences, is_stream)
        has_come()
        del body  # from here on the app alone decides how long it lives
        async with self._access.enter(model, account, asked, receive, send) as entry:
            if entry is not None:
                await call_app(model, entry.ticket, scope, app_receive, entry.send)


def _has_body(scope: Scope, headers: Headers) -> bool:
    """Tell whether a body may come and may say which model a request is for; OPTIONS asks about a path alone."""
    if scope["type"] != "http" or scope["method"] == "OPTIONS":
        return False
    announced = "transfer-encoding" in headers or headers.get("content-length", "0").strip("0") != ""
    return announced or scope["method"] not in _BODILESS_METHODS
