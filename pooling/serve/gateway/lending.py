# SPDX-License-Identifier: Apache-2.0
"""Routes that lend memory and put models to sleep: `/v1/pool/budget`, and vLLM's own words for the latter.

`/sleep`, `/wake_up` and `/is_sleeping` are there with VLLM_SERVER_DEV_MODE=1 only, as in vLLM. The router has found out
which model they are for, and puts its name into the scope.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tokenpool.errors import ConfigError, check_setting, show
from tokenpool.serve.gateway.json_body import json_body
from tokenpool.units import parse_bytes
from tokenpool.wire.budget import BudgetOrder, BudgetState

SLEEP_MODEL_KEY = "tokenpool.sleeper"
"""Where the scope of such a request has the name of its model."""
_SIZES = ("device_memory", "host_memory")
_MODES = ("keep", "wait", "abort")


async def show_budget(request: Request) -> Response:
    """What the pool may use of the device and of host memory, what holds it, and what could be."""
    return _told(await request.app.state.operator.budget(BudgetOrder()))


async def set_budget(request: Request) -> Response:
    """Shrink or grow the pool: the body has `device_memory`, where 0 parks it, or `host_memory`, or both."""
    body = await json_body(request, "a budget")
    if not isinstance(body, dict) or not body:
        raise ConfigError(f"expected an object with {' or '.join(_SIZES)}")
    for key in body:
        check_setting(key in _SIZES, str(key), f"is unknown; known: {', '.join(_SIZES)}")
    sizes = {key: parse_bytes(value, key) for key, value in body.items()}
    return _told(await request.app.state.operator.budget(BudgetOrder(**sizes)))


def _told(state: BudgetState) -> Response:
    return JSONResponse({"parked": state.is_parked, **asdict(state)})


async def sleep(request: Request) -> Response:
    """Let a model leave the device and take no turns: `?level=1&mode=keep`; its requests wait and keep their KV."""
    asked = request.query_params
    level, mode = asked.get("level", "1"), asked.get("mode", "keep")
    check_setting(level in ("0", "1", "2"), "level", f"{show(level)} is none of 0, 1 and 2")
    check_setting(mode in _MODES, "mode", f"{show(mode)} is none of {', '.join(_MODES)}")
    await request.app.state.operator.sleep(_model_of(request), int(level), mode)
    return JSONResponse({"status": "sleeping", "level": int(level)})


async def wake_up(request: Request) -> Response:
    """Let a model take turns again, all of it, whichever `tags` are given."""
    await request.app.state.operator.wake(_model_of(request))
    return JSONResponse({"status": "awake", "tags": request.query_params.getlist("tags") or None})


async def is_sleeping(request: Request) -> Response:
    """Whether a model sleeps, at any level."""
    asleep = await request.app.state.operator.asleep()
    return JSONResponse({"is_sleeping": _model_of(request) in asleep})


def _model_of(request: Request) -> Any:
    return request.scope[SLEEP_MODEL_KEY]
