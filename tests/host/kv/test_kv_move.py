# SPDX-License-Identifier: Apache-2.0
"""KV blocks that go from host to host arrive equal or not at all, and both hosts' books agree whatever happens.

The ends of a move are plain state machines; here a simulated line stands between them, which loses, delays and
reorders, and both hosts go on: they cache, evict, forget and need memory for other things.
"""

from __future__ import annotations

import gc
import os
import weakref

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.helpers.devices.late_device import LateDevice
from tests.host.kv.kv_hosts import content_of, key_of
from tokenpool.errors import CapacityError, HostError
from tokenpool.host.kv.kv_fetch import Asked, Fetch
from tokenpool.host.kv.kv_supply import Supply, fill
from tokenpool.host.kv.kv_window import Window
from tokenpool.memory.devices.cpu import CpuDevice
from tokenpool.memory.host_ledger import HostLedger, HostUse
from tokenpool.memory.kv_blocks import OfferedBlock
from tokenpool.memory.kv_tier import HostKVTier
from tokenpool.wire.kv_frames import CHUNK_BYTES, Chunk, Void, blocks_in_chunk, window_of

pytestmark = pytest.mark.vllm  # a block's key is vLLM's; nothing here steps an engine

BLOCK = 64
MODEL = "m"
SPAN = 64 << 10
NUMBERS = st.integers(0, 15)


class Host:
    """A tier with a little memory, and a device whose copies are late."""

    def __init__(self, budget: int, buffer: int, device: CpuDevice | None = None) -> None:
        self.device = device or LateDevice(chance=0.2)
        self.base = self.device.reserve(SPAN)
        self.device.map_zeroed(self.base, SPAN)
        self.tier = HostKVTier(HostLedger(budget), self.device, buffer_bytes=buffer)
        self.tier.host.make_room = self.tier.drop_cached
        self.images: list = []
        self.weights = 0
        """Which of the models that the host has had one after the other, all of one name: each makes other bytes."""

    def content(self, key: bytes) -> np.ndarray:
        return content_of(key, BLOCK) + np.uint8(self.weights)

    def offer(self, *numbers: int) -> None:
        """Cache blocks that were just computed; their bytes may be a while in coming."""
        blocks = []
        for number in numbers:
            address = self.base + number * BLOCK
            self.device.settle(address, BLOCK)
            self.device.tensor(address, BLOCK).numpy().view(np.uint8)[:] = self.content(key_of(number))
            blocks.append(OfferedBlock(key_of(number), number, address))
        self.tier.offer(MODEL, blocks, BLOCK)

    def check(self) -> None:
        self.tier.check()

    def verify(self, *, all_of_them: bool = False) -> None:
        """Each cached block has the bytes and the tag that its key says, those on their way aside."""
        for key, entry in self.tier.entries_of(MODEL).items():
            if all_of_them:
                entry.slot.buffer.settle()
            elif entry.slot.buffer.copies is not None:
                continue
            assert np.array_equal(entry.slot.view().numpy(), self.content(key)), "a block has other bytes"
            assert key_of(entry.tag) == key

    def close(self) -> None:
        self.device.run_to(self.device.queue[-1]) if isinstance(self.device, LateDevice) and self.device.queue else None
        self.device.release(self.base, SPAN)


class Line:
    """One chunk on its way: bytes leave the source's slots bit by bit, and come into the target's."""

    def __init__(self, asked: Asked, supply: Supply) -> None:
        self.asked, self.supply = asked, supply
        self.chunk = Chunk(asked.number, supply.blocks)
        self.sent = bytearray()
        self.received = 0
        self.void: Void | None = None

    def send(self, most: int) -> None:
        for view in self.supply.views(len(self.sent)):
            part = bytes(view[:most])
            self.sent += part
            most -= len(part)
            if most <= 0:
                break
        if len(self.sent) == self.supply.nbytes and self.void is None:
            self.void = Void(self.supply.void())

    def receive(self, most: int) -> bool:
        """Whether all of it is there."""
        views = self.asked.views(self.chunk, BLOCK)
        skip = self.received
        for view in views:
            part = self.sent[self.received : self.received + min(most, max(0, len(view) - skip))]
            if skip < len(view):
                view[skip : skip + len(part)] = part
                self.received += len(part)
                most -= len(part)
            skip = max(0, skip - len(view))
        if self.void is None or self.received < self.supply.nbytes:
            return False
        self.asked.filled(self.chunk, self.void)
        return True


