# SPDX-License-Identifier: Apache-2.0
"""What a host tells about itself, as plain JSON values; counts of pages unless the name says otherwise."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from tokenpool.host.engine import encoder_cache
from tokenpool.host.engine_host import EngineHost
from tokenpool.host.hosted_model import HostedModel
from tokenpool.host.pool_view import QueueStats, model_view, queue_stats
from tokenpool.host.waiting import count_waits
from tokenpool.memory.host_ledger import HostUse
from tokenpool.memory.ledger import PageUse
from tokenpool.memory.states import WeightState
from tokenpool.policy import host_report
from tokenpool.policy.cost_model import CopyKind
from tokenpool.policy.latency import RecentLatencies
from tokenpool.policy.turns import PoolView
from tokenpool.wire.trace import Event

_MIB = 1 << 20


def model_state(host: EngineHost, hosted: HostedModel) -> dict[str, Any]:
    """One model: where it is, memory, queue, running totals, and what is predicted for it."""
    name, pool, scheduler, account = hosted.name, hosted.build.pool, hosted.core.scheduler, hosted.core.slo_account
    return {
        "model": hosted.spec.vllm_config.model_config.model,
        "state": weight_state(host, hosted),
        "kv": kv_state(host, hosted),
        "asleep": hosted.asleep,
        "build_s": round(hosted.build_s, 3),
        "weight_bytes": host.residency.weight_bytes(hosted) or hosted.spec.weight_bytes,
        "weight_pages": host.ledger.held(name, PageUse.WEIGHTS),
        "fixed_bytes": host.weights.fixed.of(name),
        "encoder_cache_bytes": encoder_cache.capacity_bytes(hosted.core),
        "encoder_output_bytes": encoder_cache.held_bytes(hosted.core),
        "kv_pages": pool.num_slabs if pool else 0,
        "kv_idle_pages": pool.num_idle_slabs if pool else 0,
        "kv_block_bytes": hosted.build.view.block_bytes if hosted.build.view else 0,
        "host_bytes": {use.value: host.host_ledger.held(name, use) for use in HostUse},
        "running": len(scheduler.running),
        "waiting": len(scheduler.waiting),
        "waits": count_waits(hosted.core),
        "finished": account.finished,
        "tokens": account.tokens,
        "tokens_on_time": account.tokens_on_time,
        "tokens_late": account.tokens - account.tokens_on_time,
        "goodput_tokens_per_s": account.goodput_tokens_per_s(time.time()),
        "attainment": account.attainments()._asdict(),
        "has_slo": hosted.spec.slo is not None,
        "ttft_s": _latency(account.ttft),
        "tpot_s": _latency(account.tpot),
        **asdict(hosted.core.counters),
        "costs": _costs(host, hosted),
    }


def _latency(recent: RecentLatencies) -> dict[str, float] | None:
    summary = recent.summary(time.time())
    return summary._asdict() if summary else None


def weight_state(host: EngineHost, hosted: HostedModel) -> str:
    """Where the weights are, by the words of `WeightState`."""
    return host.weights.state(hosted.name).value if hosted.name in host.weights else WeightState.ON_DEVICE.value


def kv_state(host: EngineHost, hosted: HostedModel) -> str:
    """Where the KV of unfinished requests is: `in`, which is also that of a model without, or on its way, or `out`."""
    return host.swapper.state(hosted.name).value


def _costs(host: EngineHost, hosted: HostedModel) -> dict[str, Any]:
    stats = queue_stats(hosted.core.scheduler, hosted.spec.slo, time.time())
    return {
        "ready_in_s": host.residency.ready_in_s(hosted),
        "step_s": hosted.cost.predict_step(max(1, stats.num_running), stats.context_tokens),
        "prefill_256_tokens_s": hosted.cost.predict_prefill(256),
        "errors": step_errors(hosted),
        "coefficients": hosted.cost.coefficients(),
    }


def step_errors(hosted: HostedModel) -> dict[str, float]:
    """Mean relative error of recent predictions of the model's steps; those of copies belong to the device."""
    copies = set(CopyKind)
    return {kind: error for kind, error in hosted.cost.errors().items() if kind not in copies}


def copied_bytes(host: EngineHost) -> dict[str, int]:
    """Bytes copied so far by what they were and where they went."""
    device, tier = host.weights.device, host.swapper.tier.counters
    return {
        "weights_to_device": device.bytes_to_device,
        "weights_to_host": device.bytes_to_host,
        "kv_to_host": tier.paused_out_bytes,
        "kv_to_device": tier.paused_in_bytes,
        "cached_kv_to_host": tier.cached_out_bytes,
        "cached_kv_to_device": tier.cached_in_bytes,
    }


def host_state(host: EngineHost) -> dict[str, Any]:
    """The whole host."""
    ledger, copies = host.ledger.snapshot(), host.residency.copies
    return {
        "time_s": time.time(),
        "uptime_s": time.time() - host.started_s,
        "current_model": host.current_model,
        "policy": host.config.policy,
        "page_size": ledger.page_size,
        "num_pages": ledger.num_pages,
        "num_free_pages": ledger.num_free,
        "held_pages": ledger.held,
        "movable_weights": host.config.movable_weights,
        "host_memory": {
            "budget_bytes": host.host_ledger.budget_bytes,
            "free_bytes": host.host_ledger.free_bytes,
            "held_bytes": host.host_ledger.snapshot(),
            "node": host.node.book if host.node is not None else {},
        },
        "slab_grants": host.allocator.num_grants,
        "slab_reclaims": host.allocator.num_reclaims,
        "switches": host.switches,
        "loops": host.loops,
        "loop_overhead_s": round(host.overhead_seconds, 6),
        "residency": asdict(host.residency.counters),
        "kv_swaps": asdict(host.swapper.counters),
        "kv_tier": host.swapper.tier.snapshot(),
        "copied_bytes": copied_bytes(host),
        "copy_costs": {
            "copy_256_mib_s": {kind.value: copies.predict(kind, 256 * _MIB) for kind in CopyKind},
            "errors": copies.errors(),
            "coefficients": copies.coefficients(),
        },
        "models": {name: model_state(host, hosted) for name, hosted in host.models.items()},
    }


def host_load(host: EngineHost) -> dict[str, dict[str, Any]]:
    """What each model's queue holds and when a new request of the usual length would get its first token."""
    now_s, models = time.time(), host.models.items()
    counted = {name: queue_stats(hosted.core.scheduler, hosted.spec.slo, now_s) for name, hosted in models}
    views = {name: model_view(host.models[name], stats, host.residency) for name, stats in counted.items()}
    pool = PoolView(now_s, None, [view for view in views.values() if view.num_running or view.num_waiting])
    load = host_report.host_load(pool)
    return {
        name: host_report.report_model(
            view,
            _usual_prompt_tokens(counted[name]),
            pool,
            host.models[name].cost,
            load=load,
            num_places=host.models[name].spec.vllm_config.scheduler_config.max_num_seqs,
        )
        for name, view in views.items()
    }


def host_trace(host: EngineHost, last_s: float | None) -> list[Event]:
    """What ended in the last `last_s` seconds, or all that is kept; see trace.py."""
    host.note_turn()
    return host.trace.events(0.0 if last_s is None else time.time() - last_s)


def _usual_prompt_tokens(stats: QueueStats) -> int:
    return host_report.usual_prompt_tokens(
        stats.num_waiting, stats.waiting_tokens, stats.num_running, stats.context_tokens
    )
