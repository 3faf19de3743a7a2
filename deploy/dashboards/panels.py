# SPDX-License-Identifier: Apache-2.0
"""What the dashboards show: rows of panels, each with its PromQL."""

from __future__ import annotations

from dataclasses import dataclass

from deploy.dashboards.series import ours, select

WINDOW = "$__rate_interval"
MODELS = 'model_name=~"$model",instance=~"$instance"'
HOST = 'instance=~"$instance"'
WAITING = MODELS + ',state="waiting"'
ON_DEVICE = MODELS + ',state="on device"'
SERVED = HOST + ',state="ready"'
UNAVAILABLE = HOST + ',state="unavailable"'


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel."""

    title: str
    text: str
    """What it shows and what is good or bad."""
    unit: str
    """Grafana's name of the unit."""
    queries: tuple[tuple[str, str], ...]
    """(PromQL, legend)."""
    kind: str = "timeseries"
    """`timeseries`, `stat` or `state-timeline`."""
    width: int = 12
    """Of 24 columns."""
    height: int = 8
    stacked: bool = False
    thresholds: tuple[tuple[float, str], ...] = ()
    """(from this value on, colour), for stats."""
    top: float | None = None
    """Largest value of the axis."""


def _rate(name: str, selector: str, by: str) -> str:
    return f"sum by ({by}) ({ours(name, selector, WINDOW)})"


def _share_on_time(by: str = "") -> str:
    clause = f" by ({by})" if by else ""
    return f"sum{clause} ({ours('tokens_on_time', MODELS, WINDOW)}) / sum{clause} ({ours('tokens', MODELS, WINDOW)})"


def _quantiles(series: str) -> tuple[tuple[str, str], ...]:
    buckets = f"sum by (le, model_name) ({select(series, MODELS, WINDOW)})"
    return tuple((f"histogram_quantile({q}, {buckets})", f"{{{{model_name}}}} p{round(q * 100)}") for q in (0.5, 0.99))


def _bytes_of_pages(by: str) -> str:
    pages = f"sum by (instance, {by}) ({ours('pages', HOST)})"
    return f"sum by ({by}) ({pages} * on (instance) group_left () max by (instance) ({ours('page_size_bytes', HOST)}))"


_GOOD_SHARE = ((0.0, "red"), (0.9, "orange"), (0.99, "green"))
_ZERO_IS_GOOD = ((0.0, "green"), (1.0, "red"))

OVERVIEW = (
    Panel("Tokens on time", "Share of all tokens that were put out by their due time.", "percentunit",
          ((_share_on_time(), ""),), "stat", 4, 4, thresholds=_GOOD_SHARE),
    Panel("Goodput", "Tokens on time per second, all models.", "short",
          ((f"sum ({ours('tokens_on_time', MODELS, WINDOW)})", ""),), "stat", 4, 4),
    Panel("Waiting requests", "Requests in the engines that do not run.", "short",
          ((f"sum ({ours('queue_requests', WAITING)})", ""),), "stat", 4, 4),
    Panel("Models ready", "Models that take requests, wherever their weights are.", "short",
          ((f"sum ({ours('models', SERVED)})", ""),), "stat", 4, 4),
    Panel("Models unavailable", "Models whose host is dead or being restarted.", "short",
          ((f"sum ({ours('models', UNAVAILABLE)}) or vector(0)", ""),), "stat", 4, 4,
          thresholds=_ZERO_IS_GOOD),
    Panel("Books of the memory", "1 while the ledgers of pages and host memory agree.", "short",
          ((f"min ({ours('ledger_ok', HOST)})", ""),), "stat", 4, 4, thresholds=((0.0, "red"), (1.0, "green"))),
    Panel("Tokens on time by model", "Share of a model's tokens by their due time; 1 without an SLO.", "percentunit",
          ((_share_on_time("model_name"), "{{model_name}}"),), top=1.0),
    Panel("Goodput by model", "Tokens on time per second.", "short",
          ((_rate("tokens_on_time", MODELS, "model_name"), "{{model_name}}"),), stacked=True),
    Panel("Time to first token", "From arrival to the first token, as vLLM's frontend sees it.", "s",
          _quantiles("vllm:time_to_first_token_seconds_bucket")),
    Panel("Time per output token", "Mean of each request, first token excluded.", "s",
          _quantiles("vllm:request_time_per_output_token_seconds_bucket")),
    Panel("Between two tokens", "Gaps within a stream; a switch between models shows here.", "s",
          _quantiles("vllm:inter_token_latency_seconds_bucket")),
    Panel("Requests in the engines", "Running and waiting requests of each model.", "short",
          ((f"sum by (model_name, state) ({ours('queue_requests', MODELS)})", "{{model_name}} {{state}}"),),
          stacked=True),
    Panel("Requests refused", "429: queue full. 503: the first token would be late.", "reqps",
          ((_rate("refused_requests", MODELS, "model_name, status"), "{{model_name}} {{status}}"),)),
    Panel("Attainment since the host started", "Share on time by token, by whole request and weighted by time.",
          "percentunit", ((f"max by (model_name, share) ({ours('slo_attainment', MODELS)})",
                           "{{model_name}} {{share}}"),), top=1.0),
    Panel("Tokens by tenant", "Prompt and completion tokens per second.", "short",
          ((_rate("tenant_tokens", MODELS, "tenant, kind"), "{{tenant}} {{kind}}"),), stacked=True),
    Panel("Requests refused by tenant", "By the limit that refused them.", "reqps",
          ((_rate("tenant_refused_requests", MODELS, "tenant, reason"), "{{tenant}} {{reason}}"),)),
    Panel("Requests held by tenant", "Requests that wait in front of the engines for their tenant's share.", "short",
          ((f"sum by (tenant) ({ours('tenant_held_requests', MODELS)})", "{{tenant}}"),)),
    Panel("Decisions", "What the controller of a cluster decided; /v1/pool/decisions has the reasons.", "ops",
          ((_rate("decisions", HOST, "action"), "{{action}}"),)),
)  # fmt: skip

