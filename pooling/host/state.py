# SPDX-License-Identifier: Apache-2.0
"""What a host tells about itself, as plain JSON values; counts of pages unless the name says otherwise."""

from __future__ import annotations

import dataclasses
from typing import Any

from tokenpool.host.engine_host import EngineHost
from tokenpool.host.hosted_model import HostedModel
from tokenpool.memory.ledger import PageUse


def model_state(host: EngineHost, hosted: HostedModel) -> dict[str, Any]:
    """One model: memory, queue and running totals."""
    pool, scheduler, account = hosted.build.pool, hosted.core.scheduler, hosted.core.slo_account
    return {
        "model": hosted.spec.vllm_config.model_config.model,
        "state": "resident",
        "build_s": round(hosted.build_s, 3),
        "weight_pages": host.ledger.held(hosted.name, PageUse.WEIGHTS),
        "kv_pages": pool.num_slabs if pool else 0,
        "kv_idle_pages": pool.num_idle_slabs if pool else 0,
        "kv_block_bytes": hosted.build.view.block_bytes if hosted.build.view else 0,
        "running": len(scheduler.running),
        "waiting": len(scheduler.waiting),
        "tokens": account.tokens,
        "tokens_on_time": account.tokens_on_time,
        "tokens_late": account.tokens - account.tokens_on_time,
        **dataclasses.asdict(hosted.core.counters),
    }


def host_state(host: EngineHost) -> dict[str, Any]:
    """The whole host."""
    ledger = host.ledger.snapshot()
    return {
        "page_size": ledger.page_size,
        "num_pages": ledger.num_pages,
        "num_free_pages": ledger.num_free,
        "held_pages": ledger.held,
        "slab_grants": host.allocator.num_grants,
        "slab_reclaims": host.allocator.num_reclaims,
        "switches": host.switches,
        "loops": host.loops,
        "loop_overhead_s": round(host.overhead_seconds, 6),
        "models": {name: model_state(host, hosted) for name, hosted in host.models.items()},
    }
