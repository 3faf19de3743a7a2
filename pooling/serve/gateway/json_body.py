# SPDX-License-Identifier: Apache-2.0
"""Reads the short JSON body of a request to the admin API."""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tokenpool.errors import ConfigError
from tokenpool.serve.access.auth import error_response

_MAX_BYTES = 64 << 10


class TooLongError(Exception):
    """A body is longer than any that the admin API takes; the rest of it is unread."""

    def __init__(self, what: str) -> None:
        super().__init__(f"The request body is larger than the {_MAX_BYTES} bytes of {what}.")


async def json_body(request: Request, what: str) -> Any:
    """The body of a request, which is `what` in words; raises ConfigError if it is no JSON, and TooLongError."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BYTES:
            raise TooLongError(what)
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the body is no JSON: {error}") from error


def too_long(request: Request, error: Exception) -> Response:
    """413, for the exception handlers of an app."""
    return error_response(413, "RequestTooLargeError", str(error))
