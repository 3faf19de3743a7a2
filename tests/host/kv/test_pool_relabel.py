# SPDX-License-Identifier: Apache-2.0
"""Pools that leave the device and come back under other ids: no block's bytes, hash or reference is lost."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vllm.v1.core.kv_cache_metrics import KVCacheMetricsCollector
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from tests.helpers.devices.late_device import LateDevice
from tests.helpers.swapping import HASHES, PAGE, FakeModel, key_of, make_allocator, make_swapper
from tokenpool.errors import CapacityError
from tokenpool.host.kv.pool_relabel import IdMap
from tokenpool.memory.host_ledger import HostUse
from tokenpool.memory.ledger import PageUse
from tokenpool.memory.states import KVState

pytestmark = pytest.mark.vllm


class SwapMachine(RuleBasedStateMachine):
    """Two or three models with requests; `value` says what must lie in a block, whatever its id is now."""

    @initialize(
        num_pages=st.integers(4, 8),
        strides=st.lists(st.sampled_from([4096, 5000, 12288, 20000]), min_size=2, max_size=3),
        floors=st.tuples(*[st.integers(0, 1)] * 3),
        budget=st.sampled_from([40_000, 200_000, 4 << 20]),
    )
    def start(self, num_pages: int, strides: list[int], floors: tuple[int, ...], budget: int) -> None:
        self.device = LateDevice(chance=0.0)
        self.allocator = make_allocator(num_pages, self.device)
        self.models = [FakeModel(self.allocator, f"m{i}", stride, floors[i]) for i, stride in enumerate(strides)]
        self.swapper = make_swapper(self.allocator, self.models, budget)
        self.requests = [model.requests for model in self.models]
        self.value: dict[int, tuple[KVCacheBlock, int]] = {}  # id() of a block in use
        self.next_value = 1

    def teardown(self) -> None:
        if hasattr(self, "allocator"):
            self.allocator.arena.close()

    # -- helpers -------------------------------------------------------------------------------------

    def pick(self, data: st.DataObject, *, out: bool | None = None) -> int | None:
        fitting = [i for i, m in enumerate(self.models) if out is None or out == self.swapper.is_out(m.name)]
        return data.draw(st.sampled_from(fitting)) if fitting else None

    def fill(self, index: int, blocks: list[KVCacheBlock]) -> None:
        self.models[index].pool.link.precede_compute()
        for block in blocks:
            self.next_value += 1
            self.models[index].write(block, self.next_value)
            self.value[id(block)] = (block, self.next_value)

    def compute_with(self, index: int, blocks: list[KVCacheBlock]) -> None:
        """A step that reads or writes these blocks waits for them."""
        if (transit := self.models[index].pool.transit) is not None:
            transit.precede_compute(blocks)
        self.models[index].pool.link.precede_compute()

    def held(self, index: int) -> list[KVCacheBlock]:
        return [block for blocks in self.requests[index].values() for block in blocks]

    def end(self, index: int, request_id: str) -> None:
        blocks = self.requests[index].pop(request_id)
        self.models[index].pool.free_blocks(list(reversed(blocks)))
        for block in blocks:
            if block.ref_cnt == 0:
                del self.value[id(block)]

    # -- steps of a resident model -------------------------------------------------------------------

    @rule(data=st.data(), count=st.integers(1, 14), again=st.booleans())
    def run(self, data: st.DataObject, count: int, again: bool) -> None:
        """A request is admitted, or one more gets further blocks."""
        index = self.pick(data, out=False)
        if index is None:
            return
        model, requests = self.models[index], self.requests[index]
        count = min(count, model.pool.get_num_free_blocks())
        blocks = model.pool.get_new_blocks(count)
        self.fill(index, blocks)
        self.next_value += 1
        name = data.draw(st.sampled_from(sorted(requests))) if again and requests else f"r{self.next_value}"
        requests.setdefault(name, []).extend(blocks)
        model.runner.put(name, [block.block_id for block in requests[name][:40]])

    @rule(data=st.data(), hash_index=st.integers(0, 7), group=st.integers(0, 1))
    def compute_cached(self, data: st.DataObject, hash_index: int, group: int) -> None:
        """A step enters a hash, then computes the block, whose content the hash fixes."""
        index = self.pick(data, out=False)
        if index is None or not (held := self.held(index)):
            return
        model = self.models[index]
        block = data.draw(st.sampled_from(held))
        if block.block_hash is None:
            self.compute_with(index, [block])
            model.cache(block, hash_index, group)
            value = model.content(hash_index, group)
            model.write(block, value)
            self.value[id(block)] = (block, value)
            model.mark_computed()

    @rule(data=st.data(), hash_index=st.integers(0, 7), count=st.integers(0, 30))
    def preempt_before_compute(self, data: st.DataObject, hash_index: int, count: int) -> None:
        """Within one schedule a request is admitted and preempted again: its hash names bytes never computed."""
        index = self.pick(data, out=False)
        if index is None:
            return
        model = self.models[index]
        if not model.pool.get_num_free_blocks():
            return
        block = model.pool.get_new_blocks(1)[0]
        model.pool.link.precede_compute()
        model.write(block, -7)
        if model.pool.cached_block_hash_to_block.get_one_block(key_of(hash_index)) is not None:
            model.pool.free_blocks([block])
            return
        model.cache(block, hash_index)
        model.pool.free_blocks([block])
        others = model.pool.get_new_blocks(min(count, model.pool.get_num_free_blocks()))
        model.pool.free_blocks(others)
        model.pool._maybe_evict_cached_block(block)
        model.mark_computed()

    @rule(data=st.data(), hash_index=st.integers(0, 7), groups=st.sampled_from([[0], [1], [0, 1]]))
    def hit(self, data: st.DataObject, hash_index: int, groups: list[int]) -> None:
        """What the prefix cache finds, on the device or in the host tier, holds what its hash says."""
        index = self.pick(data, out=False)
        if index is None:
            return
        model = self.models[index]
        keys = [key_of(hash_index, group) for group in groups]
        stored = [model.pool.cached_block_hash_to_block.get_one_block(key) is not None for key in keys]
        blocks = model.pool.get_cached_block(HASHES[hash_index], groups)
        assert blocks or not all(stored)
        if blocks is None:
            return
        assert len(groups) == len(blocks)
        model.pool.touch(blocks)
        self.compute_with(index, blocks)
        for group, block in zip(groups, blocks, strict=True):
            assert model.content(hash_index, group) == model.read(block)
            assert 16 * (hash_index + 1) == block.block_hash_num_tokens or block.block_hash != key_of(hash_index, group)
            self.value[id(block)] = (block, model.content(hash_index, group))
        self.next_value += 1
        self.requests[index][f"r{self.next_value}"] = blocks
        model.runner.put(f"r{self.next_value}", [block.block_id for block in blocks])

    @rule(data=st.data())
    def worker_forgets(self, data: st.DataObject) -> None:
        """The next step tells the worker which requests ended."""
        index = self.pick(data, out=False)
        if index is not None:
            runner = self.models[index].runner
            for request_id in runner.requests.keys() - self.requests[index].keys():
                runner.drop(request_id)

    # -- what may happen at any time -----------------------------------------------------------------

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        index = self.pick(data)
        assert index is not None
        if self.requests[index]:
            self.end(index, data.draw(st.sampled_from(sorted(self.requests[index]))))

    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        index = self.pick(data)
        assert index is not None
        model = self.models[index]
        assert (not self.held(index)) == model.pool.reset_prefix_cache()
        if not self.held(index):
            assert not model.pool.link.stored
            assert not len(model.pool.cached_block_hash_to_block)

    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        index = self.pick(data)
        assert index is not None
        if held := self.held(index):
            block = data.draw(st.sampled_from(held))
            key = block.block_hash
            self.models[index].pool.evict_blocks({block.block_id})
            assert block.block_hash is None
            assert key not in self.models[index].pool.link.stored

    @rule(data=st.data(), count=st.integers(0, 3))
    def drop_cached(self, data: st.DataObject, count: int) -> None:
        index = self.pick(data)
        assert index is not None
        idle = self.models[index].pool.num_idle_slabs
        assert min(count, idle) == self.swapper.drop_cached(self.models[index], count)

    @rule(data=st.data(), hash_index=st.integers(0, 7), ahead=st.booleans())
    def lose_and_hit(self, data: st.DataObject, hash_index: int, ahead: bool) -> None:
        """A block is computed and freed, its slab goes, and the next request finds it again."""
        index = self.pick(data, out=False)
        if index is None or not self.models[index].pool.get_num_free_blocks():
            return
        model = self.models[index]
        if model.pool.get_cached_block(HASHES[hash_index], [0]) is None:
            self.run(data, 1, False)
            if not (held := self.held(index)) or held[-1].block_hash is not None:
                return
            model.cache(held[-1], hash_index)
            value = model.content(hash_index, 0)
            model.write(held[-1], value)
            self.value[id(held[-1])] = (held[-1], value)
            model.mark_computed()
            self.end(index, list(self.requests[index])[-1])
        if ahead:
            model.pool.link.copy_ahead()
        self.swapper.drop_cached(model, 8)
        self.hit(data, hash_index, [0])

    @rule(data=st.data())
    def copy_ahead(self, data: st.DataObject) -> None:
        """Between two steps a few free blocks are saved without a need."""
        index = self.pick(data, out=False)
        if index is not None:
            self.models[index].pool.link.copy_ahead()

    # -- out and in ----------------------------------------------------------------------------------

    @precondition(lambda self: self.device.queue)
    @rule(count=st.integers(1, 3))
    def copies_go_on(self, count: int) -> None:
        for _ in range(min(count, len(self.device.queue))):
            self.device.run_to(self.device.queue[0])
        self.swapper.poll()

    @rule(data=st.data(), aborts=st.integers(0, 2), late=st.booleans())
    def out(self, data: st.DataObject, aborts: int, late: bool) -> None:
        index = self.pick(data, out=False)
        if index is None:
            return
        model = self.models[index]
        nbytes = self.swapper.bytes_out(model)
        assert nbytes == len({id(b) for b in self.held(index)}) * model.view.block_bytes
        before = (self.swapper.counters.bytes_out, self.allocator.ledger.snapshot())
        try:
            self.swapper.begin_out(model)
        except CapacityError:
            assert before == (self.swapper.counters.bytes_out, self.allocator.ledger.snapshot())
            assert not self.swapper.is_out(model.name)
            return
        for _ in range(aborts):
            if self.requests[index]:
                self.end(index, data.draw(st.sampled_from(sorted(self.requests[index]))))
        if late:
            assert self.swapper.is_out(model.name)
            return
        self.swapper.settle(model.name)
        assert nbytes == self.swapper.counters.bytes_out - before[0]
        assert 0 == self.allocator.ledger.held(model.name, PageUse.KV) == model.pool.get_num_free_blocks()
        with pytest.raises(ValueError, match="Cannot get 1 free blocks"):
            model.pool.get_new_blocks(1)

    @precondition(lambda self: any(self.swapper.is_out(m.name) for m in self.models))
    @rule(data=st.data(), late=st.booleans())
    def into(self, data: st.DataObject, late: bool) -> None:
        index = self.pick(data, out=True)
        assert index is not None
        model = self.models[index]
        self.swapper.settle(model.name)
        assert self.swapper.bytes_out(model) == len({id(b) for b in self.held(index)}) * model.view.block_bytes
        needed = self.swapper.slabs_needed(model)
        can = max(0, self.allocator.capacity(model.name))
        ids = {id(block): block.block_id for block in self.held(index)}
        if needed > can:
            with pytest.raises(CapacityError, match=f"needs {needed} KV pages to come back"):
                self.swapper.into(model)
            assert ids == {id(block): block.block_id for block in self.held(index)}
            assert self.swapper.state(model.name) is KVState.OUT
            return
        data.draw(st.randoms(use_true_random=False)).shuffle(self.allocator.ledger._free)  # its order says nothing
        (self.swapper.begin_in if late else self.swapper.into)(model)
        assert needed >= model.pool.num_slabs - model.pool.num_idle_slabs == model.pool.num_slabs

    @rule(data=st.data(), count=st.integers(1, 14))
    def leave_for_another_and_come_back(self, data: st.DataObject, count: int) -> None:
        """Two requests, a departure while another model runs, an abort meanwhile, a return if there is memory.

        On the way back a request ends, and all free blocks are handed out before the copies have ended.
        """
        self.run(data, count, False)
        self.run(data, 3, False)
        self.out(data, 0, data.draw(st.booleans()))
        self.run(data, count, False)
        self.abort(data)
        if any(self.swapper.is_out(m.name) for m in self.models):
            self.into(data, data.draw(st.booleans()))
            for index, requests in enumerate(self.requests):
                if self.models[index].pool.transit is not None and requests:
                    self.end(index, data.draw(st.sampled_from(sorted(requests))))
            self.run(data, 100, False)
            while self.device.queue:
                self.device.run_to(self.device.queue[0])

    # -- laws ----------------------------------------------------------------------------------------

    @invariant()
    def books_agree(self) -> None:
        self.allocator.check()
        self.swapper.check()
        for index, model in enumerate(self.models):
            model.pool.check()
            assert 0 <= model.pool.get_usage() <= 1
            used = {id(block): block for block in self.held(index)}
            assert used == {id(block): block for block in model.pool.used_blocks()}
            refs = {k: sum(block is b for b in self.held(index)) for k, block in used.items()}
            assert refs == {k: block.ref_cnt for k, block in used.items()}

    @invariant()
    def blocks_keep_their_bytes(self) -> None:
        for index, model in enumerate(self.models):
            if not self.swapper.is_out(model.name):
                transit = model.pool.transit
                for block in self.held(index):
                    if transit is not None and not (transit.poll() or transit.has_arrived([block])):
                        continue
                    assert self.value[id(block)][1] == model.read(block)

    @invariant()
    def the_worker_knows_the_ids(self) -> None:
        for model, requests in zip(self.models, self.requests, strict=True):
            if not self.swapper.is_out(model.name):
                for request_id, blocks in requests.items():
                    expected = [block.block_id for block in blocks[:40]]
                    assert all(expected == ids for ids in model.runner.ids_of(request_id))

    @invariant()
    def the_tier_holds_what_its_keys_say(self) -> None:
        for model in self.models:
            assert self.swapper.tier.host.held(model.name, HostUse.CACHED_KV) >= 0
            for index in range(len(HASHES)):
                for group in (0, 1):
                    entry = model.pool.link.stored.get(key_of(index, group))
                    if entry is not None and (entry.slot.buffer.copies is None or entry.slot.buffer.copies.is_done):
                        view = entry.slot.view()
                        value = ctypes.c_int64.from_address(view.data_ptr()).value
                        assert model.content(index, group) == value, "bytes never computed were stored"
                        assert 16 * (index + 1) == entry.tag


class TestSwap(SwapMachine.TestCase):
    """Any history of steps, aborts, departures and returns keeps every book and every block's bytes."""

    settings = settings(max_examples=100, stateful_step_count=50, deadline=None, derandomize=True)


