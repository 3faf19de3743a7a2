# SPDX-License-Identifier: Apache-2.0
"""Keys for the public API and for the pool's admin API, checked in front of everything else.

Paths are judged by the worst reading any later layer could give them (decoded, with empty and dot segments
removed, below a ``/models/<name>/`` prefix), so that no spelling of an admin path gets round its key.
This module also holds what the router needs to agree on with it: how a path is read, and the shape of the pool's
own refusals. It imports no vLLM.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable, Mapping
from itertools import pairwise
from urllib.parse import unquote

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from tokenpool.serve.access.dev_routes import SLEEP_PATHS, dev_path_of

POOL_PREFIX = "/v1/pool"
"""Everything below this path is the pool's admin API."""

OPEN_PATHS = frozenset({"/health", "/ready", "/live", "/ping", "/pool"})
"""Probes, and the status page, which asks for the admin key itself: answered without a key."""

PICKER_PATH = "/metrics/picker"
"""What an endpoint picker reads, which has no key: open if the pool file says so, with a model's name behind it too."""

TENANT_KEY = "tokenpool.tenant"
"""Where the scope of a request has the account of its tenant, in a pool with tenants."""

CLIENT_KEY = "tokenpool.client"
"""True in the scope of a request whose key, if the pool asks for one, is known: probes come with it and without."""

_LOOKING_METHODS = frozenset({"GET", "HEAD"})
_MAX_DECODE_ROUNDS = 8


_MESSAGES = "/v1/messages"


class ErrorAnswer(Response):
    """An error that the pool itself answers, in the shape of the API that was called."""

    def __init__(
        self, status: int, kind: str, message: str, param: str | None, headers: Mapping[str, str] | None
    ) -> None:
        error = {"message": message, "type": kind, "param": param, "code": status}
        # ASCII escapes: a name copied from the request may hold lone surrogates, which UTF-8 cannot carry.
        super().__init__(json.dumps({"error": error}), status, headers, "application/json")
        self._for_messages = json.dumps({"type": "error", "error": {"type": kind, "message": message}})
        self._own_headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it: by Anthropic's Messages API below ``/v1/messages``, else by OpenAI's."""
        path: str = scope["path"]
        if path.endswith(_MESSAGES) or f"{_MESSAGES}/" in path:
            answer = Response(self._for_messages, self.status_code, self._own_headers, "application/json")
            await answer(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def error_response(
    status: int, kind: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """Return an error with what vLLM's OpenAI server tells: message, type, param, code."""
    return ErrorAnswer(status, kind, message, param, headers)


