# SPDX-License-Identifier: Apache-2.0
"""A device that counts what is copied through it, so that nobody has to believe a comment about it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from tokenpool.memory.devices.device import Device


class CountedDevice:
    """Passes on to `device` the calls that weights need, and adds up the bytes of both directions; see `Device`.

    `begin_copies_in` and `begin_copies_out` are not here: they move KV, which its host tier counts.
    """

    def __init__(self, device: Device) -> None:
        self.granularity = device.granularity
        self.copies_in_flight = device.copies_in_flight
        self.reserve = device.reserve
        self.release = device.release
        self.map_later = device.map_later
        self.unmap = device.unmap
        self.fill = device.fill
        self.tensor = device.tensor
        self.host_buffer = device.host_buffer
        self.bytes_to_device = 0
        """Bytes that `copy_in` and `begin_copy_in` moved from host memory to the device."""
        self.bytes_to_host = 0
        """Bytes that `copy_out` moved from the device to host memory."""
        self._device = device
        self._lock = threading.Lock()  # both the loop's thread and the side thread copy

    def copy_in(self, address: int, source: torch.Tensor) -> None:
        """Copy a host buffer to a mapped range, and count it when it is there."""
        self._device.copy_in(address, source)
        with self._lock:
            self.bytes_to_device += source.numel()

    def begin_copy_in(self, address: int, source: torch.Tensor) -> Callable[[], None]:
        """Begin to copy a host buffer to a mapped range; it counts when it was waited for."""
        wait = self._device.begin_copy_in(address, source)
        nbytes = source.numel()

        def wait_and_count() -> None:
            wait()
            with self._lock:
                self.bytes_to_device += nbytes

        return wait_and_count

    def copy_out(self, target: torch.Tensor, address: int) -> None:
        """Copy a mapped range into a host buffer, and count it when it is there."""
        self._device.copy_out(target, address)
        with self._lock:
            self.bytes_to_host += target.numel()
