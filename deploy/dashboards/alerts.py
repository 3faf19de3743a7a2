# SPDX-License-Identifier: Apache-2.0
"""Alert rules for Prometheus. Every threshold is a starting point; docs/operations.md says what to do about each."""

from __future__ import annotations

from typing import Any

from deploy.dashboards.series import ours


def rules() -> dict[str, Any]:
    """The groups of a Prometheus rules file."""
    waiting, unavailable = 'state="waiting"', 'state="unavailable"'
    on_time = f"sum by (model_name) ({ours('tokens_on_time', window='10m')})"
    tokens = f"sum by (model_name) ({ours('tokens', window='10m')})"
    queue = ours("queue_requests", waiting)
    alerts = [
        _alert("TokenpoolAttainmentLow", f"{on_time} / {tokens} < 0.9", "10m", "warning",
               "{{ $labels.model_name }}: {{ $value | humanizePercentage }} of the tokens are on time",
               "Less than 90 % of the tokens of the last 10 minutes were put out by their due time."),
        _alert("TokenpoolThrashing",
               f"sum by (instance, host) ({ours('switch_wait_seconds', window='10m')}) > 0.3", "10m", "warning",
               "{{ $labels.instance }} {{ $labels.host }} waits for switches {{ $value | humanizePercentage }}",
               "The device stands still while weights and KV are copied: more models are busy than it can hold."),
        _alert("TokenpoolQueueGrowing",
               f"sum by (model_name) ({queue}) > 20 and sum by (model_name) (deriv({queue}[15m])) > 0", "15m",
               "warning", "{{ $labels.model_name }}: {{ $value }} requests wait, and more come than are served",
               "The offered load is above what the pool serves."),
        _alert("TokenpoolRefusing",
               f"sum by (model_name, status) ({ours('refused_requests', window='5m')}) > 0.1", "10m", "warning",
               "{{ $labels.model_name }}: {{ $value | humanize }} refusals per second with status {{ $labels.status }}",
               "429: its queue is full. 503: the first token would come after its due time."),
        _alert("TokenpoolHostDown", f"sum by (instance) ({ours('models', unavailable)}) > 0", "2m",
               "critical", "{{ $labels.instance }}: {{ $value }} models cannot be served",
               "The engine host is dead and does not come back; the log of the pod says why."),
        _alert("TokenpoolModelFailed", f"max by (instance, model_name) ({ours('model_failed')}) > 0", "5m",
               "warning", "{{ $labels.instance }}: {{ $labels.model_name }} cannot be loaded",
               "The others serve, and it is tried again; /v1/models and the log of the pod say why."),
        _alert("TokenpoolPoolFileRefused", f"min by (instance) ({ours('pool_file_ok')}) == 0", "5m",
               "warning", "{{ $labels.instance }}: the models are not what the pool file says",
               "The file was refused, and the models are what they were, or some of it could not be done and is tried "
               "again; the log of the pod says why."),
        _alert("TokenpoolHostRestarts", f"sum by (instance) (increase({ours('host_restarts')}[1h])) > 3", "0m",
               "warning", "{{ $labels.instance }}: {{ $value | humanize }} restarts of the engine host in an hour",
               "Each restart holds up all streams while the models are loaded again, and some requests may fail."),
        _alert("TokenpoolClusterHeadAway", f"min by (instance) ({ours('cluster_head_up')}) == 0", "1m", "critical",
               "{{ $labels.instance }}: Ray's head does not answer",
               "Requests go on. What ends meanwhile is not replaced, and Ray's processes end when it stays away."),
        _alert("TokenpoolCrashedSteps", f"sum by (model_name) (increase({ours('crashed_steps')}[15m])) > 0", "0m",
               "warning", "{{ $labels.model_name }}: {{ $value | humanize }} engine steps crashed",
               "The requests that crash a step alone were failed, the others go on."),
        _alert("TokenpoolLedgerMismatch", f"min by (instance, host) ({ours('ledger_ok')}) == 0", "1m", "critical",
               "{{ $labels.instance }} {{ $labels.host }}: the books of the memory do not agree",
               "A fault in tokenpool. Keep the log, note /v1/pool/state and /v1/pool/trace, then restart the pod."),
        _alert("TokenpoolAbsent", f"absent({ours('models')})", "5m", "critical",
               "No tokenpool server is scraped",
               "No server runs, or Prometheus does not reach /metrics, which asks for a key when one is set."),
    ]  # fmt: skip
    return {"groups": [{"name": "tokenpool", "rules": alerts}]}


def _alert(name: str, expr: str, lasts: str, severity: str, summary: str, text: str) -> dict[str, Any]:
    annotations = {"summary": summary, "description": text}
    return {"alert": name, "expr": expr, "for": lasts, "labels": {"severity": severity}, "annotations": annotations}
