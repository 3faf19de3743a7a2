# SPDX-License-Identifier: Apache-2.0
"""Between a block pool and the host tier: offers cached blocks before they are lost, brings them back on a hit.

A hash is entered when a step is scheduled, before the step computes the block's bytes. Such blocks are fresh and not
offered until `mark_computed`, which the host calls when no step of the model is under way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, make_block_hash_with_group_id

from tokenpool.memory.kv_tier import HostKVTier


class TierLink:
    """One pool's use of the host tier; called on the host loop's thread only."""

    def __init__(self, pool: Any, tier: HostKVTier) -> None:
        self.tier = tier
        self.model: str = pool.view.owner
        self.stored = tier.entries_of(self.model)
        """Keys that the tier has for the model; a live view, empty most of the time."""
        self._pool = pool
        self._fresh: set[int] = set()

    def note_hash(self, block: KVCacheBlock) -> None:
        """A step was scheduled that will compute the block, which has a hash already."""
        self._fresh.add(block.block_id)

    def mark_computed(self) -> None:
        """All steps scheduled so far are done: every block with a hash holds what the hash says.

        With async scheduling this is so only when the engine's batch queue is empty.
        """
        self._fresh.clear()

    def offer(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Store those of `blocks` that have a hash, before their bytes are lost; waits for copies of them."""
        view = self._pool.view
        for block in blocks:
            if block.block_hash is not None and block.block_id not in self._fresh:
                if self._pool.transit is not None:
                    self._pool.transit.wait_for((block,))
                address = self._pool.address_of(block.block_id)
                self.tier.offer(self.model, block.block_hash, block.block_hash_num_tokens, address, view.block_bytes)

    def discard(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Forget what the hashes of `blocks` name: someone said that it is not valid."""
        for block in blocks:
            for key in (block.block_hash, *self._pool.cached_block_hashes_by_block.get(block.block_id, ())):
                if key is not None:
                    self.tier.discard(self.model, key)

    def restore(self, block_hash: BlockHash, group_ids: Sequence[int]) -> list[KVCacheBlock] | None:
        """Blocks of all groups under `block_hash`, those missing on the device copied in from the tier.

        None if one of them is nowhere, or if a block for it could only be had by evicting another.
        """
        pool = self._pool
        keys = [make_block_hash_with_group_id(block_hash, group) for group in group_ids]
        missing = [key for key in keys if pool.cached_block_hash_to_block.get_one_block(key) is None]
        if not all(key in self.stored for key in missing):
            self.tier.counters.misses += 1
            return None
        blocks = pool.take_unhashed(len(missing))
        if blocks is None:
            return None
        try:
            for key, block in zip(missing, blocks, strict=True):
                num_tokens = self.tier.load(self.model, key, pool.address_of(block.block_id))
                BlockPool._insert_block_hash(pool, key, block, num_tokens)  # not as fresh: the bytes are there
        except OSError:  # computed again instead
            return None
        finally:
            pool.free_block_queue.append_n(blocks)
        return BlockPool.get_cached_block(pool, block_hash, list(group_ids))
