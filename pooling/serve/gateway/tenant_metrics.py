# SPDX-License-Identifier: Apache-2.0
"""What tenants use, as Prometheus metrics; labels are names of tenants and models, nothing that clients send."""

from __future__ import annotations

from typing import Any

from tokenpool.metric_registry import metric
from tokenpool.serve.access.tenants import TenantBook
from tokenpool.serve.gateway.model_app import ModelApp

_REQUESTS = metric("tenant_requests").make()
_TOKENS = metric("tenant_tokens").make()
_REFUSED = metric("tenant_refused_requests").make()
_HELD = metric("tenant_held_requests").make()

_shown: dict[tuple[str, ...], int] = {}


def show_tenants(book: TenantBook, models: dict[str, ModelApp]) -> None:
    """Bring the metrics of this process up to date; models that are gone have none."""
    for tenant, account in book.accounts.items():
        for model, usage in ((name, account.usage[name]) for name in models.keys() & account.usage.keys()):
            _count(_REQUESTS, usage.requests, tenant, model)
            _count(_TOKENS, usage.prompt_tokens, tenant, model, "prompt")
            _count(_TOKENS, usage.completion_tokens, tenant, model, "completion")
        for (model, reason), count in account.refused.items():
            if model in models or not model:  # a request is refused before its body, and with it its model, is read
                _count(_REFUSED, count, tenant, model, reason)
        for name, model_app in models.items():
            if model_app.gate.line is not None:
                _HELD.labels(tenant, name).set(model_app.gate.line.num_held(tenant))


def _count(counter: Any, total: int, *labels: str) -> None:
    key = (str(id(counter)), *labels)
    counter.labels(*labels).inc(total - _shown.get(key, 0))
    _shown[key] = total
