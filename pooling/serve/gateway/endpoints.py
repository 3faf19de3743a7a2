# SPDX-License-Identifier: Apache-2.0
"""Routes that concern the whole pool; every other route is vLLM's, one app per model."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter
from http import HTTPStatus
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from vllm.v1.metrics.prometheus import get_prometheus_registry
from vllm.version import __version__ as VLLM_VERSION

import tokenpool
from tokenpool.config import PoolConfig
from tokenpool.errors import CapacityError, ConfigError, ModelRefusedError, ModelUnavailableError, PoolError
from tokenpool.metric_registry import LabelledGauge, metric
from tokenpool.model_life import Life
from tokenpool.serve.access.auth import CLIENT_KEY, TENANT_KEY, error_response
from tokenpool.serve.gateway.drain import change_host
from tokenpool.serve.gateway.host_metrics import merged
from tokenpool.serve.gateway.json_body import TooLongError, json_body, too_long
from tokenpool.serve.gateway.lending import is_sleeping, set_budget, show_budget, sleep, wake_up
from tokenpool.serve.gateway.logs import pool_logs
from tokenpool.serve.gateway.model_app import ModelApp
from tokenpool.serve.gateway.model_choice import unknown_model, usable
from tokenpool.serve.gateway.picker import numbers_of, picker_metrics, recent_state
from tokenpool.serve.gateway.status.status_page import status_page
from tokenpool.serve.gateway.tenant_metrics import show_tenants
from tokenpool.serve.launch.added_models import check_added
from tokenpool.units import parse_seconds

_REFUSED = metric("refused_requests").make()
_MODELS = LabelledGauge("models")
_MODEL_FAILED = LabelledGauge("model_failed")
_PENDING = LabelledGauge("pending_requests")
_KV_USAGE = LabelledGauge("kv_usage")
_STATE_LIMIT_S = 2.0
"""For the pool's state, in a scrape."""


def build_outer_app() -> Starlette:
    """The app for pool-level paths; asks the `Pool` and the `Operator` in its state as `pool` and `operator`."""
    get = ["GET"]
    routes = [
        Route("/health", health, methods=get),
        Route("/live", health, methods=get),
        Route("/ping", health, methods=["GET", "POST"]),
        Route("/ready", ready, methods=get),
        Route("/load", load, methods=get),
        Route("/version", version, methods=get),
        Route("/metrics", metrics, methods=get),
        Route("/metrics/picker", picker_metrics, methods=get),
        Route("/metrics/picker/{name:path}", picker_metrics, methods=get),
        Route("/pool", status_page, methods=get),
        Route("/v1/models", list_models, methods=get),
        Route("/v1/models/{name:path}", show_model, methods=get),
        Route("/v1/pool/state", pool_state, methods=get),
        Route("/v1/pool/trace", pool_trace, methods=get),
        Route("/v1/pool/tenants", pool_tenants, methods=get),
        Route("/v1/pool/decisions", pool_decisions, methods=get),
        Route("/v1/pool/logs", pool_logs, methods=get),
        Route("/v1/pool/hosts/{name:path}", change_host, methods=["POST"]),
        Route("/v1/pool/budget", show_budget, methods=get),
        Route("/v1/pool/budget", set_budget, methods=["POST"]),
        Route("/v1/pool/check", pool_check, methods=["POST"]),
        Route("/v1/pool/models", add_model, methods=["POST"]),
        Route("/v1/pool/models/{name:path}", remove_model, methods=["DELETE"]),
        Route("/sleep", sleep, methods=["POST"]),
        Route("/wake_up", wake_up, methods=["POST"]),
        Route("/is_sleeping", is_sleeping, methods=get),
    ]
    handlers = {PoolError: _pool_error, TooLongError: too_long, HTTPException: _http_error}
    return Starlette(routes=routes, exception_handlers=handlers)


async def health(request: Request) -> Response:
    """200 while this process answers; a host that is being restarted shows in /ready."""
    return Response()


async def ready(request: Request) -> Response:
    """200 when requests may be sent, else 503; with a key, each model's state.

    `?model=NAME` asks whether that model is ready, `?all=1` whether no model is on its way.
    """
    pool, models, asked = request.app.state.pool, _models_of(request), request.query_params
    is_ready = pool.settled if asked.get("all", "0") not in ("", "0", "false") else pool.ready
    if (name := asked.get("model")) is not None:
        models = [model for model in models if name in model.aliases()]
        if not models and request.scope.get(CLIENT_KEY):
            return unknown_model(name, _models_of(request)).response
        is_ready = is_ready and bool(models) and models[0].is_ready
    if request.scope.get(CLIENT_KEY):
        body: dict[str, Any] = {model.name: model.state for model in models}
    else:
        body = {"ready": is_ready}
    return JSONResponse(body, status_code=200 if is_ready else 503)


async def load(request: Request) -> Response:
    """Requests in flight, as vLLM's /load, and per model."""
    per_model = await request.app.state.operator.inflight()
    return JSONResponse({"server_load": sum(per_model.values()), "models": per_model})


async def version(request: Request) -> Response:
    """The version of vLLM, as its own route tells it, and ours."""
    return JSONResponse({"version": VLLM_VERSION, "tokenpool": tokenpool.__version__})


