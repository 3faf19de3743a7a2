# SPDX-License-Identifier: Apache-2.0
"""The seam between the pool and a device's memory: reserve addresses, back them, take the backing away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

BlockCopy = tuple[int, torch.Tensor]
"""An address on the device and the host buffer, or slice of one, whose bytes come from or go there."""


class Device(Protocol):
    """Memory calls the pool needs; all sizes and offsets are bytes and multiples of `granularity`."""

    granularity: int
    copies_in_flight: int
    """Copies of `begin_copy_in` that should be under way at a time, so that the link is always busy."""

    def reserve(self, nbytes: int) -> int:
        """Reserve `nbytes` of address range without memory behind it; returns its address."""

    def release(self, address: int, nbytes: int) -> None:
        """Give a reserved range back; nothing may use it any more."""

    def map_zeroed(self, address: int, nbytes: int) -> None:
        """Back the range with memory that reads as zero; when it raises OSError, nothing is mapped."""

    def unmap(self, address: int, nbytes: int) -> None:
        """Take the memory away: any later access faults instead of reading stale bytes."""

    def fill(self, address: int, nbytes: int, byte: int) -> None:
        """Set every byte of a mapped range to `byte`."""

    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        """An int8 tensor of shape (nbytes,) over the range, its own storage, no copy."""

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        """A uint8 tensor of shape (nbytes,) in host memory from and to which this device copies fast."""

    def copy_in(self, address: int, source: torch.Tensor) -> None:
        """Copy a host buffer, or a slice of one, to a mapped range; returns when it is there."""

    def copy_out(self, target: torch.Tensor, address: int) -> None:
        """Copy `target.numel()` bytes of a mapped range into a host buffer; returns when they are there."""

    def copy_blocks_in(self, copies: Sequence[BlockCopy]) -> None:
        """Do many `copy_in` at once; returns when all are there. When it raises, any part may be."""

    def copy_blocks_out(self, copies: Sequence[BlockCopy]) -> None:
        """Do many `copy_out` at once; returns when all are there. When it raises, any part may be."""

    def begin_copy_in(self, address: int, source: torch.Tensor) -> Callable[[], None]:
        """Begin to copy a host buffer to a mapped range that nothing computes with; callable on any thread.

        The function that is returned waits until the bytes are there. It must be called, once, before the range is
        unmapped or the buffer is changed.
        """
