# SPDX-License-Identifier: Apache-2.0
"""A CPU device on which copies of KV blocks are done late: when somebody waits for them, or now and then when asked.

So whoever relies on a copy that nobody waited for finds other bytes: NaN on the device, zeros on the host. Taking
memory away that is still to be copied is an error at once.
"""

from __future__ import annotations

import ctypes
import random
from collections import deque
from collections.abc import Callable

from tokenpool.memory.devices.cpu import CpuDevice


class LateCopies:
    """Copies that are done by `device.run_to`; see `Copies`."""

    seconds = 1e-3

    def __init__(self, device: LateDevice, work: Callable[[], None], places: list[range], buffers: list) -> None:
        self._device = device
        self._work = work
        self.places = places
        self.buffers = buffers
        self.is_done = False

    def do(self) -> None:
        self._work()
        self.is_done = True

    def done(self) -> bool:
        if not self.is_done:
            self._device.happen()
        return self.is_done

    def wait(self) -> None:
        self._device.waits += not self.is_done
        self._device.run_to(self)

    def precede_compute(self) -> None:
        self._device.run_to(self)


class LateDevice(CpuDevice):
    """Does copies in their order; each time that somebody asks whether one is done, the next is, with `chance`."""

    def __init__(self, seed: int = 1, chance: float = 0.3) -> None:
        super().__init__(keeps_bytes=True)
        self.copies_beside = True
        self.queue: deque[LateCopies] = deque()
        self.waits = 0
        """How often the host waited for a copy that was not done."""
        self.chance = chance
        self._random = random.Random(seed)

    def begin_copies_in(self, copies):
        for address, source in copies:
            if not self._under_way(address, source.numel()):
                ctypes.memset(address, 0xFF, source.numel())
        return self._queue(lambda: CpuDevice.begin_copies_in(self, copies), copies)

    def begin_copies_out(self, copies):
        for _, target in copies:
            if not self._is_on_its_way(target):
                target.zero_()
        return self._queue(lambda: CpuDevice.begin_copies_out(self, copies), copies)

    def _is_on_its_way(self, target) -> bool:
        """Whether earlier copies still read or write these host bytes; these come after them."""
        start, stop = target.data_ptr(), target.data_ptr() + target.numel()
        return any(b.data_ptr() < stop and start < b.data_ptr() + b.numel() for c in self.queue for b in c.buffers)

    def _queue(self, work, copies) -> LateCopies:
        places = [range(address, address + buffer.numel()) for address, buffer in copies]
        self.queue.append(LateCopies(self, work, places, [buffer for _, buffer in copies]))
        return self.queue[-1]

    def happen(self) -> None:
        """Maybe do the next copies."""
        if self.queue and self._random.random() < self.chance:
            self.queue.popleft().do()

    def run_to(self, last: LateCopies) -> None:
        """Do all copies up to these."""
        while not last.is_done:
            self.queue.popleft().do()

    def _under_way(self, address: int, nbytes: int) -> list[LateCopies]:
        end = address + nbytes
        return [c for c in self.queue if any(place.start < end and address < place.stop for place in c.places)]

    def settle(self, address: int, nbytes: int) -> None:
        for copies in self._under_way(address, nbytes):
            copies.wait()

    def unmap(self, address: int, nbytes: int) -> None:
        for copies in self.queue:
            for place in copies.places:
                assert place.stop <= address or address + nbytes <= place.start, "memory goes that is being copied"
        super().unmap(address, nbytes)
