# SPDX-License-Identifier: Apache-2.0
"""How large a KV block of a model is, before anything of it is compiled."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_kv_cache_groups
from vllm.v1.kv_cache_interface import KVCacheSpec

logger = logging.getLogger(__name__)

_SOME_MEMORY = 1 << 50
"""Bytes; how many blocks there are changes nothing of their size."""


def block_bytes_of(config: VllmConfig, specs: Mapping[str, KVCacheSpec]) -> int:
    """Bytes of one KV block of all layers together, in the layout that was set for the pool; 0 = none, or not known.

    `specs` are those of each layer, as a worker tells them. What fails here fails again when vLLM plans the cache, and
    is told then.
    """
    try:
        groups = get_kv_cache_groups(config, dict(specs))
        planned = get_kv_cache_config_from_groups(config, groups, _SOME_MEMORY)
        return max((tensor.block_stride for tensor in planned.kv_cache_tensors), default=0)
    except Exception as error:  # vLLM raises many kinds
        logger.debug("the size of a KV block is not known yet: %s", error)
        return 0