async def metrics(request: Request) -> Response:
    """Prometheus metrics of this process and its hosts, all models."""
    pool = request.app.state.pool
    for name, model in pool.router.models.items():
        for status, count in model.gate.take_refused().items():
            _REFUSED.labels(name, str(status)).inc(count)
    _MODELS.replace(Counter((model.state,) for model in pool.router.models.values()))
    for gauge in (_MODEL_FAILED, _PENDING, _KV_USAGE):
        gauge.keep(pool.router.models)
    _MODEL_FAILED.replace({(name,): float(m.state == Life.FAILED) for name, m in pool.router.models.items()})
    with contextlib.suppress(PoolError, TimeoutError):  # a host that hangs must not keep its own alarm from being told
        async with asyncio.timeout(_STATE_LIMIT_S):
            state = await recent_state(request.app)
        numbers = {name: numbers_of(state, name) for name in pool.router.models.keys() & state["models"].keys()}
        _PENDING.replace({(name,): number.waiting for name, number in numbers.items()})
        _KV_USAGE.replace({(name,): number.kv_usage for name, number in numbers.items()})
    if pool.tenants is not None:
        show_tenants(pool.tenants, pool.router.models)
    text = await asyncio.to_thread(merged, get_prometheus_registry(), await request.app.state.operator.host_metrics())
    return Response(text, media_type=CONTENT_TYPE_LATEST)


async def list_models(request: Request) -> Response:
    """All models and adapters in OpenAI's form, each with the pool's state."""
    cards = [c for m in _models_of(request) for c in await _cards(m)]
    return JSONResponse({"object": "list", "data": cards})


async def show_model(request: Request) -> Response:
    """One model's card."""
    name = request.path_params["name"]
    if not name:  # as for any other route with a slash behind it
        return RedirectResponse(request.url.replace(path=request.url.path.rstrip("/")))
    for model in _models_of(request):
        for card in await _cards(model):
            if card["id"] == name:
                return JSONResponse(card)
    return unknown_model(name, _models_of(request)).response


def _models_of(request: Request) -> list[ModelApp]:
    """The models that whoever asks may use."""
    return usable(request.app.state.pool.router.models.values(), request.scope.get(TENANT_KEY))


async def _cards(model: ModelApp) -> list[dict[str, Any]]:
    serving = model.handler("openai_serving_models")
    if serving is None:
        cards = [{"id": model.name, "object": "model", "owned_by": "vllm"}]
    else:
        cards = (await serving.show_available_models()).model_dump()["data"]
    told = {"state": model.state} | ({"reason": model.reason} if model.reason else {})
    return [{**card, "pool": told} for card in cards]


async def pool_state(request: Request) -> Response:
    """Memory map, queues and totals, with the address at which this request came in."""
    return JSONResponse({"address": _address(request), **await request.app.state.operator.state()})


def _address(request: Request) -> str | None:
    """Host and port of the socket; the port is the real one where the pool file says 0."""
    host, port = request.scope.get("server") or (None, None)
    return None if host is None or port is None else f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def pool_tenants(request: Request) -> Response:
    """Each tenant's limits, what is left of them, and its usage per model."""
    return JSONResponse({"tenants": await request.app.state.operator.tenants_report()})


async def pool_trace(request: Request) -> Response:
    """Turns, switches and copies as a Chrome/Perfetto trace; `?seconds=30` limits it to the last 30 s."""
    last = request.query_params.get("seconds")
    last_s = None if last is None else parse_seconds(last, "seconds")
    return JSONResponse(await request.app.state.operator.trace(last_s))


async def pool_decisions(request: Request) -> Response:
    """What a cluster's controller decided and why, oldest first; `?limit=20` gives the last ones. Else 404."""
    limit = request.query_params.get("limit")
    if limit is not None and not (limit.isascii() and limit.isdigit() and len(limit) < 9):
        raise ConfigError("expected a whole number", key="limit")
    decided = await request.app.state.operator.decisions(None if limit is None else int(limit))
    if decided is None:
        return error_response(404, "NotFoundError", "The pool is not on a cluster: nothing is decided.")
    return JSONResponse({"decisions": decided})


async def pool_check(request: Request) -> Response:
    """Check the books of the host's memory; 500 with the difference when they do not agree."""
    try:
        await request.app.state.operator.check()
    except AssertionError as error:
        return error_response(500, "InternalServerError", f"the books do not agree: {error}")
    return JSONResponse({"ok": True})


async def add_model(request: Request) -> Response:
    """Load one more model; the body is an entry of the pool file's `models`, and `admin_models` must let it in."""
    body = await json_body(request, "a model's entry")
    spec = PoolConfig.from_dict({"models": [body]}, source="request").models[0]
    check_added(spec, request.app.state.pool.config)
    added = await request.app.state.operator.add_model(spec)
    return JSONResponse({"name": spec.name, **added}, status_code=201)


async def remove_model(request: Request) -> Response:
    """Drain a model and unload it; `?drain=10s` bounds the wait (default 60s)."""
    name = request.path_params["name"]
    try:
        await request.app.state.operator.remove_model(name, parse_seconds(request.query_params.get("drain", "60s")))
    except KeyError:
        return unknown_model(name, _models_of(request)).response
    return JSONResponse({"name": name, "removed": True})


def _pool_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ConfigError | ModelRefusedError):
        return error_response(400, "BadRequestError", str(error), getattr(error, "key", None))
    if isinstance(error, CapacityError):
        return error_response(507, "InsufficientStorageError", str(error))
    wait_s = error.retry_after_s if isinstance(error, ModelUnavailableError) else 5.0
    return error_response(503, "ServiceUnavailableError", str(error), None, {"retry-after": str(math.ceil(wait_s))})


def _http_error(request: Request, error: Exception) -> Response:
    """A path or method that there is not, as vLLM's apps tell it."""
    assert isinstance(error, HTTPException)
    kind = HTTPStatus(error.status_code).phrase
    return error_response(error.status_code, kind, error.detail, None, error.headers)
