# SPDX-License-Identifier: Apache-2.0
"""Memory that processes share by a file descriptor: written once, sealed for ever, then read by all.

It is a memfd. While it is filled it is mapped for writing; `seal` puts a mapping that cannot be written to in the same
place, so tensors over it stay valid, and has the kernel refuse every later write, in whatever process, and every change
of size.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import weakref
from collections.abc import Callable

import torch

from tokenpool.memory.copies.seals import SEALS, check_sealed

_MAP_FAILED = ctypes.c_void_p(-1).value
_MAP_FIXED = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class SharedMemory:
    """One memfd, and this process' mapping of it, which lives as long as the tensor over it or a part of that does."""

    def __init__(self, file: int, nbytes: int, *, writable: bool) -> None:
        """Takes `file` over. Raises OSError, and closes it, when it cannot be mapped."""
        self.file = file
        """The descriptor; open as long as this object is there."""
        self.nbytes = nbytes
        self._close = weakref.finalize(self, os.close, file)
        self._address = _map(file, nbytes, writable=writable)
        memory = (ctypes.c_byte * nbytes).from_address(self._address)
        self._unregister: list[Callable[[], None]] = []
        weakref.finalize(memory, _unmap, self._address, nbytes, self._unregister).atexit = False
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)
        """Flat uint8, shape (nbytes,); one that is sealed must not be written to: that ends the process."""

    @classmethod
    def make(cls, nbytes: int) -> SharedMemory:
        """New memory, all zeros, which nothing backs before it is written to; raises OSError."""
        file = os.memfd_create("tokenpool-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(file, nbytes)
        except BaseException:
            os.close(file)
            raise
        return cls(file, nbytes, writable=True)

    @classmethod
    def open(cls, file: int, nbytes: int) -> SharedMemory:
        """The sealed memory behind a descriptor, which is taken over; raises OSError, ValueError for any other."""
        try:
            check_sealed(file, nbytes)
        except BaseException:
            os.close(file)
            raise
        return cls(file, nbytes, writable=False)

    def seal(self) -> None:
        """Let nobody write any more; raises OSError, with the mapping as it was or read-only already."""
        _map(self.file, self.nbytes, writable=False, over=self._address)
        fcntl.fcntl(self.file, fcntl.F_ADD_SEALS, SEALS)

    def register(self, register: Callable[[int, int], Callable[[], None]]) -> None:
        """Tell a device of the sealed mapping, until it goes; raises what the device raises."""
        if not self._unregister:
            self._unregister.append(register(self._address, self.nbytes))

    def close(self) -> None:
        """Close the descriptor; the mapping stays as long as a tensor is over it."""
        self._close()


def _unmap(address: int, nbytes: int, unregister: list[Callable[[], None]]) -> None:
    for each in unregister:
        with contextlib.suppress(OSError):
            each()
    _libc.munmap(address, nbytes)


def _map(file: int, nbytes: int, *, writable: bool, over: int = 0) -> int:
    """Map a file, anywhere or in the place of a mapping of the same size; returns the address."""
    readable = -1
    if not writable:
        # Kernels before 6.7 refuse to share sealed memory with whoever could write to it by this descriptor.
        with contextlib.suppress(OSError):  # no /proc: newer ones do not mind
            readable = os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_CLOEXEC)
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    flags = mmap.MAP_SHARED | (_MAP_FIXED if over else 0)
    try:
        address = _libc.mmap(over or None, nbytes, protection, flags, file if readable < 0 else readable, 0)
        error = ctypes.get_errno()
    finally:
        if readable >= 0:
            os.close(readable)
    if address in (None, _MAP_FAILED):
        raise OSError(error, f"cannot map {nbytes} bytes of shared memory: {os.strerror(error)}")
    return int(address)
