# SPDX-License-Identifier: Apache-2.0
"""What a turn policy is shown of an engine: queue lengths and due times, counted from vLLM's scheduler."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from tokenpool.config import SLO
from tokenpool.host.hosted_model import HostedModel
from tokenpool.host.residency import ResidencyManager
from tokenpool.policy.slo import due_s as slo_due_s
from tokenpool.policy.slo import lost_s
from tokenpool.policy.turns import ModelView


class QueueStats(NamedTuple):
    """One engine's unfinished requests; times are wall-clock seconds, as vLLM's arrival times are."""

    num_running: int
    """Requests that decode."""
    num_waiting: int
    """Requests that need a prefill or the rest of one, preempted ones included."""
    waiting_tokens: int
    """Tokens that the waiting ones have still to compute."""
    context_tokens: int
    """Tokens whose KV the running ones read in one decode step."""
    arrival_s: float
    """Arrival of the oldest waiting request; inf without one."""
    first_due_s: float
    """When the next token of a waiting request is due, the earliest; inf without an SLO, or if all are lost."""
    next_due_s: float
    """When the next token of a running request is due, the earliest; inf without an SLO, or if all are lost."""
    until_s: float
    """When another request is lost, see `policy.slo.lost_s`: these figures hold no longer."""


def queue_stats(scheduler: Any, slo: SLO | None, now_s: float) -> QueueStats:
    """Count a vLLM scheduler's requests; O(requests), about 0.5 us each.

    The request's own numbers are used and not the scheduler's queues, whose names differ between vLLM versions.
    """
    num_running = num_waiting = waiting_tokens = context_tokens = 0
    arrival_s = first_due_s = next_due_s = math.inf
    late_s = lost_s(slo)
    least_s = now_s - late_s
    for request in scheduler.requests.values():
        computed = request.num_computed_tokens
        due_s = slo_due_s(slo, request.arrival_time, request.num_output_tokens)
        if computed < request.num_prompt_tokens:
            num_waiting += 1
            waiting_tokens += request.num_tokens - computed
            arrival_s = min(arrival_s, request.arrival_time)
            if due_s >= least_s:
                first_due_s = min(first_due_s, due_s)
        else:
            num_running += 1
            context_tokens += computed
            if due_s >= least_s:
                next_due_s = min(next_due_s, due_s)
    until_s = min(first_due_s, next_due_s) + late_s
    return QueueStats(
        num_running, num_waiting, waiting_tokens, context_tokens, arrival_s, first_due_s, next_due_s, until_s
    )


def model_view(hosted: HostedModel, stats: QueueStats, residency: ResidencyManager) -> ModelView:
    """One model as a turn policy sees it; `stats` are its requests as counted."""
    slo = hosted.spec.slo
    due = {} if slo is None else {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s}
    return ModelView(
        model=hosted.name,
        index=hosted.index,
        priority=hosted.spec.priority,
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        waiting_tokens=stats.waiting_tokens,
        arrival_s=stats.arrival_s,
        first_due_s=stats.first_due_s,
        next_due_s=stats.next_due_s,
        residency=residency.residency(hosted),
        kv_out=residency.is_kv_out(hosted),
        ready_in_s=residency.ready_in_s(hosted),
        step_s=hosted.cost.predict_step(stats.num_running, stats.context_tokens),
        prefill_s=hosted.cost.predict_prefill(stats.waiting_tokens),
        weight_bytes=residency.weight_bytes(hosted),
        **due,
    )
