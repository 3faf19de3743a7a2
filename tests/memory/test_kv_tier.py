# SPDX-License-Identifier: Apache-2.0
"""The host tier: images come back bit by bit, cached blocks are found by model and key, every byte is accounted."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.helpers.devices.late_device import LateDevice
from tokenpool.errors import CapacityError
from tokenpool.memory.devices.cpu import CpuDevice
from tokenpool.memory.host_ledger import HostLedger, HostUse
from tokenpool.memory.kv_blocks import OfferedBlock
from tokenpool.memory.kv_tier import HostKVTier

pytestmark = pytest.mark.cpu

SIZES = (512, 768)
"""Block sizes of the models a and b; c shares a's."""
BLOCK_BYTES = {"a": SIZES[0], "b": SIZES[1], "c": SIZES[0]}
NUM_BLOCKS = 12
SPAN = 64 << 10
KEYS = [bytes([n]) * 4 for n in range(6)]


def offer(tier: HostKVTier, model: str, key: bytes, tag: int | None, address: int, block_bytes: int) -> bool:
    """Offer one block; whether the tier has it now."""
    tier.offer(model, [OfferedBlock(key, tag, address)], block_bytes)
    return key in tier.entries_of(model)


class Region:
    """Mapped device memory, one area per model, each block of which can be given a value."""

    def __init__(self, device: CpuDevice | None = None) -> None:
        self.device = device or CpuDevice()
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
        self.late = LateDevice(chance=0.2)
        self.region = Region(self.late)
        self.host = HostLedger(budget)
        self.tier = HostKVTier(self.host, self.region.device, buffer_bytes=buffer, spare_bytes=spare)
        self.host.make_room = self.tier.drop_cached
        self.images: list[tuple[object, dict[int, int]]] = []  # image, slot -> value
        self.cached: dict[tuple[str, bytes], tuple[int, int]] = {}  # value and tag; the tier may have dropped it
        self.arrivals: list = []  # with a value for each slot
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
            need = len(blocks) * BLOCK_BYTES[model]
            assert need > self.host.free_bytes
            self.no_cache_is_left()
            assert before >= self.host.total(HostUse.PAUSED_KV)
            return
        values = {}
        for slot, block in enumerate(blocks):
            values[slot] = self.new_value()
            self.region.fill(model, block, values[slot])
        self.tier.begin_copy_out(image, [self.region.address(model, block) for block in blocks]).wait()
        self.images.append((image, values))

    def no_cache_is_left(self) -> None:
        """Only buffers that somebody writes to beside the loop are kept although others need the memory."""
        coming = {id(slot.buffer): slot.buffer.nbytes for arrival, _ in self.arrivals for slot in arrival.slots}
        assert sum(coming.values()) == self.host.total(HostUse.CACHED_KV)
        assert not any(self.tier.entries_of(model) for model in "abc")

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
        taken = offer(self.tier, model, key, value, self.region.address(model, 0), BLOCK_BYTES[model])
        assert taken == (key in self.tier.entries_of(model))
        if taken and not known:
            self.cached[model, key] = (value, value)

    @rule(model=st.sampled_from("abc"), key=st.sampled_from(KEYS))
    def load(self, model: str, key: bytes) -> None:
        if key in self.tier.entries_of(model):
            value, tag = self.cached[model, key]
            assert tag == self.tier.tag_of(model, key)
            self.tier.begin_load(model, {key: self.region.address(model, 1)}).wait()
            assert value == self.region.value(model, 1)

    @rule(
        model=st.sampled_from("abc"),
        keys=st.lists(st.sampled_from(KEYS), min_size=2, unique=True),
        most=st.integers(0, 4),
    )
    def offer_many(self, model: str, keys: list[bytes], most: int) -> None:
        """What is new goes in one batch, the last ones first where there is a limit, and is found at once."""
        before = dict(self.tier.entries_of(model))
        offered = []
        for block, key in enumerate(keys):
            value = self.new_value()
            self.region.fill(model, block, value)
            offered.append(OfferedBlock(key, value, self.region.address(model, block)))
        self.tier.offer(model, offered, BLOCK_BYTES[model], most_bytes=most * BLOCK_BYTES[model] if most else None)
        here = self.tier.entries_of(model)
        new = [block for block in offered if block.key not in before]
        taken = [block for block in new if block.key in here]
        assert taken == new[len(new) - len(taken) :], "an older block was taken and a younger one was not"
        assert not most or len(taken) <= most
        self.cached.update(((model, block.key), (block.tag, block.tag)) for block in taken)

    @rule(model=st.sampled_from("abc"))
    def load_all(self, model: str) -> None:
        """Blocks that are on their way out come back at once, to places of their own."""
        keys = sorted(self.tier.entries_of(model))
        if keys:
            places = {key: self.region.address(model, 2 + index) for index, key in enumerate(keys)}
            self.tier.begin_load(model, places).wait()
            assert [self.cached[model, key][0] for key in keys] == [
                self.region.value(model, 2 + index) for index in range(len(keys))
            ]

    @rule(model=st.sampled_from("abc"), count=st.integers(1, 4))
    def room_for_blocks_of_another_host(self, model: str, count: int) -> None:
        arrival = self.tier.begin_arrival(model, count, BLOCK_BYTES[model])
        self.arrivals.append((arrival, [self.new_value() for _ in arrival.slots]))
        assert len(arrival.slots) <= count

    @precondition(lambda self: self.arrivals)
    @rule(data=st.data(), share=st.integers(0, 4))
    def blocks_have_come(self, data: st.DataObject, share: int) -> None:
        """Some of them, written by the host itself behind copies that are under way there."""
        arrival, values = self.arrivals.pop(data.draw(st.integers(0, len(self.arrivals) - 1)))
        keys = data.draw(st.permutations(KEYS))[: min(share, len(values))]
        known = set(self.tier.entries_of(arrival.model))
        for slot, value in zip(arrival.slots, values, strict=True):
            slot.view().fill_(value)
        stale = arrival.stale
        num_here = self.tier.end_arrival(arrival, [(k, v) for k, v in zip(keys, values, strict=False)])
        valid = [k for k in keys if stale is not None and k not in stale]
        assert num_here == len(valid)
        assert known | set(valid) == set(self.tier.entries_of(arrival.model))
        self.cached |= {(arrival.model, k): (v, v) for k, v in zip(keys, values, strict=False)
                        if k in valid and k not in known}  # fmt: skip

    @precondition(lambda self: self.late.queue)
    @rule()
    def copies_go_on(self) -> None:
        self.late.run_to(self.late.queue[0])

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
            self.no_cache_is_left()
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
            cached += sum(len(values) for arrival, values in self.arrivals if arrival.model == model)
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


