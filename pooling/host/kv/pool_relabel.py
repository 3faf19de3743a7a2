# SPDX-License-Identifier: Apache-2.0
"""Gives blocks of a pool new ids in place: the objects stay, so every list of them that vLLM keeps stays right.

Ids are held by the blocks, by three tables of the pool and by the worker. The worker's part is the runner adapter's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from vllm.v1.core.kv_cache_utils import KVCacheBlock


class IdMap(NamedTuple):
    """New ids of blocks, two int64 arrays of one length; `old` ascends."""

    old: np.ndarray
    new: np.ndarray

    def translate(self, ids: np.ndarray, split: int = 1) -> np.ndarray:
        """The new ids of `ids`; 0, the null block, for a block that was not kept.

        With `split` the ids are those of kernel blocks, of which one KV block has so many. O(ids * log(blocks)).
        """
        blocks, parts = np.divmod(ids, split)
        if not len(self.old):
            return parts.astype(ids.dtype)
        places = np.minimum(np.searchsorted(self.old, blocks), len(self.old) - 1)
        new = np.where(self.old[places] == blocks, self.new[places], 0)
        return (new * split + parts).astype(ids.dtype)


def relabel(pool: Any, blocks: Sequence[KVCacheBlock], new_ids: Sequence[int]) -> IdMap:
    """Give each of `blocks` its new id, in the block and in the pool's tables, except in `pool.blocks`.

    No other block of the pool may have a hash or a reuse watcher: old and new ids overlap, so tables are made anew.
    """
    assert not pool._reuse_watchers, "a watcher would be told of another block"
    cache = pool.cached_block_hash_to_block._cache
    hashes = pool.cached_block_hashes_by_block
    metrics = pool.metrics_collector.block_metrics if pool.metrics_collector else {}
    further = [hashes.pop(block.block_id, None) for block in blocks]
    measured = [metrics.pop(block.block_id, None) for block in blocks]
    assert not hashes, "a block that is gone has hashes"
    shared: dict[Any, dict[int, KVCacheBlock]] = {}
    for block, keys in zip(blocks, further, strict=True):
        for key in (block.block_hash, *(keys or ())):
            if isinstance(value := cache.get(key), dict):
                shared[key] = value
    old_ids = [block.block_id for block in blocks]
    for block, new_id, keys, state in zip(blocks, new_ids, further, measured, strict=True):
        block.block_id = new_id
        if keys is not None:
            hashes[new_id] = keys
        if state is not None:
            metrics[new_id] = state
    for key, value in shared.items():
        cache[key] = {block.block_id: block for block in value.values()}
    old, new = np.array(old_ids, dtype=np.int64), np.array(new_ids, dtype=np.int64)
    order = np.argsort(old)
    return IdMap(old[order], new[order])
