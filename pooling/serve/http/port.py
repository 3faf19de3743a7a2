# SPDX-License-Identifier: Apache-2.0
"""What vLLM's flags ask for the whole port: middleware, request ids, CORS and the root path.

vLLM puts these into each model's app. There they would not see what the pool answers itself. Here they are in front of
everything, in vLLM's order: the middleware of the flags, request ids, CORS. The flags are those of the first model.
"""

from __future__ import annotations

import copy
import inspect
from argparse import Namespace
from typing import Any

from fastapi import FastAPI
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.middleware.x_request_id import XRequestIdMiddleware

from tokenpool.errors import ConfigError
from tokenpool.serve.access.auth import error_response
from tokenpool.serve.http.cors import drop_cors, with_cors
from tokenpool.serve.launch.start_checks import find_middleware


def with_port_flags(app: ASGIApp, args: Namespace, shell: Any = None) -> ASGIApp:
    """Return `app` behind what the flags in `args` ask for; raises ConfigError if a middleware cannot be used.

    `shell` is the app that middleware finds as ``request.app``.
    """
    inner = with_cors(app, args)
    if args.enable_request_id_headers:
        inner = XRequestIdMiddleware(inner)
    for name in args.middleware:  # as in vLLM, the last one sees a request first
        inner = _load(name, inner)
    stack = ServerErrorMiddleware(inner, handler=_server_error)

    async def port(scope: Scope, receive: Receive, send: Send) -> None:
        if shell is not None:
            scope.setdefault("app", shell)
        if args.root_path:
            scope["root_path"] = args.root_path
        await stack(scope, receive, while_there(send))

    return port


def while_there(send: Send) -> Send:
    """`send` that drops what a client that has gone would get, as uvicorn does once it knows.

    Between the end of a connection and the next turn of the event loop it does not, and uvloop refuses to write.
    """

    async def to_who_is_there(message: Message) -> None:
        try:
            await send(message)
        except RuntimeError as error:
            if not str(error).endswith("the handler is closed"):
                raise

    return to_who_is_there


def _load(name: str, app: ASGIApp) -> ASGIApp:
    found = find_middleware(name)
    is_class = inspect.isclass(found)
    if not is_class:
        return BaseHTTPMiddleware(app, dispatch=found)
    try:
        return found(app)
    except Exception as error:  # whatever it runs when it is made
        raise ConfigError(f"cannot make {name}: {type(error).__name__}: {error}", key="--middleware") from error


def _server_error(request: Request, error: Exception) -> Response:
    return error_response(500, "InternalServerError", "The server failed to answer; its log says why.")


def without_port_flags(args: Namespace) -> Namespace:
    """The flags of which a model's app is made: those of the port are not for it."""
    args = copy.copy(args)
    args.middleware, args.enable_request_id_headers, args.root_path = [], False, ""
    return args


def drop_port_parts(app: FastAPI) -> None:
    """Take out of a model's app what the port has, by whatever flags: CORS, and the metrics of the whole process."""
    drop_cors(app)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) != "/metrics"]
