# SPDX-License-Identifier: Apache-2.0
"""What an endpoint picker (Gateway API Inference Extension) reads of a pool, under the names that it knows of vLLM.

A picker takes one number of each name from a server, and thinks that the server is one model on a device of its own.
In `/metrics` a name has one number per model, and `vllm:kv_cache_usage_perc` is a share of what the model could have at
that moment, so it says little of whether the next request finds room. Here a scrape is of one model, or of the pool as
one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from tokenpool.memory.host_ledger import HostUse
from tokenpool.memory.ledger import PageUse
from tokenpool.memory.page_counts import pages_for
from tokenpool.serve.gateway.model_choice import unknown_model
from tokenpool.serve.gateway.operator import Operator

_FRESH_S = 0.2
"""Age up to which a state is told again: pickers ask twenty times a second, and each answer is a call to the hosts."""

_LABEL = "model_name"
_WHOLE_POOL = "pool"


class Numbers(NamedTuple):
    """What a picker wants to know of a server."""

    waiting: int
    """Requests without a turn so far, those included that frontends hold, read or tokenize."""
    running: int
    """Requests that are being computed, or pause between two turns."""
    kv_usage: float
    """0 to 1, where at 1 the next request waits for, or pushes out, the KV of another.

    The KV of all requests of all models, what was paused to host memory included, by the pages that KV can have beside
    the weights of the asked model. Cached blocks that nobody uses, and the weights of other models, give way.
    """


def numbers_of(state: Mapping[str, Any], name: str | None) -> Numbers:
    """From the pool's state, those of model `name`, or of all models with None.

    For the pool as a whole the heaviest model's weights count. A host that did not answer counts as full.
    """
    told = [model for key, model in state["models"].items() if name in (None, key)]
    waiting, running, used, room, is_blind = sum(model["held"] for model in told), 0, 0.0, 0, False
    for host in _hosts_of(state):
        if "models" not in host:
            is_blind = True
            continue
        queues = [model for key, model in host["models"].items() if name in (None, key)]
        waiting += sum(model["waiting"] for model in queues)
        running += sum(model["running"] for model in queues)
        if name is None or queues or not _is_cluster(state):
            used += sum(_pages_in_use(model, host["page_size"]) for model in host["models"].values())
            room += _pages_for_kv(host, queues)
    waiting = max(waiting, sum(model["inflight"] for model in told) - running)
    if room <= 0:
        return Numbers(waiting, running, 1.0 if used or is_blind else 0.0)
    return Numbers(waiting, running, min(1.0, used / room))


def _is_cluster(state: Mapping[str, Any]) -> bool:
    return "hosts" in state


def _hosts_of(state: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    hosts = state["hosts"].values() if _is_cluster(state) else [state.get("host")]
    yield from (host or {} for host in hosts)


def _pages_in_use(model: Mapping[str, Any], page_size: int) -> float:
    paused = model["host_bytes"].get(HostUse.PAUSED_KV.value, 0)
    return model["kv_pages"] - model["kv_idle_pages"] + paused / page_size


def _pages_for_kv(host: Mapping[str, Any], asked: list[Mapping[str, Any]]) -> int:
    size = host["page_size"]
    weights = max((max(model["weight_pages"], pages_for(model["weight_bytes"], size)) for model in asked), default=0)
    gone = sum(sum(host["held_pages"].get(use.value, {}).values()) for use in (PageUse.NULL, PageUse.LENT))
    return int(host["num_pages"]) - weights - gone


@dataclass
class Recent:
    """The pool's state, asked for once however many pickers want it."""

    operator: Operator
    state: Mapping[str, Any] | None = None
    at_s: float = 0.0

    def __post_init__(self) -> None:
        self._asking = asyncio.Lock()

    async def get(self) -> Mapping[str, Any]:
        """A state of the last 0.2 s."""
        async with self._asking:
            if self.state is None or time.monotonic() - self.at_s > _FRESH_S:
                self.state = await self.operator.state()
                self.at_s = time.monotonic()
            return self.state


async def recent_state(app: Starlette) -> Mapping[str, Any]:
    """The state of the pool whose outer app this is, at most 0.2 s old; raises PoolError."""
    if not hasattr(app.state, "recent"):
        app.state.recent = Recent(app.state.operator)
    recent: Recent = app.state.recent
    return await recent.get()


def exposition(numbers: Numbers, name: str) -> bytes:
    """The text of a scrape: one sample of each name."""
    registry = CollectorRegistry()
    texts = {
        "vllm:num_requests_waiting": ("Requests that wait, held ones included.", numbers.waiting),
        "vllm:num_requests_running": ("Requests that run.", numbers.running),
        "vllm:kv_cache_usage_perc": ("KV of all models by what it can have, 0 to 1.", numbers.kv_usage),
    }
    for metric, (text, value) in texts.items():
        Gauge(metric, text, [_LABEL], registry=registry).labels(name).set(value)
    return generate_latest(registry)


async def picker_metrics(request: Request) -> Response:
    """`/metrics/picker` of the pool as one server, `/metrics/picker/NAME` of one of its models."""
    app, name = request.app, request.path_params.get("name")
    models = app.state.pool.router.models
    if name is not None and name not in models:
        return unknown_model(name, models.values()).response
    state = await recent_state(app)
    if name is not None and name not in state["models"]:  # it came, or went, since
        return unknown_model(name, models.values()).response
    return Response(exposition(numbers_of(state, name), name or _WHOLE_POOL), media_type=CONTENT_TYPE_LATEST)
