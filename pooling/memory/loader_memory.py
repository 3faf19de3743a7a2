# SPDX-License-Identifier: Apache-2.0
"""What a loader's memory becomes when the weights have left it: wrong bytes, for whoever still reads them."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable

import torch

_POISON = 0xFF  # NaN in every float type
_MADV_DONTNEED = 4
_LEAST_DROPPED_BYTES = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class LoaderMemory:
    """The storages behind `tensors` as they are now; keeps them, so that nothing else comes to their place."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        self._storages = list(storages.values())

    def poison(self, *, fill: bool = True) -> None:
        """Fill all with 0xFF, unless what is there is wrong anyway; call it when no tensor views them any more.

        On the CPU they stay until `free`, large ones without most of their memory: their whole pages then read as
        zeros, or as a file if they are mapped from one. On another device they are let go at once.
        """
        for storage in self._storages:
            flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            if fill:
                flat.fill_(_POISON)
            if storage.device.type == "cpu" and storage.nbytes() >= _LEAST_DROPPED_BYTES:
                _drop_pages(storage.data_ptr(), storage.nbytes())
        self._storages = [storage for storage in self._storages if storage.device.type == "cpu"]

    def free(self) -> None:
        """Let them go."""
        self._storages.clear()


def _drop_pages(address: int, nbytes: int) -> None:
    """Give the memory of the whole pages in a range back; what is refused stays as it is."""
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    _libc.madvise(start, (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start, _MADV_DONTNEED)
