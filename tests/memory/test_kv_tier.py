# SPDX-License-Identifier: Apache-2.0
"""The host tier: images come back bit by bit, cached blocks are found by model and key, every byte is accounted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tokenpool.errors import CapacityError
from tokenpool.memory.devices.cpu import CpuDevice
from tokenpool.memory.host_ledger import HostLedger, HostUse
from tokenpool.memory.kv_tier import HostKVTier

pytestmark = pytest.mark.cpu

SIZES = (512, 768)
"""Block sizes of the models a and b; c shares a's."""
BLOCK_BYTES = {"a": SIZES[0], "b": SIZES[1], "c": SIZES[0]}
NUM_BLOCKS = 12
SPAN = 64 << 10
KEYS = [bytes([n]) * 4 for n in range(6)]


class Region:
    """Mapped device memory, one area per model, each block of which can be given a value."""

    def __init__(self) -> None:
        self.device = CpuDevice()
        self.base = self.device.reserve(len(BLOCK_BYTES) * SPAN)
        self.device.map_zeroed(self.base, len(BLOCK_BYTES) * SPAN)

    def address(self, model: str, block: int) -> int:
        return self.base + sorted(BLOCK_BYTES).index(model) * SPAN + block * BLOCK_BYTES[model]

    def fill(self, model: str, block: int, value: int) -> None:
        self.device.fill(self.address(model, block), BLOCK_BYTES[model], value)

    def value(self, model: str, block: int) -> int:
        found = self.device.tensor(self.address(model, block), BLOCK_BYTES[model]).unique().tolist()
        assert len(found) == 1, "a block holds bytes of two"
        return found[0] % 256

    def close(self) -> None:
        self.device.release(self.base, len(BLOCK_BYTES) * SPAN)


class TierMachine(RuleBasedStateMachine):
    """Images and cached blocks of three models against plain dicts of values, in 16 KiB of host memory."""

    @initialize(budget=st.integers(2000, 16000), buffer=st.sampled_from([512, 2048, 8192]), spare=st.integers(0, 3000))
    def start(self, budget: int, buffer: int, spare: int) -> None:
        self.region = Region()
        self.host = HostLedger(budget)
        self.tier = HostKVTier(self.host, self.region.device, buffer_bytes=buffer, spare_bytes=spare)
        self.host.make_room = self.tier.drop_cached
        self.images: list[tuple[object, dict[int, int]]] = []  # image, slot -> value
        self.cached: dict[tuple[str, bytes], tuple[int, int]] = {}  # value and tag; the tier may have dropped it
        self.weights = 0
        self.next_value = 1

    def teardown(self) -> None:
        if hasattr(self, "region"):
            self.region.close()

    def new_value(self) -> int:
        self.next_value = self.next_value % 255 + 1
        return self.next_value

    @rule(model=st.sampled_from("abc"), data=st.data())
    def save(self, model: str, data: st.DataObject) -> None:
        blocks = sorted(data.draw(st.sets(st.integers(0, NUM_BLOCKS - 1), max_size=8)))
        before = self.host.total(HostUse.PAUSED_KV)
        try:
            image = self.tier.new_image(model, BLOCK_BYTES[model], len(blocks))
        except CapacityError:
            cached = self.host.total(HostUse.CACHED_KV)
            need = len(blocks) * BLOCK_BYTES[model]
            assert need > self.host.free_bytes
            assert cached == 0, "cached blocks were kept although requests had to be refused"
            assert before >= self.host.total(HostUse.PAUSED_KV)
            return
        values = {}
        for slot, block in enumerate(blocks):
            values[slot] = self.new_value()
            self.region.fill(model, block, values[slot])
        self.tier.begin_copy_out(image, [self.region.address(model, block) for block in blocks]).wait()
        self.images.append((image, values))

    @precondition(lambda self: self.images)
    @rule(data=st.data())
    def drop_one(self, data: st.DataObject) -> None:
        image, values = data.draw(st.sampled_from(self.images))
        if values:
            slot = data.draw(st.sampled_from(sorted(values)))
            value = values.pop(slot)
            if data.draw(st.booleans()):
                key = data.draw(st.sampled_from(KEYS))
                known = key in self.tier.entries_of(image.model)
                if self.tier.offer_from_image(image, slot, key, value) and not known:
                    self.cached[image.model, key] = (value, value)
            self.tier.drop_block(image, slot)

    @precondition(lambda self: self.images)
    @rule(data=st.data())
    def bring_back(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.images) - 1))
        image, values = self.images.pop(index)
        places = data.draw(st.permutations(range(NUM_BLOCKS)))
        addresses = [self.region.address(image.model, place) for place in places[: len(image.slots)]]
        addresses = {slot: a for slot, a in enumerate(addresses) if slot in values}
        self.tier.begin_copy_in(image, addresses).wait()
        assert values == {slot: self.region.value(image.model, places[slot]) for slot in values}
        self.tier.free_image(image)

    @rule(model=st.sampled_from("abc"), key=st.sampled_from(KEYS))
    def offer(self, model: str, key: bytes) -> None:
        value = self.new_value()
        self.region.fill(model, 0, value)
        known = key in self.tier.entries_of(model)
        taken = self.tier.offer(model, key, value, self.region.address(model, 0), BLOCK_BYTES[model])
        assert taken == (key in self.tier.entries_of(model))
        if taken and not known:
            self.cached[model, key] = (value, value)

    @rule(model=st.sampled_from("abc"), key=st.sampled_from(KEYS))
    def load(self, model: str, key: bytes) -> None:
        if key in self.tier.entries_of(model):
            value, tag = self.cached[model, key]
            assert tag == self.tier.load(model, key, self.region.address(model, 1))
            assert value == self.region.value(model, 1)

    @rule(model=st.sampled_from("abc"), key=st.sampled_from(KEYS))
    def discard(self, model: str, key: bytes) -> None:
        self.tier.discard(model, key)
        assert key not in self.tier.entries_of(model)

    @rule(model=st.sampled_from("abc"))
    def forget(self, model: str) -> None:
        self.tier.forget(model)
        assert not self.tier.entries_of(model)

    @rule(nbytes=st.integers(1, 8000))
    def take_weights(self, nbytes: int) -> None:
        """Weights get what cached blocks hold, and never what paused requests hold."""
        paused = self.host.total(HostUse.PAUSED_KV)
        try:
            self.host.take("w", HostUse.WEIGHTS, nbytes)
        except CapacityError:
            assert 0 == self.host.total(HostUse.CACHED_KV)
        else:
            self.weights += nbytes
        assert all(self.tier.entries_of(model) is self.tier.entries_of(model) for model in "abc")
        assert paused >= self.host.total(HostUse.PAUSED_KV)

    @precondition(lambda self: self.weights)
    @rule()
    def give_weights(self) -> None:
        self.host.give("w", HostUse.WEIGHTS, self.weights)
        self.weights = 0

    @invariant()
    def books_agree(self) -> None:
        self.tier.check()
        for model in "abc":
            held = sum(len(values) for image, values in self.images if image.model == model)
            assert held * BLOCK_BYTES[model] == self.host.held(model, HostUse.PAUSED_KV)
            cached = len(self.tier.entries_of(model))
            assert cached * BLOCK_BYTES[model] == self.host.held(model, HostUse.CACHED_KV)


