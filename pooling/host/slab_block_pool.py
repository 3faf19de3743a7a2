# SPDX-License-Identifier: Apache-2.0
"""vLLM's BlockPool on slabs: the free list grows by granted slabs and shrinks by reclaimed ones.

Everything else (prefix-cache hashes, reference counts, LRU order) is vLLM's own. Block objects exist only for slabs
that the model holds, so a small model on a large device costs nothing for the blocks it does not have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vllm.v1.core.block_pool import BlockHashToBlockMap, BlockPool
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock

from tokenpool.memory.arena import ArenaView
from tokenpool.memory.slab_allocator import SlabAllocator

_BLOCK_KNOWS_POOL = "pool" in KVCacheBlock.__dataclass_fields__
"""False in vLLM 0.29, where all blocks that a pool is asked to free are its own."""


class SlabBlockPool(BlockPool):
    """Blocks of one pooled model; called on the host loop's thread only.

    `num_gpu_blocks` is the number of ids the view can address, not of blocks the model can have at once.
    """

    def __init__(
        self, allocator: SlabAllocator, view: ArenaView, floor: int, num_gpu_blocks: int, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(1, *args, **kwargs)  # builds the null block, id 0
        self.num_gpu_blocks = num_gpu_blocks
        self.blocks: dict[int, KVCacheBlock] = {0: self.null_block}  # type: ignore[assignment]
        self.free_block_queue = FreeKVCacheBlockQueue([])
        self._allocator = allocator
        self._view = view
        self._arena = allocator.arena
        self.blocks_per_slab = self._arena.min_blocks_per_slab(view)
        if not hasattr(self, "_reuse_watchers"):  # vLLM 0.29
            self._reuse_watchers = {}
        self._used: dict[int, int] = {}  # slab -> blocks of it with a reference
        self._idle: dict[int, None] = {}  # slabs without one, the longest idle first
        allocator.register(view.owner, self, floor)

    # -- what the scheduler asks ---------------------------------------------------------------------

    def get_num_free_blocks(self) -> int:
        """Blocks that `get_new_blocks` can hand out: free ones plus those of slabs still to be granted.

        None while the model uses pages that are promised to another: its requests end or are preempted first.
        """
        if self._allocator.is_over(self._view.owner):
            return 0
        grantable = self._allocator.num_grantable(self._view.owner)
        return self.free_block_queue.num_free_blocks + grantable * self.blocks_per_slab

    def get_usage(self) -> float:
        """Used blocks as a fraction of those the model could have now (0..1)."""
        used = sum(self._used.values())
        free = self.get_num_free_blocks()
        return used / (used + free) if used else 0.0

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """Hand out blocks, growing by slabs; raises ValueError when more are asked for than there are."""
        if num_blocks > self.get_num_free_blocks():
            raise ValueError(f"Cannot get {num_blocks} free blocks from the pool")
        queue = self.free_block_queue
        name = self._view.owner
        while queue.num_free_blocks < num_blocks and self._grow():
            pass
        if self.enable_caching and self._head_is_cached() and self._allocator.num_free_for(name):
            self._grow(front=True)  # keep cached blocks while a page is free
        new_blocks = super().get_new_blocks(num_blocks)
        for block in new_blocks:
            self._mark_used(block)
        return new_blocks

    def touch(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Add a reference to each block, as vLLM does on a prefix hit."""
        for block in blocks:
            if block.ref_cnt == 0 and not block.is_null:
                self._mark_used(block)
            super().touch((block,))

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        """Drop a reference from each block, first in the list evicted first."""
        blocks = list(ordered_blocks)
        super().free_blocks(blocks)
        self._mark_freed(blocks)

    def unpin_blocks(self, blocks: Iterable[KVCacheBlock], on_reuse: Any) -> None:
        """Drop a reference from blocks that stay readable until they are reused."""
        blocks = list(blocks)
        super().unpin_blocks(blocks, on_reuse)
        self._mark_freed(blocks)

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Drop the prefix-cache hashes of these blocks."""
        for block_id in block_ids:
            self._maybe_evict_cached_block(self.blocks[block_id])

    def reset_prefix_cache(self) -> bool:
        """Drop every hash; False, and nothing changed, while a block is in use."""
        if any(self._used.values()):
            return False
        for block in self.blocks.values():
            self._maybe_evict_cached_block(block)
        self.cached_block_hash_to_block = BlockHashToBlockMap()
        self.cached_block_hashes_by_block.clear()
        if self._reuse_watchers:
            self._notify_reuse([self.blocks[i] for i in list(self._reuse_watchers)])
        if self.metrics_collector:
            self.metrics_collector.reset()
        return True

    # -- slabs ---------------------------------------------------------------------------------------

    @property
    def num_slabs(self) -> int:
        """Slabs the model holds."""
        return len(self._used)

    @property
    def num_idle_slabs(self) -> int:
        """Slabs of which no block is in use."""
        return len(self._idle)

    def give_up_idle_slab(self) -> int:
        """Forget the slab that has been idle longest, with its cached blocks; returns its id."""
        slab = next(iter(self._idle))
        for block_id in self._arena.block_ids(self._view, slab):
            block = self.blocks.pop(block_id)
            if self._reuse_watchers:
                self._notify_reuse((block,))
            self._maybe_evict_cached_block(block)
            self.free_block_queue.remove(block)
        del self._idle[slab], self._used[slab]
        return slab

    def _grow(self, *, front: bool = False) -> bool:
        slab = self._allocator.grant(self._view.owner)
        if slab is None:
            return False
        blocks = [self._new_block(i) for i in self._arena.block_ids(self._view, slab)]
        self.blocks.update((block.block_id, block) for block in blocks)
        (self.free_block_queue.prepend_n if front else self.free_block_queue.append_n)(blocks)
        self._used[slab] = 0
        self._idle[slab] = None
        return True

    def _new_block(self, block_id: int) -> KVCacheBlock:
        return KVCacheBlock(block_id, pool=self) if _BLOCK_KNOWS_POOL else KVCacheBlock(block_id)

    def _is_mine(self, block: KVCacheBlock) -> bool:
        return not _BLOCK_KNOWS_POOL or block.pool is self

    def _head_is_cached(self) -> bool:
        queue = self.free_block_queue
        if queue.num_free_blocks == 0:
            return False
        head = queue.fake_free_list_head.next_free_block
        return head is not None and head.block_hash is not None

    def _mark_used(self, block: KVCacheBlock) -> None:
        slab = self._arena.slab_of(self._view, block.block_id)
        self._used[slab] += 1
        if self._used[slab] == 1:
            del self._idle[slab]
            self._allocator.set_busy(self._view.owner, len(self._used) - len(self._idle))

    def _mark_freed(self, blocks: list[KVCacheBlock]) -> None:
        freed = {b.block_id: b for b in blocks if b.ref_cnt == 0 and not b.is_null and self._is_mine(b)}
        for block_id in freed:
            slab = self._arena.slab_of(self._view, block_id)
            self._used[slab] -= 1
            if self._used[slab] == 0:
                self._idle[slab] = None
                self._allocator.set_busy(self._view.owner, len(self._used) - len(self._idle))

    def check(self) -> None:
        """Raise AssertionError unless slabs, blocks, references, free list and hashes agree."""
        ids = {i for slab in self._used for i in self._arena.block_ids(self._view, slab)}
        assert self.blocks.keys() == ids | {0}, "block objects differ from the slabs held"
        used = dict.fromkeys(self._used, 0)
        for block_id in ids:
            used[self._arena.slab_of(self._view, block_id)] += self.blocks[block_id].ref_cnt > 0
        assert used == self._used, "use counts drifted"
        assert set(self._idle) == {slab for slab, count in used.items() if count == 0}, "idle slabs drifted"
        free = {b.block_id for b in self.free_block_queue.get_all_free_blocks()}
        assert free == {i for i in ids if self.blocks[i].ref_cnt == 0}, "free list differs from the references"
        for value in self.cached_block_hash_to_block._cache.values():
            for block in value.values() if isinstance(value, dict) else (value,):
                assert self.blocks.get(block.block_id) is block, "a hash names a block whose bytes are gone"
        assert self._allocator.held(self._view.owner) == len(self._used), "slabs differ from the allocator's books"