def test_what_is_offered_together_goes_in_one_batch(region):
    """Neighbours go in one copy, whatever the order of the offer, and nobody waits."""
    device = LateDevice(chance=0.0)
    late = Region(device)
    tier = make_tier(late, 1 << 20)
    order = (3, 0, 1, 7, 2)
    for block in order:
        late.fill("a", block, block + 1)
    tier.offer("a", [OfferedBlock(bytes([b]), None, late.address("a", b)) for b in order], 512)
    assert (1, 2, 0) == (len(device.queue), tier.counters.copies, device.waits)
    assert tier.is_copying
    back = tier.begin_load("a", {bytes([b]): late.address("a", 8 + b) for b in order})
    assert (2, 0) == (len(device.queue), device.waits)
    back.wait()
    assert [1, 2, 3, 4, 8] == [late.value("a", 8 + block) for block in sorted(order)]
    assert not tier.is_copying
    late.close()


def test_no_memory_goes_while_it_is_copied_to(region):
    """Who takes cached blocks' memory away waits for the copies that are under way there."""
    device = LateDevice(chance=0.0)
    late = Region(device)
    tier = make_tier(late, 2048, buffer_bytes=1024)
    offer(tier, "a", KEYS[0], None, late.address("a", 0), 512)
    assert device.queue
    tier.host.take("w", HostUse.WEIGHTS, 2048)
    assert not device.queue
    tier.check()
    late.close()