class MoveMachine(RuleBasedStateMachine):
    """Moves from one host to the other, one after the other, while both go on."""

    @initialize(have=st.integers(256, 4096), get=st.integers(0, 4096), buffer=st.sampled_from([64, 256, 1024]))
    def start(self, have: int, get: int, buffer: int) -> None:
        self.source, self.target = Host(have, buffer), Host(get, buffer)
        self.fetch: Fetch | None = None
        self.wanted: list[Asked] = []
        self.lines: list[Line] = []
        self.filled: list[Asked] = []

    def teardown(self) -> None:
        if hasattr(self, "source"):
            self.end()
            for host in (self.source, self.target):
                held = host.tier.host.held(MODEL, HostUse.CACHED_KV)
                assert held == len(host.tier.entries_of(MODEL)) * BLOCK, "room is set aside for nothing"
                host.verify(all_of_them=True)
                host.check()
                host.close()

    def both(self, there: bool) -> Host:
        return self.target if there else self.source

    @rule(there=st.booleans(), numbers=st.lists(NUMBERS, min_size=1, max_size=6, unique=True))
    def cache(self, there: bool, numbers: list[int]) -> None:
        self.both(there).offer(*numbers)

    @rule(there=st.booleans(), number=NUMBERS)
    def discard(self, there: bool, number: int) -> None:
        self.both(there).tier.discard(MODEL, key_of(number))

    @rule(there=st.booleans())
    def forget(self, there: bool) -> None:
        """All is to be computed anew: what is on its way means nothing there any more."""
        host = self.both(there)
        host.tier.forget(MODEL)
        if there and self.fetch is not None:
            assert all(asked.arrival.stale is None for asked in self.fetch._open)

    @rule()
    def another_model(self) -> None:
        """The source has another model of that name now, which computes what the target waits for of the one before."""
        self.source.tier.forget(MODEL)
        self.source.weights += 1
        if keys := [key for asked in self.wanted for key in asked.keys]:
            self.source.offer(*(int.from_bytes(key[5:13], "little") for key in keys))

    @precondition(lambda self: self.source.weights != self.target.weights)
    @rule()
    def another_model_at_the_target(self) -> None:
        """It has it too: moves of the one before have ended there."""
        self.end()
        self.target.tier.forget(MODEL)
        self.target.weights = self.source.weights

    @rule(there=st.booleans(), count=st.integers(1, 8))
    def need_memory(self, there: bool, count: int) -> None:
        host = self.both(there)
        try:
            host.images.append(host.tier.new_image("other", BLOCK, count))
        except CapacityError:
            assert host.tier.droppable_bytes == 0, "cached blocks were kept although requests had to be refused"

    @rule(there=st.booleans())
    def need_less(self, there: bool) -> None:
        host = self.both(there)
        if host.images:
            host.tier.free_image(host.images.pop())

    @precondition(lambda self: self.fetch is None and self.source.weights == self.target.weights)
    @rule(
        numbers=st.lists(NUMBERS, min_size=1, max_size=16, unique=True),
        chunk_blocks=st.integers(1, 5),
        window=st.integers(1, 4),
    )
    def begin(self, numbers: list[int], chunk_blocks: int, window: int) -> None:
        keys = [key_of(number) for number in numbers]
        offered = self.source.tier.generation(MODEL)
        self.fetch = Fetch(self.target.tier, MODEL, keys, BLOCK, offered, chunk_blocks=chunk_blocks, window=window)
        self.most = chunk_blocks * window
        self.turn()

    def turn(self, filled: Asked | None = None) -> None:
        assert self.fetch is not None
        asked = self.fetch.turn(filled)
        assert all(len(one.keys) == len(one.arrival.slots) for one in asked), "a key was asked for without a slot"
        self.wanted += asked
        assert sum(len(one.arrival.slots) for one in self.fetch._open) <= self.most, "more is asked for than agreed"

    @precondition(lambda self: self.wanted)
    @rule(data=st.data(), at_once=st.booleans())
    def answer(self, data: st.DataObject, at_once: bool) -> None:
        """In any order; a fast line brings all of it at once."""
        asked = self.wanted.pop(data.draw(st.integers(0, len(self.wanted) - 1)))
        fetch, tier = self.fetch, self.source.tier
        assert fetch is not None
        supply = Supply(
            tier.entries_of(MODEL), list(asked.keys), BLOCK, lambda: tier.generation(MODEL) == fetch.generation
        )
        if supply.has_copies():
            supply.settle()
        self.lines.append(line := Line(asked, supply))
        if at_once:
            self.carry(line, CHUNK_BYTES, CHUNK_BYTES)
            self.loop_comes_to_it()

    def carry(self, line: Line, sent: int, received: int) -> None:
        line.send(sent)
        if line.receive(received):
            self.lines.remove(line)
            self.filled.append(line.asked)

    @precondition(lambda self: self.lines)
    @rule(data=st.data(), sent=st.integers(0, 400), received=st.integers(0, 400))
    def go_on(self, data: st.DataObject, sent: int, received: int) -> None:
        """Some bytes leave, some arrive: a slow receiver is one that gets few."""
        self.carry(data.draw(st.sampled_from(self.lines)), sent, received)

    @precondition(lambda self: self.fetch is not None)
    @rule()
    def loop_comes_to_it(self) -> None:
        assert self.fetch is not None
        self.turn(self.filled.pop(0) if self.filled else None)
        if self.fetch.is_done:
            assert not (self.wanted or self.lines or self.filled)
            self.end()

    @precondition(lambda self: self.fetch is not None)
    @rule()
    def one_side_dies(self) -> None:
        """Between two chunks, or in the middle of one; what came whole stays, what did not is nowhere."""
        self.end()

    def end(self) -> None:
        if self.fetch is not None:
            self.fetch.close()
        self.fetch = None
        self.wanted, self.lines, self.filled = [], [], []

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "source"):
            return
        for host in (self.source, self.target):
            host.check()
        on_its_way = self.fetch._open if self.fetch is not None else []
        slots = sum(len(asked.arrival.slots) for asked in on_its_way)
        entries = len(self.target.tier.entries_of(MODEL))
        assert self.target.tier.host.held(MODEL, HostUse.CACHED_KV) == (slots + entries) * BLOCK
        assert self.source.tier._arrivals == []

    @invariant()
    def bytes_are_right(self) -> None:
        if hasattr(self, "source"):
            self.target.verify()
            self.source.verify()


