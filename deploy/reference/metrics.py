# SPDX-License-Identifier: Apache-2.0
"""Tables of metrics, from the registry that the server makes them from."""

from __future__ import annotations

from collections.abc import Iterable

from deploy.dashboards.series import VLLM
from deploy.reference.tables import code, table
from tokenpool.metric_registry import Metric


def metric_table(metrics: Iterable[Metric]) -> str:
    """Each metric by its name in a scrape, in the order of the registry."""
    rows = ([code(m.exported), m.kind, code(*m.labels), m.text] for m in metrics)
    return table(["metric", "kind", "labels", "meaning"], rows)


def vllm_table() -> str:
    """The metrics of vLLM that the dashboards use."""
    return table(["metric", "labels"], ([code(name), code(*labels)] for name, labels in VLLM.items()))