def route_path(scope: Scope) -> str:
    """Return the path below ``root_path``, by the rule that Starlette's own routing uses."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if not root or not path.startswith(root) or path[len(root) :][:1] not in ("", "/"):
        return path
    return path[len(root) :]


def scope_below(scope: Scope, prefix: str) -> Scope:
    """Return `scope` with `prefix`, the beginning of its route path, moved from the path to ``root_path``."""
    path: str = scope["path"]
    start = len(path) - len(route_path(scope))
    cut = start + len(prefix)
    moved = {"path": path[cut:] or "/", "root_path": scope.get("root_path", "") + path[start:cut]}
    if (raw := scope.get("raw_path")) is not None:
        raw_cut = 0
        for _ in path[:cut].encode():
            raw_cut += 3 if raw[raw_cut : raw_cut + 1] == b"%" else 1
        moved["raw_path"] = raw[raw_cut:] or b"/"
    return {**scope, **moved}


def is_picker_path(path: str) -> bool:
    """Tell whether a route path is `PICKER_PATH`, of the pool or of one model."""
    return path == PICKER_PATH or path.startswith(f"{PICKER_PATH}/")


def touches_pool_api(path: str) -> bool:
    """Tell whether any reading of `path` names the admin API.

    Reads the path as written and after each round of percent-decoding, with and without resolving dot
    segments, and at any depth: a root path or a ``/models/<name>/`` prefix in front changes nothing.
    """
    if "%" not in path and "pool" not in path:
        return False  # nearly every request ends here
    for _ in range(_MAX_DECODE_ROUNDS):
        if _has_pool_segments(path):
            return True
        decoded = unquote(path)
        if decoded == path:
            return False
        path = decoded
    return True  # nobody encodes a path that often in good faith


def _has_pool_segments(path: str) -> bool:
    written = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")]
    resolved: list[str] = []
    for part in written:
        if part != "..":
            resolved.append(part)
        elif resolved:
            resolved.pop()
    return any(pair == ("v1", "pool") for parts in (written, resolved) for pair in pairwise(parts))


class ApiKeyAuth:
    """ASGI middleware that lets a request through only with a key for what it asks.

    A key comes as ``Authorization: Bearer KEY`` or as ``x-api-key: KEY`` (Anthropic clients).

    | path                  | needs                                                               |
    |-----------------------|---------------------------------------------------------------------|
    | in `open_paths`       | nothing; the path must match exactly. `CLIENT_KEY` tells of a key   |
    | `is_picker_path`      | nothing, with `opens_picker`                                        |
    | GET, ``/v1/pool``     | a view or admin key; without any configured, always refused with 403|
    | touches ``/v1/pool``  | an admin key; without any configured, always refused with 403       |
    | ``/is_sleeping``      | as GET, ``/v1/pool``, with `guards_dev`                             |
    | other `dev_path_of`   | an admin key for every method, with `guards_dev`                    |
    | any other             | an API, tenant or admin key, if API or tenant keys are configured   |

    It holds for every method. Preflights, which carry no key, are answered in front of it: see `port`.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: Iterable[str],
        admin_keys: Iterable[str],
        view_keys: Iterable[str] = (),
        tenant_keys: Iterable[tuple[bytes, object]] = (),
        default_tenant: object = None,
        open_paths: Iterable[str] = OPEN_PATHS,
        opens_picker: bool = False,
        guards_dev: bool = False,
    ) -> None:
        """`tenant_keys` are SHA-256 digests, each with what the request's scope then has at `TENANT_KEY`.

        Any other request that is let through, but for probes without a key, has `default_tenant` there, unless it is
        None.
        """
        self.app = app
        self._admin_digests = _digests("admin_key", admin_keys)
        self._looking_digests = self._admin_digests + _digests("view_key", view_keys)
        api_digests, tenants = _digests("api_key", api_keys), list(tenant_keys)
        self._default_tenant = default_tenant
        self._is_open = not api_digests and not tenants
        self._user_digests = [*api_digests, *self._admin_digests, *(digest for digest, _ in tenants)]
        self._owners = [default_tenant] * (len(self._user_digests) - len(tenants)) + [owner for _, owner in tenants]
        self._open_paths = frozenset(open_paths)
        self._opens_picker = opens_picker
        self._guards_dev = guards_dev

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401 or 403 (on a websocket without that extension: close 1008)."""
        refusal = self._refusal(scope) if scope["type"] in ("http", "websocket") else None
        if refusal is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http" or "websocket.http.response" in (scope.get("extensions") or {}):
            await refusal(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008, "reason": "invalid or missing key"})

    def _refusal(self, scope: Scope) -> Response | None:
        dev_path = dev_path_of(route_path(scope)) if self._guards_dev else ""
        if touches_pool_api(scope["path"]) or dev_path:
            return self._admin_refusal(scope, dev_path)
        owner = self._default_tenant
        if not self._is_open:
            found = _carried_key(scope, self._user_digests)
            if found is None:
                return None if self._is_open_path(route_path(scope)) else _unauthorized("Missing or invalid API key.")
            owner = self._owners[found]
        scope[CLIENT_KEY] = True
        if owner is not None:
            scope[TENANT_KEY] = owner
        return None

    def _is_open_path(self, path: str) -> bool:
        return path in self._open_paths or (self._opens_picker and is_picker_path(path))

    def _admin_refusal(self, scope: Scope, dev_path: str) -> Response | None:
        looks = scope.get("method") in _LOOKING_METHODS and (not dev_path or dev_path in SLEEP_PATHS)
        if not (self._looking_digests if looks else self._admin_digests):
            what = f"{dev_path} of vLLM's development mode" if dev_path else f"The pool API below {POOL_PREFIX}"
            message = f"{what} is off: set admin_key in the pool file to use it"
            return error_response(403, "PermissionDeniedError", message + (", or view_key to look." if looks else "."))
        if _carried_key(scope, self._admin_digests) is not None:
            return None
        if _carried_key(scope, self._looking_digests) is None:
            return _unauthorized("Missing or invalid admin key.")
        message = "A view key only looks: this needs an admin key."
        return None if looks else error_response(403, "PermissionDeniedError", message)


def _unauthorized(message: str) -> Response:
    return error_response(401, "AuthenticationError", message, headers={"www-authenticate": "Bearer"})


def _digests(setting: str, keys: Iterable[str]) -> list[bytes]:
    if isinstance(keys, str):
        raise TypeError(f"{setting}: expected several keys, got one string")
    keys = list(keys)
    if any(not key or key != key.strip() for key in keys):
        raise ValueError(f"{setting}: a key must not be empty or begin or end with white space")
    return [hashlib.sha256(key.encode()).digest() for key in keys]


def _carried_key(scope: Scope, digests: list[bytes]) -> int | None:
    """Return which digest is that of a presented key, the last one of several.

    Compares every presented key with every digest: the time taken tells nothing about the keys.
    """
    found = None
    for name, value in scope["headers"]:
        scheme, _, credentials = value.partition(b" ")
        if name == b"authorization" and scheme.lower() == b"bearer":
            key = credentials
        elif name == b"x-api-key":
            key = value
        else:
            continue
        presented = hashlib.sha256(key.strip()).digest()
        for i, digest in enumerate(digests):
            found = i if hmac.compare_digest(presented, digest) else found
    return found
