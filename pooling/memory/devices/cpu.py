# SPDX-License-Identifier: Apache-2.0
"""The embedded CPU device: address ranges from mmap, pages without access until they are granted.

An unmapped page is PROT_NONE, so a kernel that touches a block it does not own crashes the process
instead of reading another model's bytes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import torch

from tokenpool.memory.devices.device import BlockCopy, Copies
from tokenpool.memory.devices.kept_memory import HUGE_PAGE, KeptMemory, check, libc

_PROT_NONE = 0
_MAP_NORESERVE = 0x4000
_LEAST_MAPPED_BYTES = 1 << 20
_BURST_BYTES = 64 << 20
_MAP_FAILED = ctypes.c_void_p(-1).value


class _CpuCopies:
    """Copies that a thread does, or has done; see `Copies`."""

    def __init__(self, seconds: Future[float]) -> None:
        self._seconds = seconds

    def done(self) -> bool:
        """See `Copies`."""
        return self._seconds.done()

    def wait(self) -> None:
        """See `Copies`."""
        self._seconds.result()

    precede_compute = wait

    @property
    def seconds(self) -> float:
        """See `Copies`."""
        return self._seconds.result()


class CpuDevice:
    """Host memory as a device; see `Device` for the contract.

    What is unmapped is kept for ranges that will be overwritten; zeroed ones get pages from the kernel. With
    `keeps_bytes`, for tests, an unmapped range keeps its memory for itself, and `map_zeroed` clears it.
    """

    granularity = mmap.PAGESIZE
    copies_in_flight = 1
    chunk_bytes = 8 << 20

    def __init__(self, *, keeps_bytes: bool = False, link_bytes_per_s: int | None = None) -> None:
        self.keeps_bytes = keeps_bytes
        self._kept = KeptMemory()
        self.link_bytes_per_s = link_bytes_per_s
        """Copies to and from the device are held to this speed, as by a bus; None = as fast as memory is."""
        self._bus: ThreadPoolExecutor | None = None
        self._on_bus: deque[tuple[Future[float], Sequence[BlockCopy]]] = deque()
        self.burst_bytes = _BURST_BYTES
        if link_bytes_per_s is not None:
            self._bus = ThreadPoolExecutor(1, thread_name_prefix="kv-copy")
            self.burst_bytes = link_bytes_per_s // 100
        self.copies_beside = self._bus is not None

    def reserve(self, nbytes: int, *, harmless: bool = False) -> int:
        """Reserve `nbytes` of address range without access; raises OSError when the kernel refuses.

        Never harmless: a stray access ends the process, so that tests see it.
        """
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        start = libc.mmap(None, nbytes + HUGE_PAGE, _PROT_NONE, flags, -1, 0)
        if start in (None, _MAP_FAILED):
            error = ctypes.get_errno()
            raise OSError(error, f"cannot reserve {nbytes} bytes of address range: {os.strerror(error)}")
        # Aligned, so that the kernel can back it with huge pages: filling fresh 4 KiB pages takes several times as
        # long as the copy itself. Where it has none to give, nothing is lost.
        address = -(-start // HUGE_PAGE) * HUGE_PAGE
        end = address + -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if address > start:
            check(libc.munmap(start, address - start), "munmap")
        if (rest := start + nbytes + HUGE_PAGE - end) > 0:
            check(libc.munmap(end, rest), "munmap")
        libc.madvise(address, nbytes, mmap.MADV_HUGEPAGE)
        return address

    def release(self, address: int, nbytes: int) -> None:
        """Give the range back to the kernel."""
        self._kept.forget(address, nbytes)
        check(libc.munmap(address, nbytes), "munmap")

    def map_zeroed(self, address: int, nbytes: int) -> None:
        """Allow access to the range, every byte of it zero."""
        self._map(address, nbytes, zeroed=True)
        if self.keeps_bytes:
            self.fill(address, nbytes, 0)

    def map_unset(self, address: int, nbytes: int) -> None:
        """Allow access to the range."""
        self._map(address, nbytes, zeroed=False)

    def _map(self, address: int, nbytes: int, *, zeroed: bool) -> None:
        if self.keeps_bytes:
            check(libc.mprotect(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE), "mprotect")
        else:
            self._kept.map(address, nbytes, zeroed=zeroed)

    def map_later(self, address: int, nbytes: int) -> Callable[[int, int], None]:
        """A `map_unset`: memory that is kept is there at once."""
        self.map_unset(address, nbytes)
        return lambda start, size: None

    def unmap(self, address: int, nbytes: int) -> None:
        """Forbid access to the range."""
        if self.keeps_bytes:
            check(libc.mprotect(address, nbytes, _PROT_NONE), "mprotect")
        else:
            self._kept.unmap(address, nbytes)

    def park(self, address: int, nbytes: int) -> None:
        """An `unmap` behind the copies that are under way there: here a stray access must show."""
        self.settle(address, nbytes)
        self.unmap(address, nbytes)

    def settle(self, address: int, nbytes: int) -> None:
        """Wait for the copies of blocks in the range that are under way."""
        for seconds, copies in self._on_bus:
            if any(start < address + nbytes and address < start + buffer.numel() for start, buffer in copies):
                seconds.result()

    def release_unused(self) -> int:
        """Give what is kept back to the kernel."""
        return self._kept.release()

    def fill(self, address: int, nbytes: int, byte: int) -> None:
        """Set every byte of a mapped range, after copies of it that are under way."""
        self.settle(address, nbytes)
        ctypes.memset(address, byte, nbytes)

    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        """An int8 tensor of shape (nbytes,) over the range; it does not keep the range reserved."""
        return torch.frombuffer((ctypes.c_byte * nbytes).from_address(address), dtype=torch.int8)

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        """Ordinary memory; all but small buffers go back to the kernel when they are freed.

        malloc does not promise that: it takes memory of some size from its heap, the more so the longer it runs.
        """
        if nbytes < _LEAST_MAPPED_BYTES:
            return torch.empty(nbytes, dtype=torch.uint8)
        own = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without large pages backs it with small ones
            own.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(own, dtype=torch.uint8)  # which keeps the mapping as long as it lives

    def register_host(self, address: int, nbytes: int) -> Callable[[], None]:
        """Nothing: all host memory is as good."""
        return lambda: None

    def copy_in(self, address: int, source: torch.Tensor) -> None:
        """A memmove, during which other Python threads run."""
        start = time.perf_counter()
        ctypes.memmove(address, source.data_ptr(), source.numel())
        self._pace(source.numel(), start)

    def copy_out(self, target: torch.Tensor, address: int) -> None:
        """A memmove, during which other Python threads run."""
        start = time.perf_counter()
        ctypes.memmove(target.data_ptr(), address, target.numel())
        self._pace(target.numel(), start)

    def begin_copies_in(self, copies: Sequence[BlockCopy]) -> Copies:
        """One `copy_in` after the other, on a side thread if there is a bus to wait for, else at once."""
        return self._begin(copies, self.copy_in)

    def begin_copies_out(self, copies: Sequence[BlockCopy]) -> Copies:
        """One `copy_out` after the other, on a side thread if there is a bus to wait for, else at once."""
        return self._begin(copies, lambda address, target: self.copy_out(target, address))

    def _begin(self, copies: Sequence[BlockCopy], copy: Callable[[int, torch.Tensor], None]) -> Copies:
        def work() -> float:
            start = time.perf_counter()
            for address, buffer in copies:
                copy(address, buffer)
            return time.perf_counter() - start

        if self._bus is not None:
            while self._on_bus and self._on_bus[0][0].done():
                self._on_bus.popleft()
            self._on_bus.append((self._bus.submit(work), copies))
            return _CpuCopies(self._on_bus[-1][0])
        done: Future[float] = Future()
        done.set_result(work())
        return _CpuCopies(done)

    def begin_copy_in(self, address: int, source: torch.Tensor) -> Callable[[], None]:
        """A `copy_in`; there is nothing to wait for afterwards."""
        self.copy_in(address, source)
        return lambda: None

    def _pace(self, nbytes: int, start: float) -> None:
        """Sleep off the rest of the time that a copy takes on the link; like one by a copy engine, it uses no core."""
        if self.link_bytes_per_s is not None:
            time.sleep(max(0.0, nbytes / self.link_bytes_per_s - (time.perf_counter() - start)))