class TestTier(TierMachine.TestCase):
    """Any history keeps the books and the bytes."""

    settings = settings(max_examples=120, stateful_step_count=40, deadline=None, derandomize=True)


@pytest.fixture
def region():
    region = Region()
    yield region
    region.close()


def make_tier(region: Region, budget: int, **options: int) -> HostKVTier:
    host = HostLedger(budget)
    tier = HostKVTier(host, region.device, **options)
    host.make_room = tier.drop_cached
    return tier


def test_neighbours_go_in_one_copy(region):
    """A run of blocks is one copy out, and one copy in where it comes back as a run."""
    tier = make_tier(region, 1 << 20)
    image = tier.new_image("a", 512, 8)
    tier.begin_copy_out(image, [region.address("a", block) for block in (0, 1, 2, 3, 6, 7, 9, 10)]).wait()
    assert 3 == tier.counters.copies
    tier.begin_copy_in(image, {i: region.address("a", i + 2) for i in range(8)}).wait()
    assert 4 == tier.counters.copies
    assert (8 * 512, 8 * 512) == (tier.counters.paused_out_bytes, tier.counters.paused_in_bytes)


def test_models_never_hit_each_other(region):
    """One key of two models names two blocks."""
    tier = make_tier(region, 1 << 20)
    region.fill("a", 0, 7)
    assert tier.offer("a", KEYS[0], None, region.address("a", 0), 512)
    assert KEYS[0] in tier.entries_of("a")
    assert KEYS[0] not in tier.entries_of("c")
    tier.forget("c")
    assert KEYS[0] in tier.entries_of("a")


