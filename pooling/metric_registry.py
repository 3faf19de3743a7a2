# SPDX-License-Identifier: Apache-2.0
"""Every `tokenpool:*` metric, listed once: what the processes export, and what dashboards and alerts may name.

Imports prometheus_client only when a metric is made, because that library reads its environment at import.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric family."""

    name: str
    """With its prefix, without the `_total` that Prometheus clients add to counters."""
    kind: str
    """`counter` or `gauge`."""
    text: str
    """What it counts, and the unit if the name has none."""
    labels: tuple[str, ...] = ()
    across: Literal["livemostrecent", "livemax"] = "livemostrecent"
    """Which value of a gauge holds where several processes have one."""

    @property
    def exported(self) -> str:
        """The name in a scrape."""
        return f"{self.name}_total" if self.kind == "counter" else self.name

    def make(self) -> Any:
        """The prometheus_client object of this process; once per process."""
        from prometheus_client import Counter, Gauge

        if self.kind == "counter":
            return Counter(self.name, self.text, self.labels)
        return Gauge(self.name, self.text, self.labels, multiprocess_mode=self.across)


_MODEL = ("model_name",)
_TENANT = ("tenant", "model_name")
_LIST = (
    # per model, from the host
    Metric("tokenpool:steps", "counter", "Engine steps run.", _MODEL),
    Metric("tokenpool:turns", "counter", "Turns: the steps between two switches.", _MODEL),
    Metric("tokenpool:step_seconds", "counter", "Seconds spent in engine steps.", _MODEL),
    Metric("tokenpool:crashed_steps", "counter", "Engine steps that ended with an exception.", _MODEL),
    Metric("tokenpool:failed_requests", "counter", "Requests failed because they crashed the engine.", _MODEL),
    Metric("tokenpool:tokens", "counter", "Tokens put out.", _MODEL),
    Metric(
        "tokenpool:tokens_on_time",
        "counter",
        "Tokens put out by their due time; all of a model without an slo.",
        _MODEL,
    ),
    Metric("tokenpool:tokens_late", "counter", "Tokens put out after their due time.", _MODEL),
    Metric(
        "tokenpool:slo_attainment",
        "gauge",
        "Share on time since the host started, 0 to 1: token, request, time_weighted. Models with an slo only.",
        ("model_name", "share"),
    ),
    Metric(
        "tokenpool:goodput_tokens_per_s",
        "gauge",
        "Tokens on time per second over the last 10 s. Models with an slo only.",
        _MODEL,
    ),
    Metric("tokenpool:queue_requests", "gauge", "Requests in an engine: running, waiting.", ("model_name", "state")),
    Metric(
        "tokenpool:model_state",
        "gauge",
        "1 for where the weights are: on disk, reading, in host memory, copying, on device.",
        ("model_name", "state"),
    ),
    Metric(
        "tokenpool:cost_error",
        "gauge",
        "Mean relative error of predicted seconds of steps; of copies without a model.",
        ("model_name", "kind"),
    ),
    # the host as a whole
    Metric("tokenpool:switches", "counter", "Hand-overs between turns of different models."),
    Metric(
        "tokenpool:loop_overhead_seconds",
        "counter",
        "Seconds of the host loop outside engine steps, waiting excluded.",
    ),
    Metric("tokenpool:slab_grants", "counter", "Pages granted to KV caches."),
    Metric("tokenpool:slab_reclaims", "counter", "Pages taken back from KV caches."),
    Metric(
        "tokenpool:waited_switches",
        "counter",
        "Switches to a model that was not ready, so that the device waited.",
    ),
    Metric("tokenpool:switch_wait_seconds", "counter", "Seconds that the device waited for such switches."),
    Metric("tokenpool:prefetches", "counter", "Copies of weights begun beside another model's turn."),
    Metric("tokenpool:switch_failures", "counter", "Moves of weights or KV that failed."),
    Metric(
        "tokenpool:evictions",
        "counter",
        "What left the device: weights, kv of running requests; what left host memory: cached_kv blocks.",
        ("kind",),
    ),
    Metric(
        "tokenpool:copied_bytes",
        "counter",
        "Bytes copied: weights_to_device, weights_to_host (stays 0), kv_to_host, kv_to_device, "
        "cached_kv_to_host, cached_kv_to_device.",
        ("kind",),
    ),
    Metric("tokenpool:pages", "gauge", "Device pages by use: kv, weights, null, lent, free.", ("use", "model_name")),
    Metric("tokenpool:page_size_bytes", "gauge", "Bytes of a device page."),
    Metric(
        "tokenpool:host_memory_bytes",
        "gauge",
        "Host memory by use: weights, paused_kv, cached_kv, free.",
        ("use", "model_name"),
    ),
    Metric(
        "tokenpool:node_memory_bytes",
        "gauge",
        "Host memory of the node, with a host_store: held_copies, spare_copies that no host holds, own of the hosts, "
        "free, over the budget.",
        ("use",),
    ),
    Metric(
        "tokenpool:ledger_ok",
        "gauge",
        "1 while the books of pages and host memory agree (looked at every 10 s), else 0.",
    ),
    # from the frontend
    Metric(
        "tokenpool:refused_requests",
        "counter",
        "Requests not taken in: 429 for a full queue, 503 for a predicted miss.",
        ("model_name", "status"),
    ),
    Metric("tokenpool:tenant_requests", "counter", "Requests of a tenant taken in.", _TENANT),
    Metric("tokenpool:tenant_tokens", "counter", "Tokens of a tenant: prompt, completion.", (*_TENANT, "kind")),
    Metric(
        "tokenpool:tenant_refused_requests",
        "counter",
        "Requests of a tenant refused: requests_per_minute, tokens_per_minute, max_concurrent, "
        "max_sequences_per_request, models, queue, host_deaths.",
        (*_TENANT, "reason"),
    ),
    Metric(
        "tokenpool:tenant_host_deaths",
        "counter",
        "Deaths of engine hosts with a request of a tenant under blame.",
        ("tenant",),
    ),
    Metric("tokenpool:tenant_held_requests", "gauge", "Sequences of a tenant held in front of the engine.", _TENANT),
    Metric(
        "tokenpool:pending_requests",
        "gauge",
        "Requests without a turn so far: held, read, tokenized, or waiting in an engine, at all frontends.",
        _MODEL,
    ),
    Metric(
        "tokenpool:kv_usage",
        "gauge",
        "KV of all models' requests, paused ones included, by what KV can have beside the model's weights, 0 to 1.",
        _MODEL,
    ),
    Metric(
        "tokenpool:pool_file_ok",
        "gauge",
        "1 while the models are what the pool file says, 0 when it was refused or part of it could not be done.",
    ),
    Metric("tokenpool:pool_file_refused", "counter", "Changed pool files that were refused as a whole."),
    Metric("tokenpool:models", "gauge", "Models by their state in /v1/models.", ("state",)),
    Metric("tokenpool:demand_loads", "counter", "Loads of models that requests waited for, tried or done."),
    Metric(
        "tokenpool:unloads", "counter", "Models that were unloaded because nobody used them, or others were wanted."
    ),
    Metric("tokenpool:model_failed", "gauge", "1 while a model cannot be loaded or served, else 0.", _MODEL),
    Metric(
        "tokenpool:task_failures",
        "counter",
        "Background tasks of the server that died and were started again; each is an ERROR in the log.",
        ("task",),
    ),
    Metric(
        "tokenpool:loop_lag_seconds",
        "counter",
        "Seconds by which the event loops of frontends were late, together.",
    ),
    Metric(
        "tokenpool:loop_lag_max_seconds",
        "gauge",
        "Longest time that the event loop of a frontend stood still in the last minute.",
        across="livemax",
    ),
    Metric(
        "tokenpool:loop_stalls",
        "counter",
        "Times that such a loop stood still for longer than 0.05, 0.2, 1 and 5 s; above 0.2 s the log names "
        "the request.",
        ("over_seconds",),
    ),
    Metric(
        "tokenpool:host_pulse_age_seconds",
        "gauge",
        "Seconds since an engine host gave a pulse; mostly below 2, a host is killed at host_timeout.",
    ),
    Metric("tokenpool:host_restarts", "counter", "Times a dead engine host was started again."),
    Metric("tokenpool:frontend_restarts", "counter", "Times a dead one of several frontends was started again."),
    Metric(
        "tokenpool:cluster_head_up",
        "gauge",
        "Whether Ray's head answers this server: 1, or 0 after 5 s without an answer. Requests go on without it.",
    ),
    Metric("tokenpool:decisions", "counter", "Decisions and events of a cluster's controller.", ("action",)),
)
METRICS = {metric.name: metric for metric in _LIST}


