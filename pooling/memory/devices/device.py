# SPDX-License-Identifier: Apache-2.0
"""The seam between the pool and a device's memory: reserve addresses, back them, take the backing away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

BlockCopy = tuple[int, torch.Tensor]
"""An address on the device and the host buffer, or slice of one, whose bytes come from or go there."""


class Copies(Protocol):
    """Copies that were begun together; used on the thread that began them.

    Those of one device end in the order in which they were begun. Until then nobody may touch the host buffers, nor
    the places on the device but through what the engine computes after `precede_compute`.
    """

    def done(self) -> bool:
        """Whether all have ended; does not wait."""

    def wait(self) -> None:
        """Wait until all have ended."""

    def precede_compute(self) -> None:
        """Let all that the engine computes from now on come after them, without waiting where the device can do so."""

    @property
    def seconds(self) -> float:
        """How long they took, once they have ended."""


class Device(Protocol):
    """Memory calls the pool needs; all sizes and offsets are bytes and multiples of `granularity`."""

    granularity: int
    copies_in_flight: int
    """Copies of `begin_copy_in` that should be under way at a time, so that the link is always busy."""
    chunk_bytes: int
    """Bytes of each of these: the more, the less often somebody has to be awake, and the later a copy is given up."""
    copies_beside: bool
    """Whether `begin_copies_in` and `begin_copies_out` return before the copies have ended."""
    burst_bytes: int
    """What is copied between host and device in about 10 ms."""

    def reserve(self, nbytes: int, *, harmless: bool = False) -> int:
        """Reserve `nbytes` of address range without memory behind it; returns its address.

        With `harmless` a place without memory of its own may be read, where the device can do so: it reads as zero,
        or as old bytes where it is parked.
        """

    def release(self, address: int, nbytes: int) -> None:
        """Give a reserved range back; nothing may use it any more."""

    def map_zeroed(self, address: int, nbytes: int) -> None:
        """Back the range with memory that the engine, and copies, read as zero; if it raises OSError, with none."""

    def map_unset(self, address: int, nbytes: int) -> None:
        """Back the range with memory of any bytes, for whoever overwrites all of it; raises as `map_zeroed`."""

    def map_later(self, address: int, nbytes: int) -> Callable[[int, int], None]:
        """Take memory for a range as `map_unset` does; the function returned puts part of it there.

        It is given an address and bytes within the range, must be called before that part is used, on any thread, and
        may be called again; it raises OSError. `unmap` of the range takes all away, whatever was put there.
        """

    def unmap(self, address: int, nbytes: int) -> None:
        """Take the memory away: any later access faults instead of reading stale bytes. No copy of it is under way."""

    def park(self, address: int, nbytes: int) -> None:
        """Let the memory go after all that the engine and begun copies do with it; later bytes are of no meaning.

        Where accesses fault afterwards this waits for those copies; where they are harmless it waits for nothing.
        """

    def release_unused(self) -> int:
        """Give memory that is behind no page, and was kept for the next, back to whoever has it; returns its bytes."""

    def fill(self, address: int, nbytes: int, byte: int) -> None:
        """Set every byte of a mapped range to `byte`, after all that begun copies do with it."""

    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        """An int8 tensor of shape (nbytes,) over the range, its own storage, no copy."""

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        """A uint8 tensor of shape (nbytes,) in host memory from and to which this device copies fast."""

    def register_host(self, address: int, nbytes: int) -> Callable[[], None]:
        """Let this device copy fast from a mapping that cannot be written to, until the function returned is called."""

    def copy_in(self, address: int, source: torch.Tensor) -> None:
        """Copy a host buffer, or a slice of one, to a mapped range; returns when it is there."""

    def copy_out(self, target: torch.Tensor, address: int) -> None:
        """Copy `target.numel()` bytes of a mapped range into a host buffer; returns when they are there."""

    def begin_copies_in(self, copies: Sequence[BlockCopy]) -> Copies:
        """Begin many `copy_in` at once. When it raises, any part is there and none is under way."""

    def begin_copies_out(self, copies: Sequence[BlockCopy]) -> Copies:
        """Begin many `copy_out` at once. When it raises, any part is there and none is under way."""

    def begin_copy_in(self, address: int, source: torch.Tensor) -> Callable[[], None]:
        """Begin to copy a host buffer to a mapped range that nothing computes with; callable on any thread.

        The function that is returned waits until the bytes are there. It must be called, once, before the range is
        unmapped or the buffer is changed.
        """
