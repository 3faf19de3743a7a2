# SPDX-License-Identifier: Apache-2.0
"""Weights that move: whatever is done to them, the bytes are right, aliases stay aliases and the books agree."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.devices.weight_rig import CHUNK, LIMIT_S, PAGE, Rig, big_tensors, bytes_of, random_tensors
from tokenpool.errors import CapacityError, SwitchError
from tokenpool.memory.host_ledger import HostUse
from tokenpool.memory.ledger import PageUse
from tokenpool.memory.states import WeightState
from tokenpool.memory.weight_layout import ALIGN_BYTES, WeightLayout

pytestmark = pytest.mark.cpu

WARM, LOADING, RESIDENT = WeightState.IN_HOST, WeightState.COPYING, WeightState.ON_DEVICE


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.store.close()
    rig.assert_empty()


def shapes_of(tensors: list[torch.Tensor]) -> list[tuple]:
    return [(type(t), t.dtype, t.shape, t.stride(), t.storage_offset()) for t in tensors]


def aliases_of(tensors: list[torch.Tensor]) -> list[list[int]]:
    """Which tensors share a storage."""
    groups: dict[int, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.untyped_storage().nbytes():
            groups.setdefault(tensor.untyped_storage().data_ptr(), []).append(index)
    return sorted(groups.values())


# -- layout ------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_storages_lie_apart_and_aligned(seed):
    """No two storages share a byte, each starts at a multiple of 256, and each byte of a tensor has a place."""
    tensors = random_tensors(seed)
    layout = WeightLayout(tensors)
    end = 0
    for span in layout.spans:
        assert 0 == span.offset % ALIGN_BYTES
        assert span.offset >= end
        end = span.offset + span.nbytes
        assert all(m.tensor.untyped_storage().nbytes() == span.nbytes for m in span.members)
    assert end == layout.nbytes
    expected = {id(t) for t in tensors if t.untyped_storage().nbytes()}
    assert expected == {id(m.tensor) for span in layout.spans for m in span.members}


def test_tensors_that_have_no_bytes_of_their_own_are_refused():
    """A meta tensor or a sparse one cannot be moved, nor can storages that overlap."""
    with pytest.raises(ValueError, match="no bytes"):
        WeightLayout([torch.empty(3, device="meta")])
    with pytest.raises(ValueError, match="no bytes"):
        WeightLayout([torch.eye(3).to_sparse()])
    base = bytearray(64)
    one, other = torch.frombuffer(base, dtype=torch.uint8), torch.frombuffer(base, dtype=torch.uint8, offset=8)
    assert one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()
    with pytest.raises(ValueError, match="overlap"):
        WeightLayout([one, other])


# -- adoption ----------------------------------------------------------------------------------------


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_adoption_changes_only_where_tensors_lie(seed):
    """Bytes, shapes, strides, dtypes and aliases stay; every tensor lies in the owner's range afterwards."""
    rig = Rig()
    tensors = random_tensors(seed)
    bytes_before, shapes_before, aliases_before = bytes_of(tensors), shapes_of(tensors), aliases_of(tensors)
    entry = rig.store.adopt("a", tensors)
    try:
        rig.check()
        assert bytes_before == bytes_of(tensors)
        assert shapes_before == shapes_of(tensors)
        assert aliases_before == aliases_of(tensors)
        low, high = entry.range.address, entry.range.address + entry.nbytes
        assert all(low <= t.data_ptr() < high for t in tensors if t.numel())
        assert rig.store.pages_of("a") == rig.ledger.held("a", PageUse.WEIGHTS) == -(-entry.nbytes // PAGE)
        assert rig.store.bytes_of("a") == rig.host.held("a", HostUse.WEIGHTS)
        assert RESIDENT is rig.store.state("a")
    finally:
        rig.store.close()
    rig.assert_empty()


def test_writing_through_one_alias_shows_in_the_other(rig):
    """Tied weights stay tied: they are one storage in the range."""
    table = torch.zeros(8, 4)
    head, tail = torch.nn.Parameter(table, requires_grad=False), table[4:]
    rig.store.adopt("a", [head, tail])
    tail.fill_(3.0)
    assert 3.0 == head[7, 3].item()
    tail.zero_()


@pytest.mark.parametrize("call", ["reserve", "map_later", "host_buffer", "copy_in"])
def test_a_failed_adoption_leaves_no_trace(rig, call):
    """Whichever device call fails, the tensors are where they were and nothing is held."""
    tensors = big_tensors(3)
    places, values = [t.data_ptr() for t in tensors], bytes_of(tensors)
    rig.device.allowed = {call: int(call == "copy_in")}
    with pytest.raises((OSError, SwitchError), match="failed"):
        rig.store.adopt("a", tensors)
    assert places == [t.data_ptr() for t in tensors]
    assert values == bytes_of(tensors)
    assert "a" not in rig.store
    rig.assert_empty()
    rig.device.allowed = {}
    rig.store.adopt("a", tensors)
    assert values == bytes_of(tensors)


@pytest.mark.parametrize("fails", [False, True])
def test_weights_are_not_on_the_device_twice(fails):
    """When pages are taken the loader's memory is gone already; a failure then holds nothing either."""
    rig, seen = Rig(pages=3), []
    loaded = [np.arange(PAGE // 8, dtype=np.int64) + i for i in range(3)]
    tensors = [torch.nn.Parameter(torch.from_numpy(array), requires_grad=False) for array in loaded]
    alive, values = [weakref.ref(array) for array in loaded], bytes_of(tensors)
    del loaded

    def give_up() -> None:
        seen.append((rig.ledger.num_free, [ref() for ref in alive]))
        rig.device.allowed = {"map_later": 0} if fails else {}

    if fails:
        with pytest.raises(SwitchError, match="map_later failed"):
            rig.store.adopt("a", tensors, give_up=give_up)
    else:
        rig.store.adopt("a", tensors, give_up=give_up)
        assert values == bytes_of(tensors)
        rig.check()
        rig.store.remove("a")
    assert [(3, [None] * 3)] == seen
    rig.assert_empty()


def test_adoption_without_room_leaves_no_trace():
    """Too few pages, or too little host memory, is a CapacityError; tensors stay usable."""
    for rig in (Rig(pages=2), Rig(host_bytes=2 * PAGE)):
        tensors = big_tensors(3)
        with pytest.raises(CapacityError):
            rig.store.adopt("a", tensors)
        assert tensors[0][7].item() == 7
        rig.assert_empty()
        rig.store.close()


def test_adoption_asks_for_room_first(rig):
    """The host can free pages of others before they are taken."""
    ballast = rig.ledger.take("kv", PageUse.KV, 63)
    rig.store.make_room = lambda pages: rig.ledger.give("kv", PageUse.KV, [ballast.pop() for _ in range(pages)])
    rig.store.adopt("a", big_tensors(3))
    assert 60 == rig.ledger.held("kv", PageUse.KV)
    rig.ledger.give("kv", PageUse.KV, ballast)


def test_who_frees_too_few_pages_says_for_which_weights(rig):
    """The model and the size of its weights, which its checkpoint may not tell."""

    def make_room(pages: int) -> None:
        raise CapacityError(f"{pages} more pages are needed: raise device_memory", needed_pages=pages, free_pages=0)

    rig.store.make_room = make_room
    problem = (
        rf"the weights of model 'a' take 3 pages of {PAGE} bytes on the device: 3 more pages .* raise device_memory"
    )
    with pytest.raises(CapacityError, match=problem) as caught:
        rig.store.adopt("a", big_tensors(3))
    assert (3, 0) == (caught.value.needed_pages, caught.value.free_pages)
    rig.assert_empty()


def test_a_model_without_tensors_takes_nothing(rig):
    """No page, no byte, no range; all moves work."""
    rig.store.adopt("a", [torch.empty(0)], lambda advance, on_final: None, verify_reload=True)
    rig.store.evict("a")
    rig.load("a")
    rig.store.evict("a")
    rig.store.drop_host("a")
    assert rig.store.load_host("a").wait(LIMIT_S)
    rig.store.finish("a")
    rig.check()
    assert (0, 0) == (rig.store.pages_of("a"), rig.store.bytes_of("a"))


# -- moving ------------------------------------------------------------------------------------------


def test_eviction_frees_the_pages_and_copies_nothing(rig):
    """Weights go without a byte copied and come back from host memory: nothing ever goes to it."""
    tensors = big_tensors(5)
    values = bytes_of(tensors)
    place = tensors[0].data_ptr()
    rig.store.adopt("a", tensors)
    assert place != tensors[0].data_ptr()
    place, adopted = tensors[0].data_ptr(), rig.store.device.bytes_to_device
    rig.store.evict("a")
    assert (WARM, 64) == (rig.store.state("a"), rig.ledger.num_free)
    assert adopted == rig.store.device.bytes_to_device
    rig.load("a")
    assert (place, values) == (tensors[0].data_ptr(), bytes_of(tensors))
    assert adopted + rig.store.bytes_of("a") == rig.store.device.bytes_to_device
    assert 0 == rig.store.device.bytes_to_host
    assert 1 == rig.store.snapshot()["a"].loads


def test_mapping_needs_free_pages(rig):
    """Nobody's pages are taken for it: the host frees them first."""
    rig.store.adopt("a", big_tensors(5))
    rig.store.evict("a")
    ballast = rig.ledger.take("kv", PageUse.KV, 60)
    with pytest.raises(CapacityError):
        rig.store.map("a")
    assert WARM is rig.store.state("a")
    rig.check()
    rig.ledger.give("kv", PageUse.KV, ballast)
    rig.load("a")


def test_a_device_that_gives_no_memory_leaves_the_model_warm(rig):
    """Nothing is mapped, the pages are given back, and the next attempt works."""
    values = bytes_of(tensors := big_tensors(5))
    rig.store.adopt("a", tensors)
    rig.store.evict("a")
    rig.device.allowed = {"map_later": 0}
    with pytest.raises(SwitchError, match="'a': map failed: the device gives no memory"):
        rig.store.map("a")
    rig.check()
    assert (WARM, 64) == (rig.store.state("a"), rig.ledger.num_free)
    rig.device.allowed = {}
    rig.load("a")
    assert values == bytes_of(tensors)


def test_a_copy_that_fails_in_the_middle_can_be_repeated_or_given_up(rig):
    """finish says so in one line; the weights stay LOADING, and both ways on are open."""
    values = bytes_of(tensors := big_tensors(5))
    rig.store.adopt("a", tensors)
    rig.store.evict("a")
    rig.store.map("a")
    rig.device.allowed = {"copy_in": 7}
    job = rig.store.copy("a")
    assert job.wait(LIMIT_S)
    assert 7 * CHUNK == job.progress
    with pytest.raises(SwitchError, match="'a': copy failed: OSError: copy_in failed") as caught:
        rig.store.finish("a")
    assert ("copy", "a") == (caught.value.phase, caught.value.model)
    assert LOADING is rig.store.state("a")
    rig.check()
    rig.device.allowed = {}
    assert rig.store.copy("a").wait(LIMIT_S)
    rig.store.finish("a")
    assert values == bytes_of(tensors)


def test_eviction_cancels_a_copy_within_a_chunk(rig):
    """An evicted model's copy stops; no byte is written after its pages are gone."""
    values = bytes_of(tensors := big_tensors(40))
    rig.store.adopt("a", tensors)
    rig.store.evict("a")
    reached, go_on = threading.Event(), threading.Event()

    def before_copy() -> None:
        if job_of_a().progress >= 3 * CHUNK:
            reached.set()
            assert go_on.wait(LIMIT_S)

    def job_of_a():
        while (job := rig.store.job("a")) is None:
            pass
        return job

    rig.device.before_copy = before_copy
    rig.store.map("a")
    job = rig.store.copy("a")
    assert reached.wait(LIMIT_S)
    assert 3 * CHUNK == rig.store.snapshot()["a"].job_bytes
    rig.device.before_copy = lambda: None
    threading.Timer(0.01, go_on.set).start()
    rig.store.evict("a")
    assert (True, 4 * CHUNK) == (job.cancelled, job.progress)
    assert (WARM, None, 64) == (rig.store.state("a"), rig.store.job("a"), rig.ledger.num_free)
    rig.check()
    rig.load("a")
    assert values == bytes_of(tensors)


def test_a_tensor_that_changes_is_found_when_it_is_evicted(rig):
    """With poison on, eviction compares: a tensor that the model writes to must not be movable."""
    tensors = big_tensors(2)
    rig.store.adopt("a", tensors)
    tensors[0][123] = 9
    with pytest.raises(SwitchError, match="torch.int64 has changed"):
        rig.store.evict("a")
    assert RESIDENT is rig.store.state("a")
    rig.check()
    tensors[0][123] = 123
    rig.store.evict("a")


def test_illegal_moves_are_refused(rig):
    """A state that a move does not start from is our own bug, and stops before anything happens."""
    rig.store.adopt("a", big_tensors(1))
    for move in (rig.store.map, rig.store.copy, rig.store.drop_host, rig.store.load_host, rig.store.finish):
        with pytest.raises(AssertionError):
            move("a")
    rig.store.evict("a")
    for move in (rig.store.evict, rig.store.copy, rig.store.load_host, rig.store.finish, rig.store.verify):
        with pytest.raises(AssertionError):
            move("a")
    rig.check()


def test_owners_are_listed_least_recently_used_first(rig):
    """The host tier drops from the front."""
    for owner in "abc":
        rig.store.adopt(owner, big_tensors(1))
    rig.store.touch("a")
    assert ["b", "c", "a"] == rig.store.owners == list(rig.store.snapshot())