DEVICE = (
    Panel("Time of the device", "Seconds per second in the steps of each model, waiting for switches, and in the loop.",
          "percentunit", ((_rate("step_seconds", MODELS, "model_name"), "{{model_name}}"),
                          (f"sum ({ours('switch_wait_seconds', HOST, WINDOW)})", "switch wait"),
                          (f"sum ({ours('loop_overhead_seconds', HOST, WINDOW)})", "loop")), stacked=True),
    Panel("Weights on the device", "1 while a model's weights are there.", "short",
          ((f"max by (model_name) ({ours('model_state', ON_DEVICE)})", "{{model_name}}"),),
          "state-timeline"),
    Panel("Device memory by use", "Pages held for KV, weights and null blocks, and free ones.", "bytes",
          ((_bytes_of_pages("use"), "{{use}}"),), stacked=True),
    Panel("Device memory by model", "Pages of each model, weights and KV.", "bytes",
          ((_bytes_of_pages("model_name"), "{{model_name}}"),), stacked=True),
    Panel("Host memory by use", "Copies of weights, KV of paused requests, cached KV, and what is free.", "bytes",
          ((f"sum by (use) ({ours('host_memory_bytes', HOST)})", "{{use}}"),), stacked=True),
    Panel("Switches", "Hand-overs between models; those that had to wait; copies begun ahead.", "ops",
          ((f"sum ({ours('switches', HOST, WINDOW)})", "switches"),
           (f"sum ({ours('waited_switches', HOST, WINDOW)})", "waited for"),
           (f"sum ({ours('prefetches', HOST, WINDOW)})", "prefetches"))),
    Panel("Seconds per waited switch", "Mean time that the device waited for a model.", "s",
          ((f"sum ({ours('switch_wait_seconds', HOST, WINDOW)}) / "
            f"sum ({ours('waited_switches', HOST, WINDOW)})", ""),)),
    Panel("Turns by model", "Turns per second; a turn is the steps between two switches.", "ops",
          ((_rate("turns", MODELS, "model_name"), "{{model_name}}"),)),
    Panel("Copies", "Bytes per second between device and host.", "Bps",
          ((_rate("copied_bytes", HOST, "kind"), "{{kind}}"),), stacked=True),
    Panel("Evictions", "Weights and KV that left the device, cached KV that left host memory.", "ops",
          ((_rate("evictions", HOST, "kind"), "{{kind}}"),)),
    Panel("Pages granted and taken back", "Pages that moved to and from the models' KV.", "ops",
          ((f"sum ({ours('slab_grants', HOST, WINDOW)})", "granted"),
           (f"sum ({ours('slab_reclaims', HOST, WINDOW)})", "taken back"))),
    Panel("KV in use", "Share of what a model could have for KV at that moment.", "percentunit",
          ((f"max by (model_name) ({select('vllm:kv_cache_usage_perc', MODELS)})", "{{model_name}}"),), top=1.0),
    Panel("Prefix cache hits", "Share of prompt tokens found in the prefix cache.", "percentunit",
          ((f"sum by (model_name) ({select('vllm:prefix_cache_hits_total', MODELS, WINDOW)}) / "
            f"sum by (model_name) ({select('vllm:prefix_cache_queries_total', MODELS, WINDOW)})", "{{model_name}}"),),
          top=1.0),
    Panel("Preemptions", "Requests that gave up their KV and are recomputed.", "ops",
          ((f"sum by (model_name) ({select('vllm:num_preemptions_total', MODELS, WINDOW)})", "{{model_name}}"),)),
    Panel("Faults", "Crashed steps, requests failed by them, failed moves, restarts of the host.", "ops",
          ((f"sum ({ours('crashed_steps', MODELS, WINDOW)})", "crashed steps"),
           (f"sum ({ours('failed_requests', MODELS, WINDOW)})", "failed requests"),
           (f"sum ({ours('switch_failures', HOST, WINDOW)})", "failed moves"),
           (f"sum ({ours('host_restarts', HOST, WINDOW)})", "host restarts"))),
    Panel("Error of predicted costs", "Mean relative error of predicted seconds, by kind of step or copy.",
          "percentunit", ((f"max by (model_name, kind) ({ours('cost_error', HOST)})", "{{model_name}} {{kind}}"),)),
)  # fmt: skip
