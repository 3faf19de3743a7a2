# SPDX-License-Identifier: Apache-2.0
"""How a part of the router says that it answers a request itself. Imports no vLLM."""

from __future__ import annotations

from starlette.responses import Response

from tokenpool.serve.access.auth import error_response


class RefusedError(Exception):
    """The router answers itself: with `response`, or `close_code` on a websocket."""

    def __init__(self, response: Response, close_code: int = 1008) -> None:
        self.response = response
        self.close_code = close_code


def bad_request(message: str, param: str | None = None) -> RefusedError:
    """The request is wrong: 400."""
    return RefusedError(error_response(400, "BadRequestError", message, param))


def not_found(message: str, param: str | None = None, *, kind: str = "NotFoundError") -> RefusedError:
    """What the request names is not there: 404 with an error of type `kind`."""
    return RefusedError(error_response(404, kind, message, param))
