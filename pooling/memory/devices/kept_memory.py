# SPDX-License-Identifier: Apache-2.0
"""Memory of the CPU device that is behind no page and is kept for the next one, as a GPU's page handles are.

The kernel zeroes every page that it gives, and in a virtual machine may have to ask the hypervisor for it first: fresh
memory costs several times what the copy into it does. So what is unmapped stays where it is, without access, until a
range that will be overwritten needs memory; then it is moved there, still full of what it held, by the page tables
alone. It is kept in blocks of the size of a huge page, so that huge pages stay whole.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable

HUGE_PAGE = 2 << 20
_PROT_NONE = 0
_MADV_DONTNEED = 4
_MREMAP_MAYMOVE, _MREMAP_FIXED, _MREMAP_DONTUNMAP = 1, 2, 4
_MAP_NORESERVE, _MAP_FIXED_NOREPLACE = 0x4000, 0x100000
_MOST_MOVED = 16 << 10
"""Places to which a block has been moved: each is a mapping of its own, of which the kernel gives a process 65,530."""

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def check(result: int, call: str) -> None:
    """Raise OSError with what the kernel said unless `result` is 0."""
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{call}: {os.strerror(error)}")


class KeptMemory:
    """Blocks of one device; ranges are (address, bytes) of private memory without a file, all used on one thread.

    Mapped and kept memory together are never more than what was mapped at some time.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, None] = {}  # addresses, the last kept one last
        self._moved: set[int] = set()  # addresses to which blocks were moved
        self._can_move = True
        self._unclaimed_bytes = 0  # went back to the kernel, and may be asked for again

    @property
    def nbytes(self) -> int:
        """How much is kept."""
        return len(self._blocks) * HUGE_PAGE

    def map(self, address: int, nbytes: int, *, zeroed: bool) -> None:
        """Allow access to a range that has none; with `zeroed` it reads as zero, else it holds any bytes.

        Raises OSError; the range has no access then.
        """
        reused = 0
        if not zeroed:
            blocks = _whole_blocks(address, nbytes)
            missing = [block for block in blocks if block not in self._blocks]
            for block in blocks:  # none of its own is to move elsewhere
                self._blocks.pop(block, None)
            reused = len(blocks) - len(missing) + sum(map(self._move_to, missing))
        self._drop(block for block in _touched_blocks(address, nbytes) if block in self._blocks)
        try:
            check(libc.mprotect(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE), "mprotect")
        except OSError:
            libc.mprotect(address, nbytes, _PROT_NONE)
            libc.madvise(address, nbytes, _MADV_DONTNEED)
            raise
        self._unclaimed_bytes -= nbytes - reused * HUGE_PAGE
        while self._unclaimed_bytes < 0 and self._blocks:
            self._drop([next(iter(self._blocks))])
        self._unclaimed_bytes = max(0, self._unclaimed_bytes)

    def unmap(self, address: int, nbytes: int) -> None:
        """Forbid access to a range; whole blocks are kept, the rest goes back to the kernel."""
        check(libc.mprotect(address, nbytes, _PROT_NONE), "mprotect")
        blocks = _whole_blocks(address, nbytes) if self._can_move else range(0)
        end = address + nbytes
        first, last = (blocks[0], blocks[-1] + HUGE_PAGE) if blocks else (end, end)
        for start, stop in ((address, first), (last, end)):
            if start < stop:
                check(libc.madvise(start, stop - start, _MADV_DONTNEED), "madvise")
                self._unclaimed_bytes += stop - start
        self._blocks |= dict.fromkeys(blocks)

    def forget(self, address: int, nbytes: int) -> None:
        """A range goes back to the kernel, with what is kept there."""
        gone = range(address, address + nbytes)
        self._moved.difference_update([block for block in self._moved if block in gone])
        for block in [block for block in self._blocks if block in gone]:
            del self._blocks[block]
            self._unclaimed_bytes += HUGE_PAGE

    def release(self) -> int:
        """Give all that is kept back to the kernel; returns bytes."""
        nbytes = self.nbytes
        self._drop(self._blocks)
        self._unclaimed_bytes = 0
        return nbytes

    def _move_to(self, block: int) -> bool:
        """Put kept memory there, if any can be; it has no access yet."""
        if not self._blocks or not self._can_move or (len(self._moved) >= _MOST_MOVED and block not in self._moved):
            return False
        source, _ = self._blocks.popitem()
        flags = _MREMAP_MAYMOVE | _MREMAP_FIXED | _MREMAP_DONTUNMAP
        if libc.mremap(source, HUGE_PAGE, HUGE_PAGE, flags, block) == block:
            self._moved.add(block)
            return True
        # A kernel that cannot do it, or has no more mappings for this process. It may have cleared the place before.
        keep_place = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED_NOREPLACE
        libc.mmap(block, HUGE_PAGE, _PROT_NONE, keep_place, -1, 0)
        self._can_move = False
        self._drop([source, *self._blocks])
        return False

    def _drop(self, blocks: Iterable[int]) -> None:
        for block in list(blocks):
            self._blocks.pop(block, None)
            check(libc.madvise(block, HUGE_PAGE, _MADV_DONTNEED), "madvise")
            self._unclaimed_bytes += HUGE_PAGE


def _whole_blocks(address: int, nbytes: int) -> range:
    """Addresses of blocks that lie in a range."""
    return range(-(-address // HUGE_PAGE) * HUGE_PAGE, address + nbytes - HUGE_PAGE + 1, HUGE_PAGE)


def _touched_blocks(address: int, nbytes: int) -> range:
    """Addresses of blocks that have a byte in a range."""
    return range(address // HUGE_PAGE * HUGE_PAGE, address + nbytes, HUGE_PAGE)
