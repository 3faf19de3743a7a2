# SPDX-License-Identifier: Apache-2.0
"""CORS of the port: one middleware in front of everything, so that browsers can read each answer, errors too.

vLLM puts such a middleware into each model's app. There it sees neither preflights, which name no model, nor what the
pool answers itself.
"""

from __future__ import annotations

from argparse import Namespace

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp


def with_cors(app: ASGIApp, args: Namespace) -> ASGIApp:
    """Return `app` behind the CORS that vLLM's flags in `args` ask for; preflights never reach it."""
    return CORSMiddleware(
        app,
        allow_origins=args.allowed_origins,
        allow_credentials=args.allow_credentials,
        allow_methods=args.allowed_methods,
        allow_headers=args.allowed_headers,
    )


def _is_cors(middleware: object) -> bool:
    return middleware is CORSMiddleware


def drop_cors(app: Starlette) -> None:
    """Take the CORS middleware that vLLM made by its flags out of an app that has not answered yet."""
    app.user_middleware = [
        each for each in app.user_middleware if not _is_cors(each.cls) or "allow_origins" not in each.kwargs
    ]
    app.middleware_stack = None  # some of vLLM's integrations build it early; the first request builds it anew
