# SPDX-License-Identifier: Apache-2.0
"""One device for several ranks: what is done on the first rank's device is repeated on those of the others.

Each rank has its own addresses and host buffers. A call names those of the first rank; the others know which of their
own ranges stand for them, because they were made by the same calls in the same order.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tokenpool.memory.devices.device import BlockCopy, Copies, Device

logger = logging.getLogger(__name__)

Repeat = Callable[[str, tuple[Any, ...]], None]
"""Hands a call to the other ranks, which do it in the order given; does not wait for them."""


_AFTER_COPIES = frozenset({"unmap", "park", "release", "release_unused", "fill"})
_MOST_UNDER_WAY = 64


class MirroredDevice:
    """Passes every call on to `device` and to the other ranks; see `Device` for the contract.

    Calls may come from several threads. What another rank cannot do is not raised here: it ends that rank.
    """

    def __init__(self, device: Device, repeat: Repeat) -> None:
        self.granularity = device.granularity
        self.copies_in_flight = device.copies_in_flight
        self.chunk_bytes = device.chunk_bytes
        self.copies_beside = device.copies_beside
        self.burst_bytes = device.burst_bytes
        self.first = self._device = device
        """The first rank's own."""
        self._repeat = repeat
        self._lock = threading.Lock()  # the others must see a buffer before a copy that uses it

    def reserve(self, nbytes: int, *, harmless: bool = False) -> int:
        """Reserve the range on every rank; returns the first rank's address."""
        address = self._device.reserve(nbytes, harmless=harmless)
        self._repeat("reserve", (address, nbytes, harmless))
        return address

    def release(self, address: int, nbytes: int) -> None:
        """Give the range back on every rank."""
        self._repeat("release", (address, nbytes))
        self._device.release(address, nbytes)

    def map_zeroed(self, address: int, nbytes: int) -> None:
        """Back the range on every rank; when the first rank raises OSError, no other has tried."""
        self._device.map_zeroed(address, nbytes)
        self._repeat("map_zeroed", (address, nbytes))

    def map_unset(self, address: int, nbytes: int) -> None:
        """Back the range on every rank, as `map_zeroed`."""
        self._device.map_unset(address, nbytes)
        self._repeat("map_unset", (address, nbytes))

    def map_later(self, address: int, nbytes: int) -> Callable[[int, int], None]:
        """A `map_unset` of all: the others do things in order."""
        self.map_unset(address, nbytes)
        return lambda start, size: None

    def unmap(self, address: int, nbytes: int) -> None:
        """Take the memory away on every rank."""
        self._device.unmap(address, nbytes)
        self._repeat("unmap", (address, nbytes))

    def park(self, address: int, nbytes: int) -> None:
        """Let the memory go on every rank."""
        self._device.park(address, nbytes)
        self._repeat("park", (address, nbytes))

    def release_unused(self) -> int:
        """Give unused memory back on every rank; returns the first rank's bytes."""
        self._repeat("release_unused", ())
        return self._device.release_unused()

    def make_pages(self, count: int) -> None:
        """Make pages until there are `count` on every rank, as `CudaDevice.make_pages`; others make what they can."""
        self._device.make_pages(count)  # type: ignore[attr-defined]  # of a GPU
        self._repeat("make_pages", (count,))

    def fill(self, address: int, nbytes: int, byte: int) -> None:
        """Set every byte on every rank."""
        self._device.fill(address, nbytes, byte)
        self._repeat("fill", (address, nbytes, byte))

    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        """The first rank's tensor; the others are told which range is wanted."""
        self._repeat("tensor", (address, nbytes))
        return self._device.tensor(address, nbytes)

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        """A buffer on every rank; returns the first rank's, which stands for all."""
        buffer = self._device.host_buffer(nbytes)
        self._repeat("host_buffer", (buffer.data_ptr(), nbytes))
        return buffer

    def register_host(self, address: int, nbytes: int) -> Callable[[], None]:
        """Only the first rank's: groups of ranks share no mapping."""
        return self._device.register_host(address, nbytes)

    def copy_in(self, address: int, source: torch.Tensor) -> None:
        """Copy on every rank, each from its own buffer."""
        self.begin_copies_in([(address, source)]).wait()

    def copy_out(self, target: torch.Tensor, address: int) -> None:
        """Copy on every rank, each into its own buffer."""
        self.begin_copies_out([(address, target)]).wait()

    def begin_copies_in(self, copies: Sequence[BlockCopy]) -> Copies:
        """Copy on every rank, each from its own buffers; the others do so before whatever comes next."""
        self._repeat("copies_in", (_names(copies),))
        return self._device.begin_copies_in(copies)

    def begin_copies_out(self, copies: Sequence[BlockCopy]) -> Copies:
        """Copy on every rank, each into its own buffers; the others do so before whatever comes next."""
        self._repeat("copies_out", (_names(copies),))
        return self._device.begin_copies_out(copies)

    def begin_copy_in(self, address: int, source: torch.Tensor) -> Callable[[], None]:
        """Begin to copy on every rank; waits for the first rank only, as the others do things in order."""
        self._repeat("copies_in", (_names([(address, source)]),))
        return self._device.begin_copy_in(address, source)


