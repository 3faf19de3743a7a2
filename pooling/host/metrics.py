# SPDX-License-Identifier: Apache-2.0
"""The host's Prometheus metrics, copied from its plain counters when it is idle and about twice a second else."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

from prometheus_client import generate_latest
from vllm.v1.metrics.prometheus import get_prometheus_registry

from tokenpool.host.engine_host import EngineHost
from tokenpool.host.hosted_model import HostedModel
from tokenpool.host.state import copied_bytes, step_errors, weight_state
from tokenpool.memory.states import WeightState
from tokenpool.metric_registry import LabelledGauge, metric
from tokenpool.process.metric_files import forget_models, outlast_full_disks

logger = logging.getLogger(__name__)

_COUNTERS = ("steps", "turns", "step_seconds", "crashed_steps", "failed_requests")
_TOKENS = ("tokens", "tokens_on_time", "tokens_late")
_RESIDENCY = {
    "switches": "waited_switches",
    "visible_seconds": "switch_wait_seconds",
    "prefetches": "prefetches",
    "failures": "switch_failures",
}
_EVICTIONS = {"weight_evictions": "weights", "kv_evictions": "kv"}
_CHECK_PERIOD_S = 10.0


class HostMetrics:
    """Metrics named `tokenpool:*`; one object per process."""

    def __init__(self, host: EngineHost) -> None:
        outlast_full_disks()
        self._host = host
        self._per_model = {name: metric(name).make() for name in (*_COUNTERS, *_TOKENS)}
        self._global = {
            "switches": metric("switches").make(),
            "overhead_seconds": metric("loop_overhead_seconds").make(),
        }
        self._moves = {
            "num_grants": metric("slab_grants").make(),
            "num_reclaims": metric("slab_reclaims").make(),
        }
        self._residency = {attribute: metric(name).make() for attribute, name in _RESIDENCY.items()}
        self._evictions = metric("evictions").make()
        self._copied = metric("copied_bytes").make()
        self._pages = LabelledGauge("pages")
        self._host_memory = LabelledGauge("host_memory_bytes")
        self._node_memory = LabelledGauge("node_memory_bytes")
        self._queue = LabelledGauge("queue_requests")
        self._states = LabelledGauge("model_state")
        self._errors = LabelledGauge("cost_error")
        self._attainment = LabelledGauge("slo_attainment")
        self._goodput = LabelledGauge("goodput_tokens_per_s")
        self._gauges = (self._pages, self._host_memory, self._node_memory, self._queue, self._states, self._errors,
                        self._attainment, self._goodput)  # fmt: skip
        self._books = metric("ledger_ok").make()
        self._books_checked_s = -math.inf
        self._seen: dict[Any, float] = {}  # totals by name; those of a model by its index and name
        self._indices: dict[str, int] = {}  # of the models that have series
        metric("page_size_bytes").make().set(host.config.page_size)

    def update(self) -> None:
        """Copy the counters; called on the loop's thread. Some 100 us for four models."""
        host = self._host
        self._forget_models()
        for name, counter in self._global.items():
            self._advance(name, counter, (), getattr(host, name))
        for name, counter in self._moves.items():
            self._advance(name, counter, (), getattr(host.allocator, name))
        self._update_switches()
        for hosted in host.models.values():
            self._update_model(hosted)
        self._update_gauges()
        self._check_books()

    def _forget_models(self) -> None:
        """Take the series of models that are gone, or were replaced by others of their name, out of the scrape."""
        now = {hosted.name: hosted.index for hosted in self._host.models.values()}
        gone = {name for name, index in self._indices.items() if now.get(name) != index}
        ended = {self._indices[name] for name in gone}
        self._indices = now
        if gone:
            forget_models(gone)
            for gauge in self._gauges:
                gauge.forget(gone)
            self._seen = {key: value for key, value in self._seen.items() if key[0] not in ended}

    def _check_books(self) -> None:
        """Check the ledgers now and then; some 150 us per 1,000 pages."""
        if time.monotonic() - self._books_checked_s < _CHECK_PERIOD_S:
            return
        self._books_checked_s = time.monotonic()
        try:
            self._host.ledger.check()
            self._host.host_ledger.check()
        except AssertionError as error:
            logger.error("the books of the memory do not agree: %s", error)
            self._books.set(0)
        else:
            self._books.set(1)

    def _update_switches(self) -> None:
        host = self._host
        for name, counter in self._residency.items():
            self._advance(("residency", name), counter, (), getattr(host.residency.counters, name))
        for name, kind in _EVICTIONS.items():
            self._advance(("evictions", kind), self._evictions, (kind,), getattr(host.residency.counters, name))
        dropped = host.swapper.tier.counters.evictions
        self._advance(("evictions", "cached_kv"), self._evictions, ("cached_kv",), dropped)
        for kind, nbytes in copied_bytes(host).items():
            self._advance(("copied", kind), self._copied, (kind,), nbytes)

    def _update_model(self, hosted: HostedModel) -> None:
        account = hosted.core.slo_account
        values = {name: getattr(hosted.core.counters, name) for name in _COUNTERS}
        late = account.tokens - account.tokens_on_time
        values |= {"tokens": account.tokens, "tokens_on_time": account.tokens_on_time, "tokens_late": late}
        for name, value in values.items():
            # The index tells a model that was removed and added again, whose counters start anew.
            self._advance((hosted.index, name), self._per_model[name], (hosted.name,), value)

    def _update_gauges(self) -> None:
        host, models = self._host, self._host.models.values()
        pages = host.ledger.snapshot()
        self._pages.replace(_by_use(pages.held) | {("free", ""): pages.num_free})
        self._host_memory.replace(_by_use(host.host_ledger.snapshot()) | {("free", ""): host.host_ledger.free_bytes})
        if host.node is not None:
            self._node_memory.replace(_node_memory(host.node.book))
        queues: dict[tuple[str, ...], float] = {}
        states, errors, shares, goodput = dict(queues), dict(queues), dict(queues), dict(queues)
        for hosted in models:
            name, scheduler, account = hosted.name, hosted.core.scheduler, hosted.core.slo_account
            queues[name, "running"] = len(scheduler.running)
            queues[name, "waiting"] = len(scheduler.waiting)
            now = weight_state(host, hosted)
            states |= {(name, state.value): float(state == now) for state in WeightState}
            errors |= {(name, kind): error for kind, error in step_errors(hosted).items()}
            if hosted.spec.slo is not None:
                token, request, time_weighted, _ = account.attainments()
                shares |= {(name, "token"): token, (name, "request"): request, (name, "time_weighted"): time_weighted}
                goodput[name,] = account.goodput_tokens_per_s(time.time())
        errors |= {("", kind): error for kind, error in host.residency.copies.errors().items()}
        self._queue.replace(queues)
        self._states.replace(states)
        self._errors.replace(errors)
        self._attainment.replace(shares)
        self._goodput.replace(goodput)

    def _advance(self, key: Any, counter: Any, labels: tuple[str, ...], value: float) -> None:
        """Bring a counter up to a running total; `key` names the total. One that has not changed costs nothing."""
        before = self._seen.get(key)
        if before != value:
            (counter.labels(*labels) if labels else counter).inc(value - (before or 0.0))
            self._seen[key] = value


def scrape() -> str:
    """This process' metrics in Prometheus' text format; reads files, so any thread may call it."""
    return generate_latest(get_prometheus_registry()).decode()


def _by_use(held: Mapping[str, Mapping[str, int]]) -> dict[tuple[str, ...], float]:
    """(use, owner) -> amount."""
    return {(use, owner): amount for use, owners in held.items() for owner, amount in owners.items()}


def _node_memory(book: Mapping[str, Any]) -> dict[tuple[str, ...], float]:
    """(use,) -> bytes, of a book that `NodeBooks` has made; nothing without one."""
    if not book:
        return {}
    spare = book["copies_bytes"] - book["held_copies_bytes"]
    values = {
        "held_copies": book["held_copies_bytes"],
        "spare_copies": spare,
        "own": book["own_bytes"],
        "free": max(0, book["budget_bytes"] - book["used_bytes"]),
        "over": book["over_bytes"],
    }
    return {(use,): value for use, value in values.items()}
