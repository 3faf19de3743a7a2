# SPDX-License-Identifier: Apache-2.0
"""SlabBlockPools that share one arena: what vLLM relies on holds while slabs come and go between them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, make_block_hash_with_group_id

from tokenpool.host.kv.slab_block_pool import SlabBlockPool
from tokenpool.memory.arena import KVArena
from tokenpool.memory.devices.cpu import CpuDevice
from tokenpool.memory.ledger import PageLedger, PageUse
from tokenpool.memory.slab_allocator import SlabAllocator

pytestmark = pytest.mark.vllm

BLOCKS_KNOW_THEIR_POOL = "pool" in KVCacheBlock.__dataclass_fields__
"""False in vLLM 0.29."""
PAGE = 64 << 10
BLOCKS_KNOW_THEIR_POOL = "pool" in KVCacheBlock.__dataclass_fields__
"""False in vLLM 0.29, where each pool is asked to free its own blocks only."""
HASHES = [BlockHash(bytes([n]) * 32) for n in range(8)]


def make_allocator(num_pages: int) -> SlabAllocator:
    ledger = PageLedger(num_pages, PAGE)
    return SlabAllocator(ledger, KVArena(CpuDevice(), ledger, poison=True))


def add_pool(
    allocator: SlabAllocator, name: str, block_bytes: int, floor: int = 0, enable_caching: bool = True
) -> SlabBlockPool:
    arena = allocator.arena
    view = arena.open_view(name, block_bytes)
    return SlabBlockPool(allocator, view, floor, arena.span_bytes // block_bytes, enable_caching, 16)


def cache(pool: SlabBlockPool, block: KVCacheBlock, hash_index: int, group: int = 0) -> None:
    pool._insert_block_hash(make_block_hash_with_group_id(HASHES[hash_index], group), block, num_tokens=16)


def hit(pool: SlabBlockPool, hash_index: int) -> KVCacheBlock | None:
    found = pool.get_cached_block(HASHES[hash_index], [0])
    return found[0] if found else None


class PoolMachine(RuleBasedStateMachine):
    """Three pools of different strides on one arena; `refs` are the references that requests hold."""

    @initialize(
        num_pages=st.integers(4, 9),
        strides=st.lists(st.sampled_from([4096, 5000, 12288, 20000]), min_size=2, max_size=3),
        floors=st.tuples(*[st.integers(0, 1)] * 3),
    )
    def start(self, num_pages: int, strides: list[int], floors: tuple[int, ...]) -> None:
        self.allocator = make_allocator(num_pages)
        self.pools = [add_pool(self.allocator, f"model{i}", stride, floors[i]) for i, stride in enumerate(strides)]
        self.refs: list[list[KVCacheBlock]] = [[] for _ in self.pools]
        self.weights: list[int] = []

    def teardown(self) -> None:
        if hasattr(self, "allocator"):
            self.allocator.arena.close()

    def pick(self, data: st.DataObject) -> tuple[SlabBlockPool, list[KVCacheBlock]]:
        index = data.draw(st.integers(0, len(self.pools) - 1))
        return self.pools[index], self.refs[index]

    # -- what a scheduler does -----------------------------------------------------------------------

    @rule(data=st.data(), count=st.integers(0, 20))
    def get_new(self, data: st.DataObject, count: int) -> None:
        pool, refs = self.pick(data)
        free = pool.get_num_free_blocks()
        if count > free:
            with pytest.raises(ValueError, match=f"Cannot get {count} free blocks"):
                pool.get_new_blocks(count)
            return
        self.take(pool, refs, count)

    def take(self, pool: SlabBlockPool, refs: list[KVCacheBlock], count: int) -> None:
        blocks = pool.get_new_blocks(count)
        assert count == len({id(block) for block in blocks})
        assert not {id(b) for b in refs} & {id(b) for b in blocks}, "a block in use was handed out"
        assert all(b.ref_cnt == 1 and b.block_hash is None and not b.is_null for b in blocks)
        refs += blocks

    @rule(data=st.data())
    def exhaust(self, data: st.DataObject) -> None:
        """The number of free blocks is the truth: so many can be taken at once, and not one more."""
        pool, refs = self.pick(data)
        free = pool.get_num_free_blocks()
        held = [p.num_slabs for p in self.pools]
        with pytest.raises(ValueError, match=f"Cannot get {free + 1} free blocks"):
            pool.get_new_blocks(free + 1)
        assert held == [p.num_slabs for p in self.pools], "a refusal must not move slabs"
        self.take(pool, refs, free)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        pool, refs = self.pick(data)
        if refs:
            start = data.draw(st.integers(0, len(refs) - 1))
            going = refs[start:]
            del refs[start:]
            pool.free_blocks(reversed(going))

    @precondition(lambda self: BLOCKS_KNOW_THEIR_POOL)
    @rule(data=st.data())
    def free_through_another_pool(self, data: st.DataObject) -> None:
        """Deferred frees may name blocks of several pools; each goes to its own."""
        pool, _ = self.pick(data)
        if not BLOCKS_KNOW_THEIR_POOL:
            return
        going = [refs.pop() for refs in self.refs if refs]
        pool.free_blocks(going)

    @rule(data=st.data(), hash_index=st.integers(0, 7))
    def cache_block(self, data: st.DataObject, hash_index: int) -> None:
        pool, refs = self.pick(data)
        if refs:
            cache(pool, data.draw(st.sampled_from(refs)), hash_index, data.draw(st.integers(0, 1)))

    @rule(data=st.data(), hash_index=st.integers(0, 7))
    def touch_cached(self, data: st.DataObject, hash_index: int) -> None:
        pool, refs = self.pick(data)
        block = hit(pool, hash_index)
        if block is not None:
            before = block.ref_cnt
            pool.touch([block])
            assert before + 1 == block.ref_cnt
            refs.append(block)

    @rule(data=st.data())
    def touch_null(self, data: st.DataObject) -> None:
        pool, _ = self.pick(data)
        pool.touch([pool.null_block])
        pool.free_blocks([pool.null_block])

    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        pool, refs = self.pick(data)
        if refs:
            block = data.draw(st.sampled_from(refs))
            pool.evict_blocks({block.block_id})
            assert block.block_hash is None

    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        pool, refs = self.pick(data)
        cached = len(pool.cached_block_hash_to_block)
        assert (not refs) == pool.reset_prefix_cache()
        assert (cached if refs else 0) == len(pool.cached_block_hash_to_block)

    # -- what happens around it ----------------------------------------------------------------------

    @rule(data=st.data(), floor=st.integers(0, 4))
    def set_floor(self, data: st.DataObject, floor: int) -> None:
        pool, _ = self.pick(data)
        self.allocator.set_floor(pool.view.owner, floor)

    @rule(count=st.integers(1, 2))
    def take_weights(self, count: int) -> None:
        if count <= self.allocator.num_kv_pages - self.allocator._committed:
            self.allocator.free_pages(count)
            self.weights += self.allocator.ledger.take("w", PageUse.WEIGHTS, count)

    @precondition(lambda self: self.weights)
    @rule()
    def give_weights(self) -> None:
        self.allocator.ledger.give("w", PageUse.WEIGHTS, self.weights)
        self.weights = []

    # -- laws ----------------------------------------------------------------------------------------

    @invariant()
    def books_agree(self) -> None:
        self.allocator.check()
        for pool, refs in zip(self.pools, self.refs, strict=True):
            pool.check()
            assert 0 <= pool.get_usage() <= 1
            counts: dict[int, int] = {}
            for block in refs:
                assert pool.blocks[block.block_id] is block, "a block in use was taken away"
                counts[block.block_id] = counts.get(block.block_id, 0) + 1
            assert counts == {i: b.ref_cnt for i, b in pool.blocks.items() if b.ref_cnt and not b.is_null}

    @invariant()
    def no_bytes_are_shared(self) -> None:
        arena = self.allocator.arena
        spans = sorted(
            (pool.view.offset + i * pool.view.block_bytes, pool.view.block_bytes)
            for pool in self.pools
            for i in pool.blocks
        )
        for (start, size), (following, _) in itertools.pairwise(spans):
            assert start + size <= following, "blocks of two pools overlap"
        assert spans[-1][0] + spans[-1][1] <= arena.span_bytes

    @invariant()
    def hashes_name_mapped_blocks(self) -> None:
        arena = self.allocator.arena
        for pool in self.pools:
            for index in range(len(HASHES)):
                block = hit(pool, index)
                if block is not None:
                    assert pool.blocks[block.block_id] is block
                    assert arena.slab_of(pool.view, block.block_id) in arena._mapped


class TestPools(PoolMachine.TestCase):
    """Any history of three schedulers keeps every book, and no block outlives its slab."""

    settings = settings(max_examples=80, stateful_step_count=40, deadline=None, derandomize=True)


def close(allocator: SlabAllocator) -> None:
    allocator.check()
    allocator.arena.close()


def test_a_pool_takes_back_cached_slabs_of_another_but_none_in_use():
    """A pool that needs memory empties the other's prefix cache, block by block in use stays."""
    allocator = make_allocator(5)
    a, b = add_pool(allocator, "a", 4096), add_pool(allocator, "b", 4096)
    used = a.get_new_blocks(a.get_num_free_blocks())
    for index, block in enumerate(used[:8]):
        cache(a, block, index)
    slabs = {allocator.arena.slab_of(a.view, block.block_id) for block in used[:8]}
    assert 0 == b.get_num_free_blocks()
    a.free_blocks(used[16:])
    assert 3 * b.blocks_per_slab == b.get_num_free_blocks()
    b.get_new_blocks(b.get_num_free_blocks())
    assert slabs <= a._used.keys()
    assert [hit(a, i) for i in range(8)] == used[:8]
    a.free_blocks(used[:16])
    assert b.blocks_per_slab <= b.get_num_free_blocks()
    b.get_new_blocks(b.get_num_free_blocks())
    assert [None] * 8 == [hit(a, i) for i in range(8)]
    assert 0 == a.num_slabs
    a.check()
    close(allocator)


