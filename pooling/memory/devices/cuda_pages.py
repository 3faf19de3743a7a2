# SPDX-License-Identifier: Apache-2.0
"""Which physical page of a GPU lies where: made once, mapped where it is needed, parked where it was needed last.

    handles    | 0 | 1 | 2 | 3 | ...        made at the first need, one per page of the ledger, kept
                 |       |   |
    addresses  | a |   | b | c |   | ...    a place without a page faults, or has the zero page

A parked page stays mapped, so whoever gets its place again needs no call that waits, and a stray read finds old bytes.
It is taken away when pages are short elsewhere. Harmless ranges, those of the KV arena, have one zero page wherever
they have none of their own. Not yet run on hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from tokenpool.memory.devices.cuda_driver import CudaDriver, CudaError


class CudaPages:
    """The pages of one GPU; used on one thread but for what `promise` returns.

    `drain` waits on the host until all that uses pages has ended.
    """

    def __init__(self, driver: CudaDriver, page_bytes: int, drain: Callable[[], None]) -> None:
        self.page_bytes = page_bytes
        self._driver = driver
        self._drain = drain
        self._free: list[Any] = []
        self._mapped: dict[int, Any] = {}  # by address, parked ones too
        self._bare: set[int] = set()  # places with a page that is not mapped yet
        self._parked: dict[int, None] = {}  # the one that was parked first comes first
        self._harmless: list[range] = []
        self._zero: Any = None
        self._zero_at: set[int] = set()  # a place of a harmless range lacks it after a call of the driver failed

    @property
    def num_made(self) -> int:
        """Pages that there are, wherever they are."""
        return len(self._free) + len(self._mapped)

    def make(self, count: int) -> None:
        """Make pages until there are `count`; raises CudaError, those that were made stay, when memory is short."""
        while self.num_made < count:
            self._free.append(self._driver.create(self.page_bytes))

    def release_unused(self) -> int:
        """Give the memory of parked pages, and of those that are mapped nowhere, back to the GPU; returns its bytes."""
        self._take_away(list(self._parked))
        count = len(self._free)
        while self._free:
            self._driver.destroy(self._free.pop())
        return count * self.page_bytes

    # -- places --------------------------------------------------------------------------------------

    def make_harmless(self, address: int, nbytes: int) -> None:
        """Put the zero page everywhere in a range without pages, from now on; the caller fills it with zeros."""
        places = range(address, address + nbytes, self.page_bytes)
        if self._zero is None:
            self._zero = self._driver.create(self.page_bytes)
        self._put_zero(places)
        self._harmless.append(places)

    def put(self, address: int, nbytes: int) -> bool:
        """Put a page under each place of a range, the one that is parked there or a free one; all or none.

        Returns whether a page was parked there, whose last user may still be at work. Raises CudaError.
        """
        places = range(address, address + nbytes, self.page_bytes)
        bare = [place for place in places if place not in self._parked]
        handles = self._take(len(bare), places)
        done: list[int] = []
        try:
            if not self._zero_at.isdisjoint(bare):
                self._drain()  # a kernel may be reading the zero page where it should not
            for place, handle in zip(bare, handles, strict=True):
                if place in self._zero_at:
                    self._driver.unmap(place, self.page_bytes)
                    self._zero_at.discard(place)
                done.append(place)
                self._driver.map(place, self.page_bytes, handle)
            for run in _runs(bare, self.page_bytes):
                self._driver.allow(run[0], len(run) * self.page_bytes)
        except BaseException:
            with suppress(CudaError):  # the first error says what is wrong
                self._undo(done)
            self._free += handles
            raise
        for place in places:
            self._parked.pop(place, None)
        self._mapped.update(zip(bare, handles, strict=True))
        return len(bare) < len(places)

    def promise(self, address: int, nbytes: int) -> Callable[[int, int], None]:
        """Take a page for each place of a range that is not harmless; the function returned maps some of them.

        Raises CudaError. For the function see `Device.map_later`.
        """
        places = range(address, address + nbytes, self.page_bytes)
        self._mapped.update(zip(places, self._take(len(places), places), strict=True))
        self._bare.update(places)

        def back(start: int, size: int) -> None:
            first = start - (start - address) % self.page_bytes
            wanted = [place for place in range(first, start + size, self.page_bytes) if place in self._bare]
            done: list[int] = []
            try:
                for place in wanted:
                    self._driver.map(place, self.page_bytes, self._mapped[place])
                    done.append(place)
                for run in _runs(wanted, self.page_bytes):
                    self._driver.allow(run[0], len(run) * self.page_bytes)
            except BaseException:
                for place in done:
                    with suppress(CudaError):  # the first error says what is wrong
                        self._driver.unmap(place, self.page_bytes)
                raise
            self._bare.difference_update(wanted)

        return back

    def park(self, address: int, nbytes: int) -> None:
        """Leave the pages of a range where they are until they are wanted."""
        self._parked.update(dict.fromkeys(range(address, address + nbytes, self.page_bytes)))

    def take_away(self, address: int, nbytes: int) -> None:
        """Unmap the pages of a range, which nothing uses any more."""
        self._unmap(range(address, address + nbytes, self.page_bytes))

    def clear(self, address: int, nbytes: int) -> None:
        """Unmap all that is mapped in a range whose addresses go; nothing uses it any more."""
        places = range(address, address + nbytes, self.page_bytes)
        for place in places:
            if (place in self._mapped and place not in self._bare) or place in self._zero_at:
                self._driver.unmap(place, self.page_bytes)
            self._zero_at.discard(place)
            self._bare.discard(place)
            if place in self._mapped:
                self._parked.pop(place, None)
                self._free.append(self._mapped.pop(place))
        self._harmless = [known for known in self._harmless if known != places]

    def is_used(self, address: int, nbytes: int) -> bool:
        """Whether anything is mapped in a range."""
        places = range(address, address + nbytes, self.page_bytes)
        return any(place in self._mapped or place in self._zero_at for place in places)

    # -- inside --------------------------------------------------------------------------------------

    def _take(self, count: int, keep: range) -> list[Any]:
        """`count` free pages, of parked ones elsewhere if need be, made if need be."""
        if (missing := count - len(self._free)) > 0:
            self._take_away([place for place in self._parked if place not in keep][:missing])
        taken = [self._free.pop() for _ in range(min(count, len(self._free)))]
        try:
            while len(taken) < count:
                taken.append(self._driver.create(self.page_bytes))
        except BaseException:
            self._free += taken
            raise
        return taken

    def _take_away(self, parked: list[int]) -> None:
        if parked:
            self._drain()
            self._unmap(parked)

    def _unmap(self, places: Sequence[int]) -> None:
        for run in _runs(sorted(place for place in places if place not in self._bare), self.page_bytes):
            self._driver.unmap(run[0], len(run) * self.page_bytes)
            if self._is_harmless(run[0]):
                self._put_zero(run)
        for place in places:
            self._bare.discard(place)
            self._parked.pop(place, None)
            self._free.append(self._mapped.pop(place))

    def _undo(self, done: Sequence[int]) -> None:
        """Unmap what `put` has mapped so far; the last one may not be."""
        for place in done:
            with suppress(CudaError):
                self._driver.unmap(place, self.page_bytes)
        if done and self._is_harmless(done[0]):
            self._put_zero(done)

    def _put_zero(self, places: Sequence[int]) -> None:
        for place in places:
            self._driver.map(place, self.page_bytes, self._zero)
            self._zero_at.add(place)
        for run in _runs(places, self.page_bytes):
            self._driver.allow(run[0], len(run) * self.page_bytes)

    def _is_harmless(self, address: int) -> bool:
        return any(places.start <= address < places.stop for places in self._harmless)


def _runs(places: Sequence[int], step: int) -> Iterator[Sequence[int]]:
    """Neighbours of rising `places` together."""
    first = 0
    for index in range(1, len(places) + 1):
        if index == len(places) or places[index] != places[index - 1] + step:
            yield places[first:index]
            first = index
