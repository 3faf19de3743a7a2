# SPDX-License-Identifier: Apache-2.0
"""The host's Prometheus metrics, copied from its plain counters when it is idle and about twice a second else."""

from __future__ import annotations

import time
from collections.abc import Mapping

from prometheus_client import Counter, Gauge

from tokenpool.host.engine_host import EngineHost
from tokenpool.host.hosted_model import HostedModel
from tokenpool.host.state import copied_bytes, step_errors, weight_state
from tokenpool.memory.states import WeightState

_COUNTERS = {
    "steps": "Engine steps run.",
    "turns": "Turns taken, a turn being the steps between two switches.",
    "step_seconds": "Seconds spent in engine steps.",
    "crashed_steps": "Engine steps that ended with an exception.",
    "failed_requests": "Requests failed because they crashed the engine.",
}
_TOKENS = {
    "tokens": "Tokens put out.",
    "on_time": "Tokens put out by their due time; all of a model without an SLO.",
    "late": "Tokens put out after their due time.",
}
_RESIDENCY = {
    "switches": ("tokenpool:waited_switches", "Switches to a model that was not ready, for which the loop waited."),
    "visible_seconds": ("tokenpool:switch_wait_seconds", "Seconds that the loop waited for switches."),
    "prefetches": ("tokenpool:prefetches", "Copies of weights begun beside another model's turn."),
    "failures": ("tokenpool:switch_failures", "Moves of weights or KV that failed."),
}
_EVICTIONS = {"weight_evictions": "weights", "kv_evictions": "kv"}


class LabelledGauge:
    """A gauge whose samples are replaced as a whole: one that is no longer given is set to 0."""

    def __init__(self, name: str, text: str, labels: list[str]) -> None:
        self._gauge = Gauge(name, text, labels, multiprocess_mode="livemostrecent")
        self._shown: dict[tuple[str, ...], float] = {}

    def replace(self, values: Mapping[tuple[str, ...], float]) -> None:
        """Show these values by their labels; what has not changed costs nothing."""
        for labels in self._shown.keys() - values.keys():
            self._set(labels, 0)
        for labels, value in values.items():
            self._set(labels, value)

    def _set(self, labels: tuple[str, ...], value: float) -> None:
        if self._shown.get(labels) != value:
            self._gauge.labels(*labels).set(value)
            self._shown[labels] = value


class HostMetrics:
    """Metrics named `tokenpool:*`; one object per process."""

    def __init__(self, host: EngineHost) -> None:
        self._host = host
        names = {**_COUNTERS, "tokens": _TOKENS["tokens"]}
        self._per_model = {n: Counter(f"tokenpool:{n}", text, ["model_name"]) for n, text in names.items()}
        for outcome in ("on_time", "late"):
            self._per_model[outcome] = Counter(f"tokenpool:tokens_{outcome}", _TOKENS[outcome], ["model_name"])
        self._global = {
            "switches": Counter("tokenpool:switches", "Hand-overs between turns of different models."),
            "overhead_seconds": Counter("tokenpool:loop_overhead_seconds", "Seconds of the loop outside steps."),
        }
        self._moves = {
            "num_grants": Counter("tokenpool:slab_grants", "Slabs granted."),
            "num_reclaims": Counter("tokenpool:slab_reclaims", "Slabs taken back."),
        }
        self._residency = {attribute: Counter(name, text) for attribute, (name, text) in _RESIDENCY.items()}
        self._evictions = Counter("tokenpool:evictions", "What left the device, by kind.", ["kind"])
        self._copied = Counter("tokenpool:copied_bytes", "Bytes copied, by what and where to.", ["kind"])
        self._pages = LabelledGauge("tokenpool:pages", "Device pages held.", ["use", "model_name"])
        self._host_memory = LabelledGauge("tokenpool:host_memory_bytes", "Host memory held.", ["use", "model_name"])
        self._queue = LabelledGauge("tokenpool:queue_requests", "Requests in an engine.", ["model_name", "state"])
        self._states = LabelledGauge("tokenpool:model_state", "1 for where the weights are.", ["model_name", "state"])
        self._errors = LabelledGauge(
            "tokenpool:cost_error", "Mean relative error of predicted seconds.", ["model_name", "kind"]
        )
        self._attainment = LabelledGauge(
            "tokenpool:slo_attainment", "Share that was on time, 0 to 1.", ["model_name", "share"]
        )
        self._goodput = LabelledGauge("tokenpool:goodput_tokens_per_s", "Tokens on time per second.", ["model_name"])
        self._seen: dict[object, float] = {}
        page_bytes = Gauge("tokenpool:page_size_bytes", "Bytes of a device page.", multiprocess_mode="livemostrecent")
        page_bytes.set(host.config.page_size)

    def update(self) -> None:
        """Copy the counters; called on the loop's thread. Some 100 us for four models."""
        host = self._host
        for name, counter in self._global.items():
            self._advance(name, counter, (), getattr(host, name))
        for name, counter in self._moves.items():
            self._advance(name, counter, (), getattr(host.allocator, name))
        self._update_switches()
        for hosted in host.models.values():
            self._update_model(hosted)
        self._update_gauges()

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
        values |= {"tokens": account.tokens, "on_time": account.tokens_on_time, "late": late}
        for name, value in values.items():
            # The index tells a model that was removed and added again, whose counters start anew.
            self._advance((name, hosted.index), self._per_model[name], (hosted.name,), value)

    def _update_gauges(self) -> None:
        host, models = self._host, self._host.models.values()
        pages = host.ledger.snapshot()
        self._pages.replace(_by_use(pages.held) | {("free", ""): pages.num_free})
        self._host_memory.replace(_by_use(host.host_ledger.snapshot()) | {("free", ""): host.host_ledger.free_bytes})
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

    def _advance(self, key: object, counter: Counter, labels: tuple[str, ...], value: float) -> None:
        """Bring a counter up to a running total; `key` names the total. One that has not changed costs nothing."""
        before = self._seen.get(key)
        if before != value:
            (counter.labels(*labels) if labels else counter).inc(value - (before or 0.0))
            self._seen[key] = value


def _by_use(held: Mapping[str, Mapping[str, int]]) -> dict[tuple[str, ...], float]:
    """(use, owner) -> amount."""
    return {(use, owner): amount for use, owners in held.items() for owner, amount in owners.items()}