def test_cached_blocks_are_kept_while_a_page_is_free():
    """A new block comes from a new slab rather than from the prefix cache."""
    allocator = make_allocator(4)
    pool = add_pool(allocator, "a", PAGE // 4)
    first = pool.get_new_blocks(4)
    for index, block in enumerate(first):
        cache(pool, block, index)
    pool.free_blocks(first)
    pool.get_new_blocks(2)
    assert first == [hit(pool, i) for i in range(4)]
    close(allocator)


def test_a_model_over_its_share_gets_no_block_until_it_gave_way():
    """While a floor is not met, a pool that uses more than is left gets nothing, free blocks in its slabs or not."""
    allocator = make_allocator(5)
    a, b = add_pool(allocator, "a", PAGE // 4), add_pool(allocator, "b", PAGE // 4)
    used = a.get_new_blocks(16)
    a.free_blocks(used[1::2])  # every slab stays in use, half its blocks are free
    assert 8 == a.get_num_free_blocks()
    allocator.set_floor("b", 2)
    assert 0 == a.get_num_free_blocks()
    with pytest.raises(ValueError, match="Cannot get 1 free blocks"):
        a.get_new_blocks(1)
    a.free_blocks(used[0:8:2])
    assert (2, 4) == (a.num_slabs, a.get_num_free_blocks())
    assert 8 == b.get_num_free_blocks()
    assert 8 == len(b.get_new_blocks(8))
    a.check()
    b.check()
    close(allocator)


def test_without_caching_blocks_carry_no_hash():
    """A pool without prefix caching grows, shrinks and frees the same way."""
    allocator = make_allocator(3)
    pool = add_pool(allocator, "a", 5000, enable_caching=False)
    for _ in range(3):
        blocks = pool.get_new_blocks(pool.get_num_free_blocks())
        pool.check()
        pool.free_blocks(blocks)
        pool.check()
    close(allocator)


@pytest.mark.skipif(not hasattr(BlockPool, "unpin_blocks"), reason="vLLM 0.29 has no such readers")
@pytest.mark.skipif(not hasattr(BlockPool, "unpin_blocks"), reason="this vLLM knows no unpinned blocks")
@pytest.mark.parametrize("how", ["handed out", "reset", "slab given up"])
def test_a_watcher_hears_of_reuse(how):
    """Blocks unpinned for reading are announced before their bytes change, by whatever way."""
    allocator = make_allocator(4)
    a, b = add_pool(allocator, "a", PAGE // 4), add_pool(allocator, "b", PAGE // 4)
    blocks = a.get_new_blocks(a.get_num_free_blocks())
    heard: list[int] = []
    a.unpin_blocks(blocks, lambda block: heard.append(block.block_id))
    a.check()
    assert not heard
    if how == "handed out":
        a.get_new_blocks(a.get_num_free_blocks())
    elif how == "reset":
        assert a.reset_prefix_cache()
    else:
        b.get_new_blocks(b.get_num_free_blocks())
    assert sorted(block.block_id for block in blocks) == sorted(heard)
    assert not a._reuse_watchers
    close(allocator)


def test_an_idle_pool_costs_nothing_for_blocks_it_does_not_have():
    """A fresh pool has one block object although its view addresses far more ids."""
    allocator = make_allocator(6)
    pool = add_pool(allocator, "a", 4096)
    assert [0] == list(pool.blocks)
    assert pool.num_gpu_blocks > 1000
    assert 0.0 == pool.get_usage()
    assert isinstance(pool, BlockPool)
    close(allocator)


def test_a_closed_pool_leaves_no_trace():
    """Unregistering gives every slab back; the same name can be added again."""
    allocator = make_allocator(4)
    for _ in range(3):
        pool = add_pool(allocator, "a", 12288, floor=2)
        blocks = pool.get_new_blocks(7)
        cache(pool, blocks[0], 0)
        pool.free_blocks(blocks)
        allocator.unregister("a")
        allocator.arena.close_view("a")
        assert 0 == allocator.ledger.total(PageUse.KV)
        assert 0 == len(pool.cached_block_hash_to_block)
    close(allocator)
