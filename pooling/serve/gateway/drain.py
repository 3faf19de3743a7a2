# SPDX-License-Identifier: Apache-2.0
"""`POST /v1/pool/hosts/{name}`: empty a host of a cluster, or use it again."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tokenpool.errors import ConfigError
from tokenpool.serve.gateway.json_body import json_body


async def change_host(request: Request) -> Response:
    """The body is `{"draining": true}` or false; tells which models are still there. Asking again changes nothing."""
    body, host = await json_body(request, "a host"), request.path_params["name"]
    if not isinstance(body, dict) or body.keys() != {"draining"} or not isinstance(body["draining"], bool):
        raise ConfigError('expected {"draining": true} or {"draining": false}')
    models = await request.app.state.operator.drain(host, body["draining"])
    return JSONResponse({"host": host, "draining": body["draining"], "models": models})
