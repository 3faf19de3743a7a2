# SPDX-License-Identifier: Apache-2.0
"""Where the host copy of one model's weights lies: in memory of this process, or in memory that the node shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

MakeRoom = Callable[[int], None]
"""Gives up so many bytes of host memory if it can, for what is wanted more."""


class HostCopy(Protocol):
    """One copy, from before it is there until it is released; `claim` returns at once."""

    @property
    def tensor(self) -> torch.Tensor:
        """Flat uint8, once it is allocated or whole; a published one must not be written to."""

    @property
    def is_whole(self) -> bool:
        """Whether all of its bytes are there already, from another process."""

    @property
    def meta(self) -> bytes:
        """What was said of it when it was published."""

    def claim(self) -> bool:
        """Find out whether it is there; False while another process fills it: ask again, some ms later."""

    def prepare(self, nbytes: int) -> None:
        """Say how large one that is not whole will be, before the host's ledger hears of it."""

    def allocate(self, nbytes: int, make_room: MakeRoom) -> None:
        """Get memory for it; raises OSError."""

    def publish(self, meta: bytes) -> None:
        """Let other processes have it too, if it can be; never fails. No copy from or to it may be under way."""

    def release(self) -> None:
        """Need it no more, whatever it is; tensors over it stay valid. May be called twice."""

    def again(self) -> HostCopy:
        """The same content once more, not claimed yet."""


class BufferMaker(Protocol):
    """As much of a device as a private copy needs."""

    def host_buffer(self, nbytes: int, /) -> torch.Tensor:
        """See `Device`."""


class PrivateCopy:
    """Memory of this process alone, of the device's making; see `HostCopy`."""

    is_whole = False
    meta = b""

    def __init__(self, device: BufferMaker) -> None:
        self._device = device
        self._tensor: torch.Tensor | None = None

    @property
    def tensor(self) -> torch.Tensor:
        """See `HostCopy`."""
        assert self._tensor is not None, "the copy has no memory yet"
        return self._tensor

    def claim(self) -> bool:
        """See `HostCopy`: nobody else fills it."""
        return True

    def prepare(self, nbytes: int) -> None:
        """See `HostCopy`."""

    def allocate(self, nbytes: int, make_room: MakeRoom) -> None:
        """See `HostCopy`; the ledger of the host has made room already."""
        self._tensor = self._device.host_buffer(nbytes)

    def publish(self, meta: bytes) -> None:
        """See `HostCopy`: it stays what it is."""

    def release(self) -> None:
        """See `HostCopy`."""
        self._tensor = None

    def again(self) -> PrivateCopy:
        """See `HostCopy`."""
        return PrivateCopy(self._device)
