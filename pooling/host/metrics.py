# SPDX-License-Identifier: Apache-2.0
"""The host's Prometheus metrics, copied from its plain counters when it is idle and about twice a second else."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from tokenpool.host.engine_host import EngineHost
from tokenpool.host.hosted_model import HostedModel

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
        mode = {"multiprocess_mode": "livemostrecent"}
        self._pages = Gauge("tokenpool:pages", "Device pages held.", ["use", "model_name"], **mode)
        self._page_bytes = Gauge("tokenpool:page_size_bytes", "Bytes of a device page.", **mode)
        self._queue = Gauge("tokenpool:queue_requests", "Requests in an engine.", ["model_name", "state"], **mode)
        self._moves = {
            "num_grants": Counter("tokenpool:slab_grants", "Slabs granted."),
            "num_reclaims": Counter("tokenpool:slab_reclaims", "Slabs taken back."),
        }
        self._seen: dict[object, float] = {}
        self._page_labels: set[tuple[str, str]] = set()
        self._page_bytes.set(host.config.page_size)

    def update(self) -> None:
        """Copy the counters; called on the loop's thread."""
        host = self._host
        for name, counter in self._global.items():
            self._advance((name,), counter, getattr(host, name))
        for name, counter in self._moves.items():
            self._advance((name,), counter, getattr(host.allocator, name))
        for hosted in host.models.values():
            self._update_model(hosted)
        self._update_pages()

    def _update_model(self, hosted: HostedModel) -> None:
        account, scheduler = hosted.core.slo_account, hosted.core.scheduler
        values = {name: getattr(hosted.core.counters, name) for name in _COUNTERS}
        late = account.tokens - account.tokens_on_time
        values |= {"tokens": account.tokens, "on_time": account.tokens_on_time, "late": late}
        for name, value in values.items():
            # The index tells a model that was removed and added again, whose counters start anew.
            self._advance((name, hosted.index), self._per_model[name].labels(hosted.name), value)
        self._queue.labels(hosted.name, "running").set(len(scheduler.running))
        self._queue.labels(hosted.name, "waiting").set(len(scheduler.waiting))

    def _update_pages(self) -> None:
        snapshot = self._host.ledger.snapshot()
        pages = {(use, owner): n for use, owners in snapshot.held.items() for owner, n in owners.items()}
        pages["free", ""] = snapshot.num_free
        for labels in self._page_labels - pages.keys():
            self._pages.labels(*labels).set(0)
        for labels, count in pages.items():
            self._pages.labels(*labels).set(count)
        self._page_labels |= pages.keys()

    def _advance(self, key: object, counter: Counter, value: float) -> None:
        counter.inc(value - self._seen.get(key, 0.0))
        self._seen[key] = value
