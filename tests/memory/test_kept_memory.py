# SPDX-License-Identifier: Apache-2.0
"""Memory that the CPU device keeps for the next range: who asks for zeros gets zeros, and there is never more of it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tokenpool.memory.devices import kept_memory
from tokenpool.memory.devices.cpu import CpuDevice
from tokenpool.memory.devices.kept_memory import HUGE_PAGE

pytestmark = pytest.mark.cpu

MIB = 1 << 20
SIZE = 64 * MIB
UNIT = 512 << 10


@pytest.fixture
def device() -> CpuDevice:
    return CpuDevice()


@pytest.fixture
def ranges(device: CpuDevice) -> Iterator[list[int]]:
    """Two, of SIZE bytes each, without access."""
    found = [device.reserve(SIZE) for _ in range(2)]
    yield found
    for address in found:
        device.release(address, SIZE)


@pytest.fixture
def moves() -> None:
    """Skip where the kernel cannot move memory as the device wants it (Linux before 5.7, some sandboxes)."""
    device = CpuDevice()
    one, two = device.reserve(HUGE_PAGE), device.reserve(HUGE_PAGE)
    device.map_zeroed(one, HUGE_PAGE)
    device.unmap(one, HUGE_PAGE)
    device.map_unset(two, HUGE_PAGE)
    can_move = device._kept._can_move
    device.release(one, HUGE_PAGE)
    device.release(two, HUGE_PAGE)
    if not can_move:
        pytest.skip("this kernel cannot move memory to a place of its own")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def leave_full(device: CpuDevice, address: int) -> int:
    """Let a range go that was written to; returns the bytes that this process has then."""
    device.map_zeroed(address, SIZE)
    device.fill(address, SIZE, 7)
    device.unmap(address, SIZE)
    return resident_bytes()


@pytest.mark.usefixtures("moves")
def test_a_range_that_will_be_overwritten_gets_the_memory_of_another(device, ranges):
    """By the page tables alone: it still holds what it held, in the order of nobody's."""
    one, two = ranges
    before = leave_full(device, one)
    device.map_unset(two, SIZE)
    assert device.tensor(two, SIZE).eq(7).all()
    assert abs(resident_bytes() - before) < SIZE / 4
    assert 0 == device.release_unused()