# -- single cases ------------------------------------------------------------------------------------


def test_blocks_come_back_under_other_ids_and_are_found_by_hash():
    """Objects, order, hashes and shared hashes survive; ids do not."""
    allocator = make_allocator(8)
    a, b = FakeModel(allocator, "a", PAGE // 4), FakeModel(allocator, "b", PAGE // 4)
    swapper = make_swapper(allocator, [a, b])
    blocks = a.pool.get_new_blocks(6)
    for value, block in enumerate(blocks):
        a.write(block, value + 1)
    for block in blocks[:2]:
        a.cache(block, 0)  # two blocks of one content
    a.cache(blocks[2], 1)
    a.cache(blocks[2], 2)  # one block under two hashes
    old = [block.block_id for block in blocks]
    swapper.out(a)
    assert a.pool.is_detached
    taken = b.pool.get_new_blocks(12)
    swapper.into(a)
    b.pool.free_blocks(taken)
    assert set(old).isdisjoint(block.block_id for block in blocks)
    assert [1, 2, 3, 4, 5, 6] == [a.read(block) for block in blocks]
    assert a.pool.get_cached_block(HASHES[0], [0])[0] in blocks[:2]
    assert [blocks[2]] == a.pool.get_cached_block(HASHES[1], [0]) == a.pool.get_cached_block(HASHES[2], [0])
    assert 2 == a.pool.num_slabs
    a.pool.free_blocks(blocks)
    a.pool.check()
    assert (1, 1) == (swapper.counters.outs, swapper.counters.ins)
    assert 6 * PAGE // 4 == swapper.counters.bytes_out == swapper.counters.bytes_in


def test_cached_blocks_come_back_from_the_host():
    """What a model lost from the device is found in the host tier, as often as it is lost."""
    allocator = make_allocator(5)
    a, b = FakeModel(allocator, "a", PAGE // 4), FakeModel(allocator, "b", PAGE // 4)
    swapper = make_swapper(allocator, [a, b])
    blocks = a.computed(4)
    a.pool.free_blocks(blocks)
    for _ in range(2):
        taken = b.pool.get_new_blocks(b.pool.get_num_free_blocks())
        assert 0 == a.pool.num_slabs == len(a.pool.cached_block_hash_to_block)
        assert a.pool.get_cached_block(HASHES[0], [0]) is None  # no memory for it now
        b.pool.free_blocks(taken)
        b.pool.give_back_idle(4)
        for index in range(4):
            found = a.pool.get_cached_block(HASHES[index], [0])
            assert [a.content(index, 0)] == [a.read(block) for block in found]
            assert 0 == found[0].ref_cnt
            assert found[0] is a.pool.free_block_queue.fake_free_list_tail.prev_free_block
        assert a.pool.get_cached_block(HASHES[4], [0]) is None
        a.pool.check()
    counters = swapper.tier.counters
    assert (8, 2, 4 * PAGE // 4) == (counters.hits, counters.misses, counters.cached_out_bytes)


def test_a_hit_never_evicts_what_was_found_before():
    """When all free blocks are cached ones, the host tier is not used: it would cost a block just found."""
    allocator = make_allocator(3)
    a = FakeModel(allocator, "a", PAGE // 4)
    swapper = make_swapper(allocator, [a])
    blocks = a.computed(8)
    a.pool.free_blocks(list(reversed(blocks)))
    assert a.pool.get_new_blocks(1) == blocks[7:]  # evicted, hence offered
    assert {key_of(7)} == set(a.pool.link.stored)
    assert a.pool.get_cached_block(HASHES[7], [0]) is None
    assert [[block] for block in blocks[:7]] == [a.pool.get_cached_block(HASHES[i], [0]) for i in range(7)]
    a.pool.free_blocks(blocks[7:])
    (found,) = a.pool.get_cached_block(HASHES[7], [0])
    assert a.content(7, 0) == a.read(found)
    swapper.check()


def test_blocks_said_to_be_wrong_are_wrong_on_the_host_too():
    """Evicting a block because its bytes are not valid forgets the copy that was made of it."""
    allocator = make_allocator(4)
    a = FakeModel(allocator, "a", PAGE // 4)
    swapper = make_swapper(allocator, [a])
    blocks = a.pool.get_new_blocks(1)
    a.cache(blocks[0], 0)
    a.mark_computed()
    a.pool.free_blocks(blocks)
    a.pool.give_back_idle(1)
    (found,) = a.pool.get_cached_block(HASHES[0], [0])
    a.pool.evict_blocks({found.block_id})
    assert a.pool.get_cached_block(HASHES[0], [0]) is None
    swapper.check()


def test_a_block_of_an_aborted_request_stays_cached_on_the_host():
    """Its request ends while the model is out: the next request with the same prefix still finds it."""
    allocator = make_allocator(4)
    a = FakeModel(allocator, "a", PAGE // 4)
    swapper = make_swapper(allocator, [a])
    first, second = a.pool.get_new_blocks(1), a.pool.get_new_blocks(2)
    a.cache(first[0], 3)
    a.write(first[0], a.content(3, 0))
    swapper.out(a)
    a.pool.free_blocks(first)
    assert PAGE // 2 == swapper.bytes_out(a)
    swapper.into(a)
    assert 2 == swapper.counters.blocks_in
    found = a.pool.get_cached_block(HASHES[3], [0])
    assert a.content(3, 0) == a.read(found[0])
    a.pool.free_blocks(second)
    swapper.check()


def test_a_model_can_be_removed_while_it_is_out():
    """Nothing of it stays in host memory, nor in the allocator's books."""
    allocator = make_allocator(4)
    a = FakeModel(allocator, "a", PAGE // 4, floor=1)
    swapper = make_swapper(allocator, [a])
    blocks = a.pool.get_new_blocks(3)
    a.cache(blocks[0], 0)
    swapper.out(a)
    a.pool.free_blocks(blocks[:1])
    assert swapper.tier.host.free_bytes < swapper.tier.host.budget_bytes
    swapper.forget("a")
    a.pool.free_blocks(blocks[1:])
    allocator.unregister("a")
    assert swapper.tier.host.free_bytes == swapper.tier.host.budget_bytes
    assert not swapper.is_out("a")
    swapper.check()
    allocator.check()


def test_a_full_host_keeps_the_model_on_the_device():
    """All or nothing: without host memory for every used block, no block moves."""
    allocator = make_allocator(4)
    a = FakeModel(allocator, "a", PAGE // 4)
    swapper = make_swapper(allocator, [a], budget=PAGE)
    blocks = a.pool.get_new_blocks(5)
    with pytest.raises(CapacityError, match="raise host_memory"):
        swapper.out(a)
    assert 1 == swapper.counters.refusals
    assert not swapper.is_out("a") and 2 == a.pool.num_slabs
    a.pool.free_blocks(blocks[:1])
    swapper.out(a)
    assert PAGE == swapper.tier.host.total(HostUse.PAUSED_KV)


def test_readers_hear_that_blocks_move():
    """Whoever reads unpinned blocks by id is told before their bytes go."""
    allocator = make_allocator(4)
    a = FakeModel(allocator, "a", PAGE // 4)
    swapper = make_swapper(allocator, [a])
    blocks = a.pool.get_new_blocks(3)
    a.pool.touch(blocks[:1])
    if not hasattr(a.pool, "_notify_reuse"):
        pytest.skip("this vLLM has no readers of unpinned blocks")
    heard: list[int] = []
    a.pool.unpin_blocks(blocks[:2], lambda block: heard.append(id(block)))
    swapper.out(a)
    assert {id(blocks[0]), id(blocks[1])} == set(heard)
    a.pool.unpin_blocks(blocks[2:], lambda block: heard.append(id(block)))
    assert id(blocks[2]) == heard[-1]
    assert 1 == a.pool.num_used_blocks
    swapper.into(a)
    a.pool.check()


def test_residency_metrics_follow_the_blocks():
    """Sampled lifetimes are kept under the new ids and end when their block does."""
    allocator = make_allocator(6)
    a, b = FakeModel(allocator, "a", PAGE // 4), FakeModel(allocator, "b", PAGE // 4)
    a.pool.metrics_collector = metrics = KVCacheMetricsCollector(1.0)
    swapper = make_swapper(allocator, [a, b])
    blocks = a.pool.get_new_blocks(5)
    states = [metrics.block_metrics[block.block_id] for block in blocks]
    swapper.out(a)
    b.pool.get_new_blocks(9)
    a.pool.free_blocks(blocks[:1])
    swapper.into(a)
    assert states[1:] == [metrics.block_metrics[block.block_id] for block in blocks[1:]]
    assert 4 == len(metrics.block_metrics)


def test_without_a_tier_cached_blocks_are_forgotten():
    """A pool that was given no tier behaves as before: nothing is stored, nothing found."""
    allocator = make_allocator(4)
    a = FakeModel(allocator, "a", PAGE // 4)
    blocks = a.pool.get_new_blocks(2)
    a.cache(blocks[0], 0)
    a.pool.free_blocks(blocks)
    assert [] == a.pool.detach()
    assert (0, 0) == (a.pool.slabs_needed(), len(a.pool.attach().old))
    assert a.pool.get_cached_block(HASHES[0], [0]) is None
    a.pool.check()


@given(
    pairs=st.dictionaries(st.integers(1, 60), st.integers(1, 10**6), max_size=20),
    ids=st.lists(st.integers(0, 70), max_size=40),
    split=st.integers(1, 3),
)
def test_translation_equals_a_dict(pairs, ids, split):
    """Known ids become their new ones, all others the null block; kernel blocks keep their place in the block."""
    old = sorted(pairs)
    id_map = IdMap(np.array(old, np.int64), np.array([pairs[i] for i in old], np.int64))
    kernel_ids = np.array([i * split + i % split for i in ids], np.int32)
    expected = [pairs.get(i, 0) * split + i % split for i in ids]
    assert expected == id_map.translate(kernel_ids, split).tolist()
