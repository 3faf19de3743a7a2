# SPDX-License-Identifier: Apache-2.0
"""Cached blocks on their way to the host and back: when they are saved, how many at once, and that nobody waits."""

from __future__ import annotations

import pytest

from tests.helpers.devices.late_device import LateDevice
from tests.helpers.swapping import HASHES, PAGE, FakeModel, key_of, make_allocator, make_swapper

pytestmark = pytest.mark.vllm


def test_a_block_is_saved_once_the_step_that_computes_it_is_done():
    """With a step ahead there is always one under way: what an earlier one computed is saved all the same."""
    allocator = make_allocator(4)
    a = FakeModel(allocator, "a", PAGE // 4)
    make_swapper(allocator, [a])
    link, blocks, steps = a.pool.link, a.pool.get_new_blocks(3), [object() for _ in range(4)]
    for index, block in enumerate(blocks):
        a.cache(block, index)
        a.write(block, a.content(index, 0))
        link.step_scheduled(steps[index])
    link.step_scheduled(steps[3])  # computes nothing, and has no output
    link.step_computed(steps[1])
    link.offer(blocks)
    assert {key_of(0), key_of(1)} == set(link.stored)
    link.step_computed(steps[0])  # known already
    link.offer(blocks)
    assert 2 == len(link.stored)
    link.step_computed(steps[3])
    link.offer(blocks)
    assert 3 == len(link.stored)


def test_free_blocks_are_saved_ahead_only_where_something_may_be_lost():
    """A model that is alone with free pages copies nothing; beside another, or with few pages, a few at a time."""
    allocator = make_allocator(8, LateDevice(chance=0.0))
    device = allocator.arena.device
    a = FakeModel(allocator, "a", PAGE // 4)
    swapper = make_swapper(allocator, [a])
    device.burst_bytes = 4 * 2 * PAGE // 4  # two blocks at a time
    blocks = a.computed(6)
    a.pool.free_blocks(blocks)
    swapper.copy_ahead()
    assert not device.queue and not swapper.has_unsaved
    b = FakeModel(allocator, "b", PAGE // 4)
    swapper.add(b)
    for saved in (2, 4, 6):
        assert swapper.has_unsaved
        swapper.copy_ahead()
        swapper.copy_ahead()  # the link is busy
        assert (1, saved) == (len(device.queue), len(a.pool.link.stored))
        device.run_to(device.queue[0])
    assert not swapper.has_unsaved
    waits = device.waits
    taken = a.pool.get_new_blocks(a.pool.get_num_free_blocks())
    a.pool.link.precede_compute()
    assert (waits, 0) == (device.waits, len(device.queue)), "what was saved ahead is not copied again"
    a.pool.free_blocks(taken)


def test_no_more_is_saved_at_once_than_the_link_takes_in_a_moment():
    """Of the blocks that a model loses when it leaves, the youngest go to the host."""
    allocator = make_allocator(8, LateDevice(chance=0.0))
    device = allocator.arena.device
    a = FakeModel(allocator, "a", PAGE // 4)
    swapper = make_swapper(allocator, [a])
    device.burst_bytes = 3 * PAGE // 4
    blocks = a.computed(6)
    a.pool.free_blocks(blocks)
    swapper.out(a)
    assert {key_of(3), key_of(4), key_of(5)} == set(a.pool.link.stored)
    assert 3 == swapper.tier.counters.refusals
    swapper.check()


@pytest.mark.parametrize("arrives_last", [True, False])
def test_a_step_comes_after_all_that_it_relies_on(arrives_last):
    """Whatever was begun first: a hit on its way in, or a block on its way out that is overwritten."""
    allocator = make_allocator(8, LateDevice(chance=0.0))
    device = allocator.arena.device
    a = FakeModel(allocator, "a", PAGE)
    make_swapper(allocator, [a])
    blocks = a.computed(2)
    a.pool.free_blocks(blocks[:1])
    a.pool.give_back_idle(1)  # which puts the first on the host
    while device.queue:
        device.run_to(device.queue[0])
    a.pool.free_blocks(blocks[1:])

    def hit() -> None:
        assert a.pool.get_cached_block(HASHES[0], [0])

    steps = [a.pool.link.copy_ahead, hit]
    for step in steps if arrives_last else reversed(steps):
        step()
    assert 2 == len(device.queue)
    taken = a.pool.get_new_blocks(a.pool.get_num_free_blocks() - 1)
    assert blocks[1] in taken
    a.pool.link.precede_compute()
    assert not device.queue