@pytest.mark.usefixtures("moves")
def test_a_range_that_comes_back_has_its_own_memory(device, ranges):
    """As far as nobody else has taken it; each place is there once."""
    one, two = ranges
    device.map_zeroed(one, SIZE)
    for start in range(0, SIZE, HUGE_PAGE):
        device.fill(one + start, HUGE_PAGE, 1 + start // HUGE_PAGE)
    device.unmap(one, SIZE)
    device.map_unset(two, SIZE // 4)
    device.unmap(two, SIZE // 4)
    device.map_unset(one, SIZE)
    found = [int(device.tensor(one + start, 1)[0]) for start in range(0, SIZE, HUGE_PAGE)]
    assert [*range(1, 1 + SIZE // HUGE_PAGE)] == sorted(found)
    assert found[: SIZE // HUGE_PAGE // 2] == [*range(1, 1 + SIZE // HUGE_PAGE // 2)]


def test_zeroed_memory_takes_the_place_of_what_is_kept(device, ranges):
    """A device has no more memory than pages: what is kept goes as others get pages from the kernel."""
    one, two = ranges
    before = leave_full(device, one)
    device.map_zeroed(two, SIZE)
    assert not device.tensor(two, SIZE).any()
    device.fill(two, SIZE, 1)
    assert abs(resident_bytes() - before) < SIZE / 4
    device.unmap(two, SIZE)
    device.map_zeroed(two, SIZE)
    assert not device.tensor(two, SIZE).any(), "nor does a range keep its own bytes"


def test_what_is_kept_goes_back_when_it_is_asked_for(device, ranges):
    """When the device is lent; and with its range."""
    one, two = ranges
    device.map_zeroed(one, SIZE)
    device.map_zeroed(two, SIZE)
    device.fill(one, SIZE, 7)
    device.fill(two, SIZE, 7)
    before = resident_bytes()
    device.unmap(one, SIZE)
    assert SIZE == device.release_unused()
    assert before - resident_bytes() > SIZE * 3 / 4
    device.unmap(two, SIZE)
    device.release(two, SIZE)
    assert before - resident_bytes() > SIZE * 3 / 2
    assert 0 == device.release_unused()
    ranges.remove(two)


@pytest.mark.parametrize("cause", ["kernel", "mappings"])
def test_where_memory_cannot_be_moved_it_comes_from_the_kernel(device, ranges, monkeypatch, cause):
    """Old kernels and sandboxes cannot, and a process may have so many mappings."""
    if cause == "mappings":
        monkeypatch.setattr(kept_memory, "_MOST_MOVED", 0)
    else:
        monkeypatch.setattr(kept_memory, "_MREMAP_DONTUNMAP", 64)
    one, two = ranges
    before = leave_full(device, one)
    device.map_unset(two, SIZE)
    assert not device.tensor(two, SIZE).any()
    device.fill(two, SIZE, 7)
    assert abs(resident_bytes() - before) < SIZE / 4
    device.unmap(two, SIZE)
    device.map_zeroed(one, SIZE)
    assert not device.tensor(one, SIZE).any()


class Ranges(RuleBasedStateMachine):
    """Parts of three ranges come and go, with borders that no huge page has."""

    @initialize()
    def begin(self) -> None:
        self.device = CpuDevice()
        self.ranges = [self.device.reserve(16 * UNIT) for _ in range(3)]
        self.mapped: dict[tuple[int, int], int] = {}  # by range and unit: its byte
        self.most = 0

    def units(self, number: int, start: int, count: int) -> list[tuple[int, int]]:
        return [(number, unit) for unit in range(start, min(start + count, 16))]

    def address(self, place: tuple[int, int]) -> int:
        return self.ranges[place[0]] + place[1] * UNIT

    @rule(number=st.integers(0, 2), start=st.integers(0, 15), count=st.integers(1, 16), zeroed=st.booleans())
    def map(self, number: int, start: int, count: int, zeroed: bool) -> None:
        places = self.units(number, start, count)
        if self.mapped.keys() & places:
            return
        do = self.device.map_zeroed if zeroed else self.device.map_unset
        do(self.address(places[0]), len(places) * UNIT)
        for place in places:
            self.mapped[place] = 0
            if not zeroed:
                self.write(place, 1 + (place[0] * 16 + place[1]) % 100)
        self.most = max(self.most, len(self.mapped) * UNIT)

    def write(self, place: tuple[int, int], byte: int) -> None:
        self.device.fill(self.address(place), UNIT, byte)
        self.mapped[place] = byte

    @rule(number=st.integers(0, 2), start=st.integers(0, 15), count=st.integers(1, 16))
    def unmap(self, number: int, start: int, count: int) -> None:
        places = self.units(number, start, count)
        if not self.mapped.keys() >= {*places}:
            return
        self.device.unmap(self.address(places[0]), len(places) * UNIT)
        for place in places:
            del self.mapped[place]

    @rule(byte=st.integers(1, 100), data=st.data())
    @precondition(lambda self: self.mapped)
    def fill(self, byte: int, data: st.DataObject) -> None:
        self.write(data.draw(st.sampled_from(sorted(self.mapped))), byte)

    @rule(number=st.integers(0, 2))
    def release(self, number: int) -> None:
        if any(place[0] == number for place in self.mapped):
            return
        self.device.release(self.ranges[number], 16 * UNIT)
        self.ranges[number] = self.device.reserve(16 * UNIT)

    @rule()
    def lend(self) -> None:
        self.device.release_unused()
        assert 0 == self.device._kept.nbytes
        self.most = len(self.mapped) * UNIT

    @invariant()
    def holds_what_was_written(self) -> None:
        for place, byte in getattr(self, "mapped", {}).items():
            content = ctypes.string_at(self.address(place), UNIT)
            assert content == bytes([byte]) * UNIT

    @invariant()
    def has_no_more_than_pages(self) -> None:
        if hasattr(self, "device"):
            assert self.device._kept.nbytes + len(self.mapped) * UNIT <= self.most

    def teardown(self) -> None:
        for address in getattr(self, "ranges", []):
            self.device.release(address, 16 * UNIT)


TestRanges = Ranges.TestCase
TestRanges.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
