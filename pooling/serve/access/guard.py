# SPDX-License-Identifier: Apache-2.0
"""Who sees the numbers of the whole pool: keys of the pool itself, and metrics keys, which see nothing else.

Metrics tell by name what each tenant uses, and their counters of the prefix cache what it has sent. So a tenant's key
is refused there, and `/load` tells it of itself. Imports no vLLM.
"""

from __future__ import annotations

import hashlib
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from tokenpool import settings
from tokenpool.config import PoolConfig
from tokenpool.serve.access.auth import OPEN_PATHS, TENANT_KEY, ApiKeyAuth, error_response, is_picker_path, route_path
from tokenpool.serve.access.tenants import TenantBook
from tokenpool.tenant_config import DEFAULT_TENANT

_NUMBERS = frozenset({"/metrics", "/load"})
_METRICS_READER = object()
"""Stands for the owner of a metrics key where a request has the account of its tenant."""


def guarded(router: ASGIApp, config: PoolConfig, tenants: TenantBook | None) -> ASGIApp:
    """The port's app: `router` behind the keys of the pool."""
    options: dict[str, Any] = tenants.auth_options() if tenants is not None else {}
    readers = [(hashlib.sha256(key.encode()).digest(), _METRICS_READER) for key in config.metrics_key]
    options["tenant_keys"] = [*options.get("tenant_keys", ()), *readers]
    options |= {"admin_keys": config.admin_key, "view_keys": config.view_key}
    options["opens_picker"] = config.open_picker_metrics
    options["guards_dev"] = bool(settings.DEV_MODE.get())
    return ApiKeyAuth(_Guard(router), api_keys=config.api_key, **options)


class _Guard:
    """Behind the check of keys."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        owner = scope.get(TENANT_KEY)
        if owner is None:
            await self._app(scope, receive, send)
            return
        path = route_path(scope)
        answer: Response | None = None
        if owner is _METRICS_READER:
            scope = {key: value for key, value in scope.items() if key != TENANT_KEY}
            if path not in _NUMBERS | OPEN_PATHS and not is_picker_path(path):
                answer = _forbidden("A metrics key reads /metrics and /load only.")
        elif owner.config.name != DEFAULT_TENANT and is_of_the_pool(path):
            if path == "/load":
                counts = owner.sequences_by_model()
                answer = JSONResponse({"server_load": sum(counts.values()), "models": counts})
            else:
                answer = _forbidden("Numbers of all tenants: this needs an api_key, an admin_key or a metrics_key.")
        if answer is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await answer(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008, "reason": "not with this key"})


def is_of_the_pool(path: str) -> bool:
    """Whether a path, also one that names a model first, leads to numbers that tell of others."""
    if path.startswith("/models/"):
        return "/metrics" in path or path.rstrip("/").endswith("/load")
    return path.startswith("/metrics") or path.rstrip("/") == "/load"


def _forbidden(message: str) -> Response:
    return error_response(403, "PermissionDeniedError", message)
