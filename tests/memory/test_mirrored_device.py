# SPDX-License-Identifier: Apache-2.0
"""A device of several ranks: what the first does, each other repeats at its own addresses with its own bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.devices.late_device import LateDevice
from tokenpool.memory.devices.cpu import CpuDevice
from tokenpool.memory.devices.mirrored import Mirror, MirroredDevice

pytestmark = pytest.mark.cpu

PAGE = 64 << 10


class Ranks:
    """The first rank's device, and a mirror that follows when told to."""

    def __init__(self) -> None:
        self.mirror = Mirror(CpuDevice())
        self.mirror.device.reserve(7 * PAGE)  # so that addresses differ
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.device = MirroredDevice(CpuDevice(), lambda name, args: self.calls.append((name, args)))

    def follow(self) -> list[Any]:
        calls, self.calls = self.calls, []
        return [self.mirror.do(*call) for call in calls]

    def theirs(self, address: int, nbytes: int) -> torch.Tensor:
        return self.mirror.device.tensor(self.mirror.address(address), nbytes)


@pytest.fixture
def ranks() -> Ranks:
    return Ranks()


def test_memory_comes_and_goes_on_both(ranks: Ranks) -> None:
    base = ranks.device.reserve(4 * PAGE)
    ranks.device.map_zeroed(base + PAGE, PAGE)
    ranks.device.fill(base + PAGE, 100, 7)
    ours = ranks.device.tensor(base + PAGE, PAGE)
    *_, theirs = ranks.follow()
    assert theirs.data_ptr() != ours.data_ptr()
    assert torch.equal(theirs, ours) and int(theirs.sum()) == 700
    ranks.device.unmap(base + PAGE, PAGE)
    ranks.device.map_zeroed(base + PAGE, PAGE)
    ranks.follow()
    assert int(ranks.theirs(base + PAGE, PAGE).sum()) == 0
    ranks.device.release(base, 4 * PAGE)
    ranks.follow()
    with pytest.raises(KeyError, match="in no range"):
        ranks.mirror.address(base)


def test_copies_keep_to_each_ranks_own_bytes(ranks: Ranks) -> None:
    base = ranks.device.reserve(2 * PAGE)
    ranks.device.map_zeroed(base, 2 * PAGE)
    buffer = ranks.device.host_buffer(PAGE)
    *_, their_buffer = ranks.follow()
    ranks.device.fill(base, PAGE, 1)
    ranks.follow()
    ranks.mirror.device.fill(ranks.mirror.address(base), PAGE, 2)  # this rank's shard is another
    ranks.device.begin_copies_out([(base, buffer[:512]), (base + 4096, buffer[1024:1536])]).wait()
    ranks.device.copy_in(base + PAGE, buffer[:512])
    ranks.device.begin_copy_in(base + PAGE + 512, buffer[1024:1536])()
    ranks.follow()
    assert set(their_buffer[:512].tolist()) == {2} and set(buffer[:512].tolist()) == {1}
    assert set(ranks.device.tensor(base + PAGE, 1024).tolist()) == {1}
    assert set(ranks.theirs(base + PAGE, 1024).tolist()) == {2}


def test_a_buffer_at_a_reused_address_is_the_new_one(ranks: Ranks) -> None:
    ranks.mirror.do("host_buffer", (1000, 64))
    new = ranks.mirror.do("host_buffer", (1032, 64))
    ranks.mirror.do("reserve", (1 << 20, PAGE))
    ranks.mirror.do("map_zeroed", (1 << 20, PAGE))
    new.fill_(5)
    ranks.mirror.do("copies_in", ([(1 << 20, 1040, 8)],))
    assert ranks.theirs(1 << 20, 8).tolist() == [5] * 8
    with pytest.raises(KeyError, match="in no host buffer"):
        ranks.mirror.do("copies_in", ([(1 << 20, 1000, 8)],))


def test_nothing_is_repeated_that_the_first_rank_could_not_do(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    base = ranks.device.reserve(PAGE)
    ranks.follow()

    def refuse(*_: Any) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(CpuDevice, "map_zeroed", refuse)
    with pytest.raises(OSError, match="no memory"):
        ranks.device.map_zeroed(base, PAGE)
    assert ranks.calls == []


OPS = st.lists(
    st.tuples(st.sampled_from(("in", "out", "remap", "park", "compute")), st.integers(0, 3), st.integers(0, 3)),
    min_size=1,
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(OPS, st.integers(0, 5), st.sampled_from((0.0, 0.3)))
def test_copies_that_nobody_waits_for_are_there_when_it_matters(
    ops: list[tuple[str, int, int]], seed: int, chance: float
) -> None:
    """A rank whose copies end late has, in each step and at the end, the bytes of one that waits for each."""
    ranks, prompt, late = Ranks(), Mirror(CpuDevice(keeps_bytes=True)), LateDevice(seed, chance)
    ranks.mirror, pattern = Mirror(late), torch.arange(4 * PAGE) % 251
    base, slots = ranks.device.reserve(4 * PAGE), ranks.device.host_buffer(4 * PAGE)
    ranks.device.map_zeroed(base, 4 * PAGE)

    def follow() -> None:
        calls, ranks.calls = ranks.calls, []
        for call in calls:
            prompt.do(*call)
            ranks.mirror.do(*call)

    follow()
    for buffer in (slots, prompt._buffers[0][2], ranks.mirror._buffers[0][2]):
        buffer.zero_()

    def compute(value: int) -> None:
        follow()
        ranks.mirror.precede_compute()
        pages = [m.device.tensor(m.address(base), 4 * PAGE) for m in (prompt, ranks.mirror)]
        assert torch.equal(*pages)
        for mine in pages:
            mine.add_((pattern + value).to(torch.uint8))

    for step, (name, page, slot) in enumerate([*ops, ("compute", 0, 0)]):
        place, buffer = base + page * PAGE, slots[slot * PAGE : (slot + 1) * PAGE]
        if name == "in":
            ranks.device.begin_copies_in([(place, buffer)])
        elif name == "out":
            ranks.device.begin_copies_out([(place, buffer)])
        elif name == "remap":
            ranks.device.unmap(place, PAGE)
            ranks.device.map_zeroed(place, PAGE)
        elif name == "park":
            ranks.device.park(place, PAGE)
            ranks.device.map_zeroed(place, PAGE)
        else:
            compute(step)
    compute(0)
    buffers = [m._buffers[0][2] for m in (prompt, ranks.mirror)]
    assert torch.equal(*buffers)


def test_a_copy_is_not_waited_for_when_it_begins(ranks: Ranks) -> None:
    """Whoever asked for it may be told of the next thing meanwhile; a few at most are under way."""
    late = LateDevice(chance=0.0)
    ranks.mirror = Mirror(late)
    base, buffer = ranks.device.reserve(PAGE), ranks.device.host_buffer(PAGE)
    ranks.device.map_zeroed(base, PAGE)
    for _ in range(60):
        ranks.device.begin_copies_in([(base, buffer)])
    ranks.follow()
    assert (0, 60) == (late.waits, len(late.queue))
    for _ in range(60):
        ranks.device.begin_copies_in([(base, buffer)])
    ranks.follow()
    assert 64 == len(late.queue)
