# SPDX-License-Identifier: Apache-2.0
"""Slots of one size in a few large host buffers, each slot accounted to its owner in the host ledger."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from tokenpool.errors import CapacityError
from tokenpool.memory.devices.device import BlockCopy, Copies, Device
from tokenpool.memory.host_ledger import HostLedger, HostUse

FREE_SLOTS = "free kv slots"
"""Owner of the memory of slots that nobody uses."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class SlotBuffer:
    """One host buffer, a whole number of slots."""

    data: torch.Tensor
    block_bytes: int
    free: list[int]
    """Free slots as a heap: the lowest goes first, so that a run of slots stays a run."""
    occupants: dict[int, Any] = field(default_factory=dict)
    """What is in each used slot, for whoever took it; its owner's name at first."""
    copies: Copies | None = None
    """The last of those that nobody waited for."""

    def settle(self) -> None:
        """Wait until the host may read and write it."""
        if self.copies is not None:
            self.copies.wait()
            self.copies = None

    @property
    def nbytes(self) -> int:
        """Size of the buffer in bytes."""
        return self.data.numel()

    def view(self, first: int, count: int = 1) -> torch.Tensor:
        """The bytes of `count` slots from slot `first` on."""
        return self.data[first * self.block_bytes : (first + count) * self.block_bytes]


class Slot(NamedTuple):
    """One slot of one buffer."""

    buffer: SlotBuffer
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls

    def view(self) -> torch.Tensor:
        """Its bytes."""
        return self.buffer.view(self.index)


class SlotPool:
    """Slots of `block_bytes` for one use. Grows by buffers, gives empty ones back, up to `spare_bytes` excepted.

    Called on the host loop's thread only.
    """

    def __init__(
        self, host: HostLedger, device: Device, use: HostUse, block_bytes: int, buffer_bytes: int, spare_bytes: int
    ) -> None:
        self.use = use
        self.block_bytes = block_bytes
        self.buffers: list[SlotBuffer] = []
        self._host = host
        self._device = device
        self._slots_per_buffer = max(1, buffer_bytes // block_bytes)
        self._spare_bytes = spare_bytes

    @property
    def num_free(self) -> int:
        """Slots that `take` hands out without growing."""
        return sum(len(buffer.free) for buffer in self.buffers)

    def missing_bytes(self, count: int) -> int:
        """Host memory that `take` of `count` slots would have to get."""
        return max(0, count - self.num_free) * self.block_bytes

    def take(self, owner: str, count: int) -> list[Slot]:
        """Hand out `count` slots, runs of neighbours as far as possible.

        Raises CapacityError and changes nothing if the host ledger has no room for those that are missing.
        """
        try:
            # Making room in the ledger may take spare buffers away: look again how many slots there are.
            while (missing := count - self.num_free) > 0:
                self._grow(missing)
        except CapacityError:
            self.drop_empty()
            raise
        slots: list[Slot] = []
        for buffer in sorted(self.buffers, key=lambda b: -len(b.free)):
            if len(slots) == count:
                break
            wanted = min(count - len(slots), len(buffer.free))
            slots += [Slot(buffer, heapq.heappop(buffer.free)) for _ in range(wanted)]
        for buffer, index in slots:
            buffer.occupants[index] = owner
        self._host.give(FREE_SLOTS, self.use, count * self.block_bytes)
        self._host.take(owner, self.use, count * self.block_bytes)
        return slots

    def give(self, owner: str, slot: Slot, *, keep_buffer: bool = False) -> None:
        """Take a slot back; a buffer that becomes empty is freed unless it is kept as a spare."""
        del slot.buffer.occupants[slot.index]
        heapq.heappush(slot.buffer.free, slot.index)
        self._host.give(owner, self.use, self.block_bytes)
        self._host.take(FREE_SLOTS, self.use, self.block_bytes)
        if not slot.buffer.occupants and not keep_buffer:
            empty_bytes = sum(b.nbytes for b in self.buffers if not b.occupants)
            if empty_bytes > self._spare_bytes:
                self._free(slot.buffer)

    def try_grow(self) -> bool:
        """Add a buffer as large as the free host memory allows; False if not even one slot fits."""
        count = min(self._slots_per_buffer, self._host.spare_bytes // self.block_bytes)
        self._grow(count)
        return count > 0

    def drop_empty(self) -> None:
        """Free all spare buffers."""
        for buffer in [b for b in self.buffers if not b.occupants]:
            self._free(buffer)

    def _grow(self, count: int) -> None:
        self._host.take(FREE_SLOTS, self.use, count * self.block_bytes)
        made: list[SlotBuffer] = []
        try:
            while count > 0:
                size = min(count, self._slots_per_buffer)
                data = self._device.host_buffer(size * self.block_bytes)
                made.append(SlotBuffer(data, self.block_bytes, list(range(size))))
                count -= size
        except BaseException:  # the machine has less memory than the budget says
            nbytes = count * self.block_bytes + sum(buffer.nbytes for buffer in made)
            self._host.give(FREE_SLOTS, self.use, nbytes)
            raise
        self.buffers += made

    def _free(self, buffer: SlotBuffer) -> None:
        buffer.settle()
        self.buffers.remove(buffer)
        self._host.give(FREE_SLOTS, self.use, buffer.nbytes)

    def check(self) -> None:
        """Raise AssertionError unless each slot is either free or used and no buffer is kept for nothing."""
        for buffer in self.buffers:
            slots = set(range(buffer.nbytes // self.block_bytes))
            assert len(set(buffer.free)) == len(buffer.free), "a slot is free twice"
            assert not set(buffer.free) & buffer.occupants.keys(), "a slot is free and used"
            assert set(buffer.free) | buffer.occupants.keys() == slots, "a slot is lost"
        empty_bytes = sum(b.nbytes for b in self.buffers if not b.occupants)
        assert empty_bytes <= self._spare_bytes, f"{empty_bytes} bytes of empty buffers are kept"


def in_order(slots: Iterable[Slot]) -> list[tuple[SlotBuffer, int, int]]:
    """The slots as runs of neighbours: buffer, first slot and count."""
    runs: list[tuple[SlotBuffer, int, int]] = []
    for buffer, index in slots:
        if runs and runs[-1][0] is buffer and runs[-1][1] + runs[-1][2] == index:
            runs[-1] = (buffer, runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((buffer, index, 1))
    return runs


def in_runs(places: Iterable[tuple[Slot, int]], block_bytes: int) -> list[BlockCopy]:
    """What to copy; blocks that are neighbours in `places`, on the device and in a host buffer go together."""
    runs: list[tuple[SlotBuffer, int, int, int]] = []  # buffer, first slot, address, count
    for slot, address in places:
        if runs:
            buffer, first, start, count = runs[-1]
            if slot == (buffer, first + count) and address == start + count * block_bytes:
                runs[-1] = (buffer, first, start, count + 1)
                continue
        runs.append((slot.buffer, slot.index, address, 1))
    return [(address, buffer.view(first, count)) for buffer, first, address, count in runs]
