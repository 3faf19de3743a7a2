# SPDX-License-Identifier: Apache-2.0
"""Between a block pool and the host tier: saves cached blocks before they are lost, brings them back on a hit.

Nothing here waits for a copy. Blocks that are handed out are copied before the step that overwrites them, and those of
a hit come before the step that reads them: the step is told so when it has been scheduled (`precede_compute`). On a GPU
its stream waits, elsewhere the host does. So that there is little to wait for, free blocks are copied ahead, a few
after each step, where copies go on beside the engine (`copy_ahead`); of those that are lost at once, no more are saved
than the link takes in a moment, the youngest of them.

A hash is entered when a step is scheduled, before the step computes the block's bytes. Such blocks are fresh, and not
saved until the step's output has come, or the host says that no step of the model is under way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, make_block_hash_with_group_id

from tokenpool.memory.devices.device import Copies
from tokenpool.memory.kv_blocks import OfferedBlock
from tokenpool.memory.kv_tier import HostKVTier


class _Batch(NamedTuple):
    """Blocks on their way to the host."""

    number: int
    block_ids: Collection[int]
    copies: Copies


class TierLink:
    """One pool's use of the host tier; called on the host loop's thread only."""

    def __init__(self, pool: Any, tier: HostKVTier) -> None:
        self.tier = tier
        self.model: str = pool.view.owner
        self.stored = tier.entries_of(self.model)
        """Keys that the tier has for the model; a live view, empty most of the time."""
        self._pool = pool
        self._fresh: set[int] = set()
        self._scheduled: deque[tuple[Any, set[int]]] = deque()  # steps under way and their fresh blocks
        self._unsaved: dict[int, KVCacheBlock] = {}  # blocks that became free, the first to be handed out first
        self._leaving: deque[_Batch] = deque()
        self._num_batches = 0
        self._due: _Batch | None = None  # the last one that the next step comes after
        self._arriving: Copies | None = None  # the last copies to the device that the next step comes after

    # -- what is computed ----------------------------------------------------------------------------

    def note_hash(self, block: KVCacheBlock) -> None:
        """A step is being scheduled that will compute the block, which has a hash already."""
        self._fresh.add(block.block_id)

    def step_scheduled(self, step: Any) -> None:
        """What has been noted so far is computed by this step at the latest."""
        self._scheduled.append((step, self._fresh))
        self._fresh = set()

    def step_computed(self, step: Any) -> None:
        """The output of a step has come; those before it are done too."""
        if any(known is step for known, _ in self._scheduled):
            while self._scheduled.popleft()[0] is not step:
                pass

    def mark_computed(self) -> None:
        """All steps scheduled so far are done: every block with a hash holds what the hash says."""
        self._fresh.clear()
        self._scheduled.clear()

    def _is_fresh(self, block: KVCacheBlock) -> bool:
        return block.block_id in self._fresh or any(block.block_id in fresh for _, fresh in self._scheduled)

    # -- to the host ---------------------------------------------------------------------------------

    def offer(self, blocks: Iterable[KVCacheBlock], *, most_bytes: int | None = None) -> None:
        """Begin to save those of `blocks` that have a hash; in the order in which they may be dropped again."""
        computed = [block for block in blocks if block.block_hash is not None and not self._is_fresh(block)]
        if not computed:
            return
        if self._pool.transit is not None:
            self._pool.transit.wait_for(computed)
        offered = [
            OfferedBlock(block.block_hash, block.block_hash_num_tokens, self._pool.address_of(block.block_id))
            for block in computed
        ]
        copies = self.tier.offer(self.model, offered, self._pool.view.block_bytes, most_bytes=most_bytes)
        if copies is not None and not copies.done():
            self._num_batches += 1
            self._leaving.append(_Batch(self._num_batches, {block.block_id for block in computed}, copies))

    def give_away(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Save what can be saved of blocks that are about to be overwritten, or to leave the device, in a moment."""
        self.offer(blocks, most_bytes=self.tier.device.burst_bytes)
        for block in blocks:
            self._unsaved.pop(block.block_id, None)
        while self._leaving and self._leaving[0].copies.done():
            self._leaving.popleft()
        for batch in reversed(self._leaving):
            if self._due is not None and batch.number <= self._due.number:
                break
            if any(block.block_id in batch.block_ids for block in blocks):
                self._due = batch
                break

    def note_free(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Nobody uses these blocks any more; those with a hash can be found again."""
        if self.tier.device.copies_beside:
            self._unsaved.update((block.block_id, block) for block in blocks if block.block_hash is not None)

    @property
    def has_unsaved(self) -> bool:
        """Whether `copy_ahead` may find something to do."""
        return bool(self._unsaved)

    @property
    def is_short_of_pages(self) -> bool:
        """Whether less than a quarter of the device's pages is free."""
        ledger = self._pool._arena.ledger
        return 4 * ledger.num_free < ledger.num_pages

    def copy_ahead(self) -> None:
        """Begin to save a few of the blocks that have been free for longest, without a need so far."""
        few = max(1, self.tier.device.burst_bytes // 4 // self._pool.view.block_bytes)
        chosen: list[KVCacheBlock] = []
        for block in list(islice(self._unsaved.values(), 2 * few)):
            if len(chosen) == few:
                break
            if self._is_fresh(block):
                continue
            del self._unsaved[block.block_id]
            if block.ref_cnt == 0 and block.block_hash is not None and block.block_hash not in self.stored:
                chosen.append(block)
        self.offer(chosen)

    def leave(self) -> None:
        """The pool's blocks lose their places, at a token boundary: whoever gets these comes after copies under way."""
        self.mark_computed()
        self._unsaved.clear()

    def discard(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Forget what the hashes of `blocks` name: someone said that it is not valid."""
        for block in blocks:
            for key in (block.block_hash, *self._pool.cached_block_hashes_by_block.get(block.block_id, ())):
                if key is not None:
                    self.tier.discard(self.model, key)

    # -- from the host -------------------------------------------------------------------------------

    def restore(self, block_hash: BlockHash, group_ids: Sequence[int]) -> list[KVCacheBlock] | None:
        """Blocks of all groups under `block_hash`, those missing on the device on their way in from the tier.

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
            places = {key: pool.address_of(block.block_id) for key, block in zip(missing, blocks, strict=True)}
            self._arriving = self.tier.begin_load(self.model, places)
            for key, block in zip(missing, blocks, strict=True):  # not as fresh: a step finds the bytes there
                BlockPool._insert_block_hash(pool, key, block, self.tier.tag_of(self.model, key))
        except OSError:  # computed again instead
            return None
        finally:
            pool.free_block_queue.append_n(blocks)
        return BlockPool.get_cached_block(pool, block_hash, list(group_ids))

    def precede_compute(self) -> None:
        """Let what the engine computes from now on come after the copies that it relies on."""
        due, arriving = self._due, self._arriving
        self._due = self._arriving = None
        if due is not None:
            due.copies.precede_compute()
        if arriving is not None:
            arriving.precede_compute()
