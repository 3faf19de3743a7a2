# SPDX-License-Identifier: Apache-2.0
"""PromQL selectors that can only name metrics and labels that exist."""

from __future__ import annotations

from tokenpool.metric_registry import METRICS, metric

VLLM: dict[str, tuple[str, ...]] = {
    "vllm:inter_token_latency_seconds_bucket": ("model_name", "engine", "le"),
    "vllm:kv_cache_usage_perc": ("model_name", "engine"),
    "vllm:num_preemptions_total": ("model_name", "engine"),
    "vllm:prefix_cache_hits_total": ("model_name", "engine"),
    "vllm:prefix_cache_queries_total": ("model_name", "engine"),
    "vllm:request_time_per_output_token_seconds_bucket": ("model_name", "engine", "le"),
    "vllm:time_to_first_token_seconds_bucket": ("model_name", "engine", "le"),
}
"""vLLM's metrics in use, by their names in a scrape; a test compares them with a running server."""
SERIES: dict[str, tuple[str, ...]] = {m.exported: m.labels for m in METRICS.values()} | VLLM
"""Labels of every series that may be named."""
TARGET_LABELS = ("instance", "host")
"""Labels beside those of the metric: Prometheus adds the first, a cluster's frontend the second to series of hosts."""


def ours(name: str, selector: str = "", window: str = "") -> str:
    """A selector of one of our metrics: `ours("tokens", MODELS)`; with `window` its rate over that time."""
    return select(metric(name).exported, selector, window)


def select(series: str, selector: str = "", window: str = "") -> str:
    """A selector of a series by its name in a scrape; raises KeyError for one that nobody exports."""
    labels = (*SERIES[series], *TARGET_LABELS)
    for matcher in filter(None, selector.split(",")):
        label = matcher.partition("=")[0].rstrip("!")
        if label not in labels:
            raise KeyError(f"{series} has no label {label}")
    text = f"{series}{{{selector}}}" if selector else series
    return f"rate({text}[{window}])" if window else text
