# SPDX-License-Identifier: Apache-2.0
"""The seam between the pool and a device's memory: reserve addresses, back them, take the backing away."""

from __future__ import annotations

from typing import Protocol

import torch


class Device(Protocol):
    """Memory calls the pool needs; all sizes and offsets are bytes and multiples of `granularity`."""

    granularity: int

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
        """Copy a host buffer, or a slice of one, to a mapped range; any thread, returns when it is there."""

    def copy_out(self, target: torch.Tensor, address: int) -> None:
        """Copy `target.numel()` bytes of a mapped range into a host buffer; any thread, returns when done."""