TestMoves = MoveMachine.TestCase
TestMoves.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def make(num_blocks: int = 8, memory: int = 4096) -> Host:
    host = Host(memory, 256, CpuDevice())
    if num_blocks:
        host.offer(*range(num_blocks))
    return host


def test_a_block_that_goes_in_the_middle_is_void():
    """Its slot was given to another block while its bytes were read: the target is told."""
    source = make(4, memory=4 * BLOCK)
    supply = Supply(source.tier.entries_of(MODEL), [key_of(n) for n in range(4)], BLOCK)
    line = Line(Asked(0, [], None), supply)  # type: ignore[arg-type]
    line.send(BLOCK)
    source.offer(9)  # the least recently used one, 0, makes room
    line.send(4 * BLOCK)
    assert Void([0]) == line.void
    source.tier.forget(MODEL)
    assert [0, 1, 2, 3] == supply.void()
    source.close()


def test_what_is_sent_keeps_no_memory_of_the_source():
    """Of a receiver that reads nothing for as long as it likes: the buffers go when the tier gives them up."""
    source = make(8)
    buffers = [weakref.ref(b) for c in source.tier._classes.values() for b in c.cached.buffers]
    supply = Supply(source.tier.entries_of(MODEL), [key_of(n) for n in range(8)], BLOCK)
    assert 8 * BLOCK == sum(map(len, supply.views(0)))
    source.tier.drop_cached(1 << 20)
    gc.collect()
    assert buffers and not any(ref() for ref in buffers)
    assert bytes(8 * BLOCK - 100) == b"".join(supply.views(100)), "the place in the stream is lost"
    assert list(range(8)) == supply.void()
    source.close()


def test_nothing_is_asked_for_that_is_here_or_has_no_room():
    source, target, full = make(8), make(3), make(0, memory=0)
    keys = [key_of(n) for n in range(8)]
    fetch = Fetch(target.tier, MODEL, keys, BLOCK, chunk_blocks=4, window=1)
    (asked,) = fetch.turn()
    assert keys[3:7] == list(asked.keys)
    fetch.close()
    nothing = Fetch(full.tier, MODEL, keys, BLOCK)
    assert [] == nothing.turn()
    assert nothing.is_done and not nothing.num_here
    for host in (source, target, full):
        host.check()
        host.close()


@pytest.mark.parametrize("blocks", [[(0, 1), (0, 1)], [(1, 1), (0, 1)], [(4, 1)], [(-1, 1)]])
def test_a_chunk_that_nobody_asked_for_is_refused(blocks: list[tuple[int, int]]):
    target = make(0)
    (asked,) = Fetch(target.tier, MODEL, [key_of(n) for n in range(4)], BLOCK).turn()
    with pytest.raises(HostError, match="nobody asked for"):
        asked.views(Chunk(0, blocks), BLOCK)
    target.close()


def test_shared_memory_has_the_blocks_and_cannot_be_taken_away(tmp_path):
    source = make(8)
    supply = Supply(source.tier.entries_of(MODEL), [key_of(n) for n in range(8)], BLOCK)
    with Window.make(2, 8 * BLOCK) as ours:
        with Window.open(os.dup(ours.file), 2, 8 * BLOCK) as theirs:
            fill(ours.place(3), supply)
            assert np.array_equal(theirs.place(1), np.concatenate([content_of(key_of(n), BLOCK) for n in range(8)]))
            assert not theirs.place(0).any() and not theirs.place(1).flags.writeable
            with pytest.raises(OSError, match="not permitted"):
                os.ftruncate(ours.file, 0)
        with pytest.raises(ValueError, match="too small"):
            Window.open(os.dup(ours.file), 1000, 1000)
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    with pytest.raises((OSError, ValueError)):
        Window.open(file, 1, 1)
    source.close()


@pytest.mark.parametrize("block_bytes", [1, 4096, 3 << 20, 5 << 20, 64 << 20])
def test_what_is_on_its_way_is_bounded(block_bytes: int):
    """To 16 MiB, or to one block."""
    chunk_bytes = blocks_in_chunk(block_bytes) * block_bytes
    assert chunk_bytes <= max(CHUNK_BYTES, block_bytes)
    assert 1 <= window_of(block_bytes) and window_of(block_bytes) * chunk_bytes <= max(4 * CHUNK_BYTES, block_bytes)