def _names(copies: Sequence[BlockCopy]) -> list[tuple[int, int, int]]:
    return [(address, buffer.data_ptr(), buffer.numel()) for address, buffer in copies]


class Mirror:
    """Another rank's side: does on `device` what a `MirroredDevice` did. Used by one thread.

    Copies of blocks and weights are begun and not waited for; what this rank computes comes after them
    (`precede_compute`), and no memory goes before they have ended: the first rank knows of its own only.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self._under_way: deque[Copies] = deque()
        self._ranges: list[tuple[int, int, int]] = []  # the first rank's address, bytes, ours
        self._buffers: list[tuple[int, int, torch.Tensor]] = []  # the first rank's address, bytes, ours

    def do(self, name: str, args: tuple[Any, ...]) -> Any:
        """Repeat a call; returns what it returns here. Raises what the device raises, KeyError for unknown places."""
        if name in _AFTER_COPIES:
            self._wait_for_all_but(0)
        return getattr(self, f"_{name}")(*args)

    def precede_compute(self) -> None:
        """Let what this rank computes from now on come after all copies, without waiting where the device can do so."""
        self._forget_ended()
        if self._under_way:
            self._under_way[-1].precede_compute()  # they end in their order

    def _reserve(self, theirs: int, nbytes: int, harmless: bool = False) -> None:
        self._ranges.append((theirs, nbytes, self.device.reserve(nbytes, harmless=harmless)))

    def _release(self, theirs: int, nbytes: int) -> None:
        self.device.release(self.address(theirs), nbytes)
        self._ranges = [known for known in self._ranges if known[0] != theirs]

    def _map_zeroed(self, theirs: int, nbytes: int) -> None:
        self.device.map_zeroed(self.address(theirs), nbytes)

    def _map_unset(self, theirs: int, nbytes: int) -> None:
        self.device.map_unset(self.address(theirs), nbytes)

    def _unmap(self, theirs: int, nbytes: int) -> None:
        self.device.unmap(self.address(theirs), nbytes)

    def _park(self, theirs: int, nbytes: int) -> None:
        self.device.park(self.address(theirs), nbytes)

    def _release_unused(self) -> None:
        self.device.release_unused()
        _empty_cache()

    def _make_pages(self, count: int) -> None:
        _empty_cache()
        try:
            self.device.make_pages(count)  # type: ignore[attr-defined]  # of a GPU
        except OSError as error:
            logger.warning("pages that a loader had are made when they are needed, not all are there: %s", error)

    def _fill(self, theirs: int, nbytes: int, byte: int) -> None:
        self.device.fill(self.address(theirs), nbytes, byte)

    def _tensor(self, theirs: int, nbytes: int) -> torch.Tensor:
        return self.device.tensor(self.address(theirs), nbytes)

    def _host_buffer(self, theirs: int, nbytes: int) -> torch.Tensor:
        buffer = self.device.host_buffer(nbytes)
        # Whatever lay at that address before is gone on the first rank, so it goes here too.
        self._buffers = [b for b in self._buffers if b[0] >= theirs + nbytes or b[0] + b[1] <= theirs]
        self._buffers.append((theirs, nbytes, buffer))
        return buffer

    def _copies_in(self, copies: Sequence[tuple[int, int, int]]) -> None:
        self._begun(self.device.begin_copies_in(self._places(copies)))

    def _copies_out(self, copies: Sequence[tuple[int, int, int]]) -> None:
        self._begun(self.device.begin_copies_out(self._places(copies)))

    def _places(self, copies: Sequence[tuple[int, int, int]]) -> list[BlockCopy]:
        return [(self.address(address), self._slice(buffer, size)) for address, buffer, size in copies]

    def _begun(self, copies: Copies) -> None:
        self._under_way.append(copies)
        self._forget_ended()
        self._wait_for_all_but(_MOST_UNDER_WAY)

    def _forget_ended(self) -> None:
        while self._under_way and self._under_way[0].done():
            self._under_way.popleft()

    def _wait_for_all_but(self, number: int) -> None:
        while len(self._under_way) > number:
            self._under_way.popleft().wait()

    def address(self, theirs: int) -> int:
        """Our address for one of the first rank's; raises KeyError if it lies in no range."""
        for start, nbytes, ours in self._ranges:
            if start <= theirs < start + nbytes:
                return ours + theirs - start
        raise KeyError(f"address {theirs:#x} is in no range of the first rank")

    def _slice(self, theirs: int, nbytes: int) -> torch.Tensor:
        for start, size, buffer in self._buffers:
            if start <= theirs and theirs + nbytes <= start + size:
                return buffer[theirs - start : theirs - start + nbytes]
        raise KeyError(f"{nbytes} bytes at {theirs:#x} are in no host buffer of the first rank")


def _empty_cache() -> None:
    """Give what torch holds of this rank's GPU and does not use back to it."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
