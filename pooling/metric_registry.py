# SPDX-License-Identifier: Apache-2.0
"""Every `tokenpool:*` metric, listed once: what the processes export, and what dashboards and alerts may name.

Imports prometheus_client only when a metric is made, because that library reads its environment at import.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
    across: str = "livemostrecent"
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
    Metric("tokenpool:turns", "counter", "Turns taken, a turn being the steps between two switches.", _MODEL),
    Metric("tokenpool:step_seconds", "counter", "Seconds spent in engine steps.", _MODEL),
    Metric("tokenpool:crashed_steps", "counter", "Engine steps that ended with an exception.", _MODEL),
    Metric("tokenpool:failed_requests", "counter", "Requests failed because they crashed the engine.", _MODEL),
    Metric("tokenpool:tokens", "counter", "Tokens put out.", _MODEL),
    Metric("tokenpool:tokens_on_time", "counter", "Tokens put out by their due time; all without an SLO.", _MODEL),
    Metric("tokenpool:tokens_late", "counter", "Tokens put out after their due time.", _MODEL),
    Metric("tokenpool:slo_attainment", "gauge", "Share that was on time, 0 to 1.", ("model_name", "share")),
    Metric("tokenpool:goodput_tokens_per_s", "gauge", "Tokens on time per second.", _MODEL),
    Metric("tokenpool:queue_requests", "gauge", "Requests in an engine.", ("model_name", "state")),
    Metric("tokenpool:model_state", "gauge", "1 for where the weights are.", ("model_name", "state")),
    Metric("tokenpool:cost_error", "gauge", "Mean relative error of predicted seconds.", ("model_name", "kind")),
    # the host as a whole
    Metric("tokenpool:switches", "counter", "Hand-overs between turns of different models."),
    Metric("tokenpool:loop_overhead_seconds", "counter", "Seconds of the loop outside steps."),
    Metric("tokenpool:slab_grants", "counter", "Slabs granted."),
    Metric("tokenpool:slab_reclaims", "counter", "Slabs taken back."),
    Metric("tokenpool:waited_switches", "counter", "Switches to a model that was not ready; the loop waited."),
    Metric("tokenpool:switch_wait_seconds", "counter", "Seconds that the loop waited for switches."),
    Metric("tokenpool:prefetches", "counter", "Copies of weights begun beside another model's turn."),
    Metric("tokenpool:switch_failures", "counter", "Moves of weights or KV that failed."),
    Metric("tokenpool:evictions", "counter", "What left the device, by kind.", ("kind",)),
    Metric("tokenpool:copied_bytes", "counter", "Bytes copied, by what and where to.", ("kind",)),
    Metric("tokenpool:pages", "gauge", "Device pages held.", ("use", "model_name")),
    Metric("tokenpool:page_size_bytes", "gauge", "Bytes of a device page."),
    Metric("tokenpool:host_memory_bytes", "gauge", "Host memory held.", ("use", "model_name")),
    Metric("tokenpool:ledger_ok", "gauge", "1 while the books of pages and host memory agree, else 0."),
    # from the frontend
    Metric("tokenpool:refused_requests", "counter", "Requests not taken in, by HTTP status.", ("model_name", "status")),
    Metric("tokenpool:tenant_requests", "counter", "Requests of a tenant taken in.", _TENANT),
    Metric("tokenpool:tenant_tokens", "counter", "Tokens of a tenant, by kind.", (*_TENANT, "kind")),
    Metric("tokenpool:tenant_refused_requests", "counter", "Requests of a tenant refused.", (*_TENANT, "reason")),
    Metric("tokenpool:tenant_host_deaths", "counter", "Deaths of hosts with a request of a tenant under blame.",
           ("tenant",)),
    Metric("tokenpool:tenant_held_requests", "gauge", "Sequences of a tenant held before the engine.", _TENANT),
    Metric("tokenpool:models", "gauge", "Models by what /v1/models says of them.", ("state",)),
    Metric("tokenpool:model_failed", "gauge", "1 while a model cannot be loaded or served, else 0.", _MODEL),
    Metric("tokenpool:task_failures", "counter", "Background tasks that died and were started again.", ("task",)),
    Metric("tokenpool:loop_lag_seconds", "counter", "Seconds by which event loops of frontends were late."),
    Metric(
        "tokenpool:loop_lag_max_seconds",
        "gauge",
        "Longest time that the event loop of a frontend was late in the last minute.",
        across="livemax",
    ),
    Metric("tokenpool:loop_stalls", "counter", "Times that such a loop was later than that.", ("over_seconds",)),
    Metric("tokenpool:host_pulse_age_seconds", "gauge", "Seconds since an engine host gave a pulse."),
    Metric("tokenpool:host_restarts", "counter", "Times a dead engine host was started again."),
    Metric("tokenpool:frontend_restarts", "counter", "Times a dead one of several frontends was started again."),
    Metric("tokenpool:decisions", "counter", "Decisions and events of the cluster's controller.", ("action",)),
)
METRICS = {metric.name: metric for metric in _LIST}


def metric(name: str) -> Metric:
    """The metric of this name, without the prefix."""
    return METRICS[f"tokenpool:{name}"]