def test_a_device_that_refuses_a_copy_costs_the_cache_a_block(region, monkeypatch):
    """A failed batch leaves no entry and no slot behind."""
    tier = make_tier(region, 1 << 20)

    def refuse(copies):
        raise OSError("no")

    monkeypatch.setattr(region.device, "begin_copies_out", refuse)
    assert not offer(tier, "a", KEYS[0], None, region.address("a", 0), 512)
    assert (1, 0) == (tier.counters.refusals, tier.host.held("a", HostUse.CACHED_KV))
    tier.check()


def test_models_never_hit_each_other(region):
    """One key of two models names two blocks."""
    tier = make_tier(region, 1 << 20)
    region.fill("a", 0, 7)
    assert offer(tier, "a", KEYS[0], None, region.address("a", 0), 512)
    assert KEYS[0] in tier.entries_of("a")
    assert KEYS[0] not in tier.entries_of("c")
    tier.forget("c")
    assert KEYS[0] in tier.entries_of("a")


def test_the_least_recently_used_block_goes_first(region):
    """A full tier drops what was not used for longest, and a hit counts as a use."""
    tier = make_tier(region, 4 * 512)
    for key in KEYS[:4]:
        offer(tier, "a", key, None, region.address("a", 0), 512)
    tier.begin_load("a", {KEYS[0]: region.address("a", 1)}).wait()
    offer(tier, "a", KEYS[4], None, region.address("a", 0), 512)
    assert [KEYS[0], KEYS[2], KEYS[3], KEYS[4]] == sorted(tier.entries_of("a"))
    assert 1 == tier.counters.evictions


def test_cached_blocks_give_way_to_paused_requests(region):
    """An image gets the memory of cached blocks of any size, also without the ledger's hook."""
    tier = HostKVTier(HostLedger(4096), region.device, buffer_bytes=1024)
    for key in KEYS[:4]:
        assert offer(tier, "b", key, None, region.address("b", 0), 768)
    image = tier.new_image("a", 512, 8)
    assert 0 == len(tier.entries_of("b"))
    assert not offer(tier, "b", KEYS[0], None, region.address("b", 0), 768)
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
    assert all(offer(tier, "a", key, None, region.address("a", 0), block) for key in keys)
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
    offer(tier, "a", KEYS[0], None, region.address("a", 0), 512)
    snapshot = tier.snapshot()
    assert ({"a": 1}, 4096, 512) == tuple(snapshot[k] for k in ("cached_blocks", "cached_bytes", "cached_out_bytes"))


def test_blocks_of_another_host_are_found_once_they_are_there(region):
    """Not before, only those that came, and not what meant something else meanwhile; room for them is nobody else's."""
    tier = make_tier(region, 4 * SIZES[0], buffer_bytes=SIZES[0])
    tier.host.make_room = tier.drop_cached
    arrival = tier.begin_arrival("a", 6, SIZES[0])
    assert len(arrival.slots) == 4 and not tier.entries_of("a") and not tier.droppable_bytes
    with pytest.raises(CapacityError):
        tier.new_image("a", SIZES[0], 1)
    tier.check()
    for value, slot in enumerate(arrival.slots):
        slot.view().fill_(value + 7)
    tier.discard("a", KEYS[1])
    assert tier.end_arrival(arrival, [(KEYS[0], 5), (KEYS[1], 6), None]) == 1
    assert [*tier.entries_of("a")] == [KEYS[0]] and tier.tag_of("a", KEYS[0]) == 5
    tier.begin_load("a", {KEYS[0]: region.address("a", 5)}).wait()
    assert region.value("a", 5) == 7
    late = tier.begin_arrival("a", 2, SIZES[0])
    tier.forget("a")
    assert tier.end_arrival(late, [(KEYS[2], 0), (KEYS[3], 0)]) == 0
    assert not tier.entries_of("a") and not tier.host.total(HostUse.CACHED_KV)
    tier.check()
