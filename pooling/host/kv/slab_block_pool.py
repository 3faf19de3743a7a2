# SPDX-License-Identifier: Apache-2.0
"""vLLM's BlockPool on slabs: the free list grows by granted slabs and shrinks by reclaimed ones.

Everything else (prefix-cache hashes, reference counts, LRU order) is vLLM's own. Block objects exist only for slabs
that the model holds, so a small model on a large device costs nothing for the blocks it does not have.

A pool can be detached: its slabs are given back while blocks with references live on as objects, whose bytes lie in
host memory. `attach` puts them into other slabs under other ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vllm.v1.core.block_pool import BlockHashToBlockMap, BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashWithGroupId,
    FreeKVCacheBlockQueue,
    KVCacheBlock,
)

from tokenpool.host.kv.kv_transit import KVTransit
from tokenpool.host.kv.pool_relabel import IdMap, relabel
from tokenpool.host.kv.tier_link import TierLink
from tokenpool.memory.arena import ArenaView
from tokenpool.memory.kv_tier import HostKVTier
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
        self.blocks: dict[int, KVCacheBlock] = {0: self.null_block}
        self.free_block_queue = FreeKVCacheBlockQueue([])
        self._allocator = allocator
        self.view = view
        self.link: TierLink | None = None
        """The host tier for cached blocks; None = a cached block whose bytes go is forgotten."""
        self.transit: KVTransit | None = None
        """Copies of blocks that are under way."""
        self._arena = allocator.arena
        self.blocks_per_slab = self._arena.min_blocks_per_slab(view)
        if not hasattr(self, "_reuse_watchers"):  # vLLM 0.29
            self._reuse_watchers: dict[int, Any] = {}
        self._used: dict[int, int] = {}  # slab -> blocks of it with a reference
        self._idle: dict[int, None] = {}  # slabs without one, the longest idle first
        self._stored: Mapping[bytes, Any] = {}  # keys in the host tier
        self._detached = False
        self._on_leave: Callable[[KVCacheBlock], None] = lambda block: None
        allocator.register(view.owner, self, floor)

    def use_tier(self, tier: HostKVTier) -> None:
        """Keep cached blocks in `tier` when they leave the device; without effect if that cannot be used.

        Prefix caching may be off, and KV cache events would not name what comes back.
        """
        if self.enable_caching and not self.enable_kv_cache_events:
            self.link = TierLink(self, tier)
            self._stored = self.link.stored

    # -- what the scheduler asks ---------------------------------------------------------------------

    def get_num_free_blocks(self) -> int:
        """Blocks that `get_new_blocks` can hand out: free ones plus those of slabs still to be granted.

        None while the model uses pages that are promised to another: its requests end or are preempted first.
        """
        if self._allocator.is_over(self.view.owner):
            return 0
        grantable = self._allocator.num_grantable(self.view.owner)
        return self.free_block_queue.num_free_blocks + grantable * self.blocks_per_slab

    def get_usage(self) -> float:
        """Used blocks as a fraction of those the model could have now (0..1)."""
        used = self.num_used_blocks
        free = self.get_num_free_blocks()
        return used / (used + free) if used else 0.0

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """Hand out blocks, growing by slabs; raises ValueError when more are asked for than there are."""
        if num_blocks > self.get_num_free_blocks():
            raise ValueError(f"Cannot get {num_blocks} free blocks from the pool")
        queue = self.free_block_queue
        name = self.view.owner
        while queue.num_free_blocks < num_blocks and self._grow():
            pass
        if self.enable_caching and self._head_is_cached() and self._allocator.num_free_for(name):
            self._grow(front=True)  # keep cached blocks while a page is free
        if self.link is not None:
            self.link.give_away(self._first_free(num_blocks))
        new_blocks = super().get_new_blocks(num_blocks)
        for block in new_blocks:
            self._mark_used(block)
        return new_blocks

    def get_cached_block(self, block_hash: BlockHash, kv_cache_group_ids: list[int]) -> list[KVCacheBlock] | None:
        """The cached blocks of all groups under a hash, from the host tier if need be; None if one is missing."""
        found = super().get_cached_block(block_hash, kv_cache_group_ids)
        if found is None and self._stored and self.link is not None:
            return self.link.restore(block_hash, kv_cache_group_ids)
        return found

    def touch(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Add a reference to each block, as vLLM does on a prefix hit; not while detached."""
        assert not self._detached, f"{self.view.owner!r} is detached and was stepped"
        for block in blocks:
            if block.ref_cnt == 0 and not block.is_null:
                self._mark_used(block)
            super().touch((block,))

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        """Drop a reference from each block, first in the list evicted first."""
        blocks = list(ordered_blocks)
        if self._detached:
            self._free_detached(blocks)
            return
        super().free_blocks(blocks)
        self._mark_freed(blocks)

    def unpin_blocks(self, blocks: Iterable[KVCacheBlock], on_reuse: Any) -> None:
        """Drop a reference from blocks that stay readable until they are reused."""
        blocks = list(blocks)
        if self._detached:  # their bytes are gone from the device already
            for block in blocks:
                on_reuse(block)
            self._free_detached(blocks)
            return
        super().unpin_blocks(blocks, on_reuse)
        self._mark_freed(blocks)

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Drop the prefix-cache hashes of these blocks, whose bytes are said to be wrong."""
        blocks = [self.blocks[block_id] for block_id in block_ids]
        if self.link is not None:
            self.link.discard(blocks)
        for block in blocks:
            self._maybe_evict_cached_block(block)

    def reset_prefix_cache(self) -> bool:
        """Drop every hash, in the host tier too; False, and nothing changed, while a block is in use."""
        if self.num_used_blocks:
            return False
        if self.link is not None:
            self.link.tier.forget(self.view.owner)
            self.link.mark_computed()
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
        blocks = [self.blocks.pop(block_id) for block_id in self._arena.block_ids(self.view, slab)]
        for block in blocks:
            self.free_block_queue.remove(block)
        self._lose(blocks)
        del self._idle[slab], self._used[slab]
        return slab

    def give_back_idle(self, count: int) -> int:
        """Give up to `count` idle slabs back to the allocator; returns how many."""
        return self._allocator.reclaim(self.view.owner, count)

    def address_of(self, block_id: int) -> int:
        """Where the block's bytes start on the device."""
        return self._arena.base + self.view.offset + block_id * self.view.block_bytes

    def take_unhashed(self, count: int) -> list[KVCacheBlock] | None:
        """Take blocks without a hash off the free list, out of a free page if need be; None if there are too few."""
        if self._allocator.is_over(self.view.owner):
            return None
        while len(blocks := self._first_free(count)) < count or any(b.block_hash is not None for b in blocks):
            if not self._allocator.num_free_for(self.view.owner) or not self._grow(front=True):
                return None
        blocks = self.free_block_queue.popleft_n(count)
        if self._reuse_watchers:
            self._notify_reuse(blocks)
        return blocks

    # -- away and back -------------------------------------------------------------------------------

    @property
    def is_detached(self) -> bool:
        """Whether the pool is between `detach` and `attach`."""
        return self._detached

    @property
    def num_used_blocks(self) -> int:
        """Blocks with a reference."""
        return len(self.blocks) - 1 if self._detached else sum(self._used.values())

    def used_blocks(self) -> list[KVCacheBlock]:
        """Blocks with a reference, in the order of their ids. O(blocks of the slabs in use)."""
        if self._detached:
            return [block for block in self.blocks.values() if not block.is_null]
        slabs = sorted(slab for slab, used in self._used.items() if used)
        blocks = (self.blocks[i] for slab in slabs for i in self._arena.block_ids(self.view, slab))
        return [block for block in blocks if block.ref_cnt]

    def detach(
        self, on_leave: Callable[[KVCacheBlock], None] = lambda block: None, *, keep_floor: bool = False
    ) -> list[KVCacheBlock]:
        """Give all slabs back; returns the blocks in use, which live on, in the order of their ids.

        Whoever calls has saved their bytes, at a token boundary. Blocks that are only cached are forgotten, after
        they were offered to the host tier. While detached there are no free blocks; a block whose last reference
        goes is handed to `on_leave`, its hash still on it, and leaves.
        """
        assert not self._detached
        if self.link is not None:
            self.link.leave()
        used = self.used_blocks()
        # Off the list, oldest first: this is the order in which the tier would drop them again.
        self._lose(self.free_block_queue.popleft_n(self.free_block_queue.num_free_blocks))
        if self._reuse_watchers:
            self._notify_reuse([self.blocks[i] for i in list(self._reuse_watchers)])
        slabs = list(self._used)
        self.blocks = {0: self.null_block} | {block.block_id: block for block in used}
        self._used, self._idle = {}, {}
        self._detached, self._on_leave = True, on_leave
        self._allocator.detach(self.view.owner, slabs, keep_floor=keep_floor)
        return used

    def slabs_needed(self) -> int:
        """Slabs that hold the blocks in use, wherever they lie."""
        return -(-self.num_used_blocks // self.blocks_per_slab)

    def attach(self) -> IdMap:
        """Get slabs for the surviving blocks and give them new ids, neighbours in the order of `used_blocks`.

        Raises and changes nothing if there are not `slabs_needed()` slabs: CapacityError if the allocator may not
        grant them, OSError if the device gives no memory. The bytes are still to be copied, and the worker's ids to
        be mapped.
        """
        assert self._detached
        owner = self.view.owner
        survivors = self.used_blocks()
        self._allocator.attach(owner, self.slabs_needed())
        slabs: list[int] = []
        ids_of: list[range] = []
        try:
            while sum(map(len, ids_of)) < len(survivors):
                slab = self._allocator.grant(owner)
                assert slab is not None, "the allocator broke its word"
                slabs.append(slab)
                ids_of.append(self._arena.block_ids(self.view, slab))
        except BaseException:  # the device gives no memory
            self._allocator.detach(owner, slabs)
            raise
        self._detached = False
        self.blocks = {0: self.null_block}
        new_ids: list[int] = []
        for slab, ids in zip(slabs, ids_of, strict=True):
            moved = survivors[len(new_ids) : len(new_ids) + len(ids)]
            new_ids += ids[: len(moved)]
            free = [self._new_block(i) for i in ids[len(moved) :]]
            self.free_block_queue.append_n(free)
            self.blocks.update(zip(ids, [*moved, *free], strict=True))
            self._used[slab] = len(moved)
        if self._used:
            self._allocator.set_busy(owner, len(self._used))
        return relabel(self, survivors, new_ids)

    def _free_detached(self, blocks: list[KVCacheBlock]) -> None:
        for block in blocks:
            if not self._is_mine(block):
                block.pool.free_blocks((block,))
                continue
            block.ref_cnt -= 1
            if block.ref_cnt == 0 and not block.is_null:
                self._on_leave(block)
                self._maybe_evict_cached_block(block)
                del self.blocks[block.block_id]

    def _lose(self, blocks: list[KVCacheBlock]) -> None:
        """Forget the hashes of unused blocks whose bytes go."""
        if self._reuse_watchers:
            self._notify_reuse(blocks)
        if self.link is not None:
            self.link.give_away(blocks)
        for block in blocks:
            self._maybe_evict_cached_block(block)

    def _first_free(self, count: int) -> list[KVCacheBlock]:
        """The first blocks of the free list, at most `count`, which stay on it."""
        queue = self.free_block_queue
        blocks: list[KVCacheBlock] = []
        block = queue.fake_free_list_head.next_free_block
        while len(blocks) < count and block is not None and block is not queue.fake_free_list_tail:
            blocks.append(block)
            block = block.next_free_block
        return blocks

    def _insert_block_hash(
        self, block_hash_with_group_id: BlockHashWithGroupId, block: KVCacheBlock, num_tokens: int | None
    ) -> None:
        super()._insert_block_hash(block_hash_with_group_id, block, num_tokens)
        if self.link is not None:
            self.link.note_hash(block)

    def _grow(self, *, front: bool = False) -> bool:
        slab = self._allocator.grant(self.view.owner)
        if slab is None:
            return False
        blocks = [self._new_block(i) for i in self._arena.block_ids(self.view, slab)]
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
        return any(block.block_hash is not None for block in self._first_free(1))

    def _mark_used(self, block: KVCacheBlock) -> None:
        slab = self._arena.slab_of(self.view, block.block_id)
        self._used[slab] += 1
        if self._used[slab] == 1:
            del self._idle[slab]
            self._allocator.set_busy(self.view.owner, len(self._used) - len(self._idle))

    def _mark_freed(self, blocks: list[KVCacheBlock]) -> None:
        freed = {b.block_id: b for b in blocks if b.ref_cnt == 0 and not b.is_null and self._is_mine(b)}
        if self.transit is not None:
            self.transit.wait_for(freed.values())
        if self.link is not None:
            self.link.note_free(freed.values())
        for block_id in freed:
            slab = self._arena.slab_of(self.view, block_id)
            self._used[slab] -= 1
            if self._used[slab] == 0:
                self._idle[slab] = None
                self._allocator.set_busy(self.view.owner, len(self._used) - len(self._idle))

    def check(self) -> None:
        """Raise AssertionError unless slabs, blocks, references, free list and hashes agree."""
        ids = {i for slab in self._used for i in self._arena.block_ids(self.view, slab)}
        if self._detached:
            assert not ids, "a detached pool holds slabs"
            ids = set(self.blocks) - {0}
            assert all(self.blocks[i].ref_cnt for i in ids), "a block without reference is kept"
        assert self.blocks.keys() == ids | {0}, "block objects differ from the slabs held"
        assert all(block.block_id == i for i, block in self.blocks.items()), "a block lies under another's id"
        used = dict.fromkeys(self._used, 0)
        for block_id in () if self._detached else ids:
            used[self._arena.slab_of(self.view, block_id)] += self.blocks[block_id].ref_cnt > 0
        assert used == self._used, "use counts drifted"
        assert set(self._idle) == {slab for slab, count in used.items() if count == 0}, "idle slabs drifted"
        free = {b.block_id for b in self.free_block_queue.get_all_free_blocks()}
        assert free == {i for i in ids if self.blocks[i].ref_cnt == 0}, "free list differs from the references"
        hashed: set[int] = set()
        for value in self.cached_block_hash_to_block._cache.values():
            for key, block in value.items() if isinstance(value, dict) else ((None, value),):
                assert key in (None, block.block_id), "a hash names a block by another's id"
                hashed.add(block.block_id)
                assert self.blocks.get(block.block_id) is block, "a hash names a block whose bytes are gone"
        assert hashed == {i for i in ids if self.blocks[i].block_hash is not None}, "blocks and hashes differ"
        assert self.cached_block_hashes_by_block.keys() <= hashed, "hashes of a block that is gone"
        assert self._allocator.held(self.view.owner) == len(self._used), "slabs differ from the allocator's books"
        assert self._allocator.is_away(self.view.owner) == self._detached, "away differs from the allocator's books"