def metric(name: str) -> Metric:
    """The metric of this name, without the prefix."""
    return METRICS[f"tokenpool:{name}"]


class LabelledGauge:
    """A gauge whose samples are replaced as a whole: one that is no longer given is set to 0, until it is forgotten."""

    def __init__(self, name: str) -> None:
        self._gauge = metric(name).make()
        labels = metric(name).labels
        self._model = labels.index("model_name") if "model_name" in labels else None
        self._shown: dict[tuple[str, ...], float] = {}

    def replace(self, values: Mapping[tuple[str, ...], float]) -> None:
        """Show these values by their labels; what has not changed costs nothing."""
        for labels in self._shown.keys() - values.keys():
            self._set(labels, 0)
        for labels, value in values.items():
            self._set(labels, value)

    def forget(self, models: Collection[str]) -> None:
        """Know nothing more of the samples of these models, which `forget_models` takes out of the scrape."""
        if self._model is not None:
            self._shown = {labels: value for labels, value in self._shown.items() if labels[self._model] not in models}

    def keep(self, models: Collection[str]) -> None:
        """Know nothing more of the samples of all other models, which are gone."""
        if self._model is not None:
            self.forget({labels[self._model] for labels in self._shown} - set(models))

    def _set(self, labels: tuple[str, ...], value: float) -> None:
        if self._shown.get(labels) != value:
            self._gauge.labels(*labels).set(value)
            self._shown[labels] = value
