# SPDX-License-Identifier: Apache-2.0
"""KVCacheCoordinator builds its BlockPool by name: while a pooled engine is built, it gets ours."""

from __future__ import annotations

from typing import Any

from tokenpool.patches.base import Patch, known
from tokenpool.patches.build_context import current_build


def _replacement(original: Any) -> Any:
    def make_block_pool(*args: Any, **kwargs: Any) -> Any:
        build = current_build()
        return original(*args, **kwargs) if build is None else build.make_block_pool(*args, **kwargs)

    return make_block_pool


PATCH = Patch(
    name="block_pool",
    target="vllm.v1.core.block_pool:BlockPool",
    hashes=known(
        v0_32_0="955b5845abc856573d18db10cc3b3159f1435b4d0c319940dac04fced2dc78ff",
        v0_29_0="0b737d8bdfc5f69d7e653747b51fa421d4a61f2ff9a7aa1ff12df4c8e2643f7a",
    ),
    reason="blocks of a pooled model come from slabs of the shared arena, granted and reclaimed at run time",
    removal="vLLM lets a config or plugin name the block pool class",
    sites=("vllm.v1.core.kv_cache_coordinator:BlockPool",),
    replacement=_replacement,
)
