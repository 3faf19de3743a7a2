# SPDX-License-Identifier: Apache-2.0
"""The metric registry is what a running server exports, name by name and label by label."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.dashboards.series import VLLM
from tests.helpers.server import PoolServerProcess
from tokenpool.metric_registry import METRICS

pytestmark = pytest.mark.vllm

RARE = {"tokenpool:refused_requests", "tokenpool:cost_error", "tokenpool:decisions", "tokenpool:frontend_restarts"}
RARE |= {"tokenpool:task_failures", "tokenpool:node_memory_bytes", "tokenpool:cluster_head_up"}
RARE |= {name for name in METRICS if name.startswith("tokenpool:tenant_")}
"""Families without a sample before something is refused or predicted, or a task dies, and those of clusters, tenants,
several frontends and a store."""


def scraped(server: PoolServerProcess) -> Iterator[tuple[str, str, str, dict[str, str], float]]:
    """(family, kind, name, labels, value) of each sample of our own metrics."""
    for family in text_string_to_metric_families(server.request("GET", "/metrics").text):
        if family.name.startswith("tokenpool:"):
            for sample in family.samples:
                yield family.name, family.type, sample.name, sample.labels, sample.value


def chat(server: PoolServerProcess) -> None:
    body = {"model": "qwen2", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    assert server.request("POST", "/v1/chat/completions", json=body).status_code == 200


def test_a_scrape_holds_what_the_registry_says(pool_server):
    """Every family in a scrape is registered, with its type, labels and exported name; only RARE ones are missing."""
    chat(pool_server)
    pool_server.wait_until_idle()
    shapes = {(family, kind, name, frozenset(labels)) for family, kind, name, labels, _ in scraped(pool_server)}
    registered = {(m.name, m.kind, m.exported, frozenset(m.labels)) for m in METRICS.values()}
    assert shapes <= registered, "register it in pooling/metric_registry.py"
    assert {name for name, *_ in registered - shapes} <= RARE


def test_a_healthy_pool_says_so(pool_server):
    """The books agree and every model is resident."""
    values = {(name, *labels.values()): value for _, _, name, labels, value in scraped(pool_server)}
    assert values["tokenpool:ledger_ok",] == 1
    assert values["tokenpool:models", "ready"] == len(pool_server.pool["models"])


def test_vllm_metrics_of_the_dashboards_are_exported(pool_server):
    """Each vLLM series that a dashboard names is in a scrape, with the labels that the dashboards rely on."""
    chat(pool_server)
    families = text_string_to_metric_families(pool_server.request("GET", "/metrics").text)
    seen = {sample.name: frozenset(sample.labels) for family in families for sample in family.samples}
    assert {name: seen.get(name) for name in VLLM} == {name: frozenset(labels) for name, labels in VLLM.items()}
