# SPDX-License-Identifier: Apache-2.0
"""One answer made of what several frontends say: requests in flight or handed over, what tenants use and used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_OF_LIMITS = ("num_keys", "priority", "weight", "models", "limits", "share", "fill", "remaining")
"""What is the same at all frontends, or kept together by them."""
_COUNTS = ("inflight", "handed_over")
"""Counts of requests by model."""


def merged_reports(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Add up the reports of frontends; the first one has the newest limits."""
    tenants: dict[str, dict[str, Any]] = {}
    for report in reports:
        for name, tenant in report["tenants"].items():
            known = tenants.get(name)
            if known is None:
                tenants[name] = {key: _copy(value) for key, value in tenant.items()}
            else:
                _add(known, {key: value for key, value in tenant.items() if key not in _OF_LIMITS})
    counts: dict[str, dict[str, int]] = {key: {} for key in _COUNTS}
    for report in reports:
        for key, total in counts.items():
            _add(total, report.get(key, {}))
    return {**counts, "tenants": tenants}


def state_of_all(state: dict[str, Any], report: dict[str, Any], pids: Mapping[int, int]) -> dict[str, Any]:
    """The pool's state with the counts of all frontends together, and with the frontends: their pids by index."""
    for name, model in state["models"].items():
        model.update({key: report[key].get(name, 0) for key in _COUNTS if key in model})
    frontends = [{"index": index, "pid": pid} for index, pid in sorted(pids.items())]
    return {**state, "frontends": frontends, "frontend_restarts": report["frontend_restarts"]}


def used_only(report: dict[str, Any]) -> dict[str, Any]:
    """The report of a frontend that is gone: what was used stays, nothing is in flight."""
    tenants = {name: {**tenant, "inflight": 0, "held": {}} for name, tenant in report["tenants"].items()}
    return {**report, "inflight": {}, "tenants": tenants}


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value


def _add(total: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict):
            _add(total.setdefault(key, {}), value)
        elif isinstance(value, int | float):
            total[key] = total.get(key, 0) + value
        else:
            total.setdefault(key, value)
