# SPDX-License-Identifier: Apache-2.0
"""Model runners allocate their KV cache by name: while a pooled engine is built, they get views of the arena."""

from __future__ import annotations

from typing import Any

from tokenpool.patches.base import Patch, known
from tokenpool.patches.build_context import current_build


def _replacement(original: Any) -> Any:
    def allocate_kv_cache(
        kv_cache_config: Any, device: Any, layout: Any, kernel_block_sizes: Any = None
    ) -> dict[str, Any]:
        build = current_build()
        if build is None:
            return original(kv_cache_config, device, layout, kernel_block_sizes)
        return build.allocate_kv_cache(kv_cache_config, layout, kernel_block_sizes)

    return allocate_kv_cache


PATCH = Patch(
    name="kv_cache_allocation",
    target="vllm.v1.worker.utils:allocate_kv_cache",
    hashes=known(
        v0_32_0="b1f3e24311485a090404f9ca264b1325cc0a965023221a46c18f45acf3c0ddfd",
        v0_29_0="567365d6ba1f8cfbf8e87d070e116d81984bc4a03ab7bd50517345e4e16363a2",
    ),
    reason="all models of a device view one arena instead of owning a KV tensor each",
    removal="vLLM accepts an external KV allocator",
    sites=(
        "vllm.v1.worker.gpu_model_runner:allocate_kv_cache",  # model runner V1
        "vllm.v1.worker.gpu.attn_utils:allocate_kv_cache",  # model runner V2
    ),
    replacement=_replacement,
)