def test_the_least_recently_used_block_goes_first(region):
    """A full tier drops what was not used for longest, and a hit counts as a use."""
    tier = make_tier(region, 4 * 512)
    for key in KEYS[:4]:
        tier.offer("a", key, None, region.address("a", 0), 512)
    tier.load("a", KEYS[0], region.address("a", 1))
    tier.offer("a", KEYS[4], None, region.address("a", 0), 512)
    assert [KEYS[0], KEYS[2], KEYS[3], KEYS[4]] == sorted(tier.entries_of("a"))
    assert 1 == tier.counters.evictions


def test_cached_blocks_give_way_to_paused_requests(region):
    """An image gets the memory of cached blocks of any size, also without the ledger's hook."""
    tier = HostKVTier(HostLedger(4096), region.device, buffer_bytes=1024)
    for key in KEYS[:4]:
        assert tier.offer("b", key, None, region.address("b", 0), 768)
    image = tier.new_image("a", 512, 8)
    assert 0 == len(tier.entries_of("b"))
    assert not tier.offer("b", KEYS[0], None, region.address("b", 0), 768)
    assert 1 == tier.counters.refusals
    with pytest.raises(CapacityError, match="'free kv slots' needs 512 bytes of host memory for paused_kv"):
        tier.new_image("a", 512, 1)
    tier.free_image(image)
    assert 4096 == tier.host.free_bytes
    tier.check()


def test_little_is_lost_when_a_little_is_needed(region):
    """Cached blocks go by whole buffers: these are small where the budget is."""
    tier, block = make_tier(region, 8 << 20), SIZES[0]
    keys = [str(number).encode() for number in range(tier.host.budget_bytes // block)]
    assert all(tier.offer("a", key, None, region.address("a", 0), block) for key in keys)
    tier.host.take("w", HostUse.WEIGHTS, block)

    assert 0 < len(keys) - len(tier.entries_of("a")) <= (1 << 20) / block
    assert keys[-1] in tier.entries_of("a")
    tier.check()


def test_empty_buffers_are_kept_up_to_the_spare(region):
    """The next image uses the memory of the last one; cached blocks' memory and pressure take it away."""
    tier = make_tier(region, 8192, spare_bytes=4096)
    tier.free_image(tier.new_image("a", 512, 8))
    assert 4096 == tier.host.free_bytes
    image = tier.new_image("a", 512, 6)
    assert 4096 == tier.host.free_bytes
    tier.free_image(image)
    tier.host.take("w", HostUse.WEIGHTS, 8192)
    assert 0 == tier.host.total(HostUse.PAUSED_KV)
    tier.check()


def test_a_device_without_memory_leaves_the_books_right(region, monkeypatch):
    """When the machine has less than the budget says, the error passes and nothing is accounted."""
    tier = make_tier(region, 1 << 20, buffer_bytes=1024)
    allocate, calls = region.device.host_buffer, []

    def host_buffer(nbytes: int):
        calls.append(nbytes)
        if len(calls) == 2:
            raise MemoryError
        return allocate(nbytes)

    monkeypatch.setattr(region.device, "host_buffer", host_buffer)
    with pytest.raises(MemoryError):
        tier.new_image("a", 512, 5)
    assert 1 << 20 == tier.host.free_bytes
    tier.check()


def test_snapshot_names_what_is_held(region):
    """State and metrics get plain values."""
    tier = make_tier(region, 1 << 20, buffer_bytes=4096)
    tier.offer("a", KEYS[0], None, region.address("a", 0), 512)
    snapshot = tier.snapshot()
    assert ({"a": 1}, 4096, 512) == tuple(snapshot[k] for k in ("cached_blocks", "cached_bytes", "cached_out_bytes"))


def test_cached_blocks_go_from_one_tier_to_another(region):
    source, target = make_tier(region, 4096), make_tier(region, 512)
    for block, key in enumerate(KEYS[:2]):
        region.fill("a", block, 7 + block)
        source.offer("a", key, block, region.address("a", block), SIZES[0])
    taken = list(source.read("a", KEYS[:3]))
    assert [(key, tag, set(data)) for key, tag, data in taken] == [(KEYS[0], 0, {7}), (KEYS[1], 1, {8})]
    for key, tag, data in taken:  # there is room for one: the second takes the place of the first
        assert target.put("a", key, tag, torch.frombuffer(bytearray(data), dtype=torch.uint8))
    assert list(target.entries_of("a")) == [KEYS[1]]
    assert target.load("a", KEYS[1], region.address("a", 5)) == 1
    assert region.value("a", 5) == 8
    target.check()
    nothing = make_tier(region, 0)
    assert not nothing.put("a", KEYS[0], None, torch.zeros(SIZES[0], dtype=torch.uint8))
