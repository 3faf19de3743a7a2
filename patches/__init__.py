# SPDX-License-Identifier: Apache-2.0
"""Everything of vLLM that tokenpool replaces or relies on although it is not public API; see README.md."""

from __future__ import annotations

from tokenpool.patches import (
    block_pool,
    compile_hash,
    cpu_gemm,
    dependencies,
    draft_constraints,
    encoder_order,
    engine_client,
    engine_launch,
    kernel_overrides,
    kv_cache_allocation,
    model_inspection,
    reduce_room,
    token_ranks,
    weight_iteration,
)
from tokenpool.patches.base import Patch, PatchSet, PatchStatus

PATCHES = PatchSet(
    (
        block_pool.PATCH,
        kv_cache_allocation.PATCH,
        model_inspection.PATCH,
        cpu_gemm.PATCH,
        engine_launch.PATCH,
        engine_client.PATCH,
        weight_iteration.PATCH,
        kernel_overrides.PATCH,
        draft_constraints.PATCH,
        encoder_order.PATCH,
        token_ranks.PATCH,
        compile_hash.PATCH,
        reduce_room.PATCH,
        *dependencies.PATCHES,
    )
)


def vllm_version() -> str:
    """The installed vLLM version without a local build suffix."""
    from vllm.version import __version__

    return __version__.partition("+")[0]


def apply_all() -> None:
    """Apply all patches to this process; raises PatchMismatchError and applies none if vLLM is not a known one."""
    PATCHES.apply(vllm_version())


__all__ = ["PATCHES", "Patch", "PatchSet", "PatchStatus", "apply_all", "vllm_version"]
