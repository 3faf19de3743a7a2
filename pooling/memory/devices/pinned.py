# SPDX-License-Identifier: Apache-2.0
"""Page-locked host memory of an exact size, near a GPU, made by several threads where it is large.

The driver makes page-locked memory on one thread, 1 to 2 GB/s by public figures. What takes the time is to fault the
pages in and to zero them, so large buffers are ordinary memory in huge pages that threads touch first, and that the
driver then locks. How much quicker that is has not been measured: not yet run on hardware.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from tokenpool.memory.devices.cuda_driver import CudaDriver

LARGE_BYTES = 8 << 20
_PART_BYTES = 64 << 20
_THREADS = 8


def pinned_buffer(driver: CudaDriver, nbytes: int, cpus: frozenset[int]) -> torch.Tensor:
    """A uint8 tensor of shape (nbytes,) in page-locked memory, made on `cpus` if any, freed with its last tensor.

    Not torch's pinned memory, which is rounded up to a power of two and cached. Raises CudaError when the driver
    refuses, MemoryError or OSError when the machine has no memory.
    """
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    with _running_on(cpus):
        return _registered(driver, nbytes) if nbytes >= LARGE_BYTES else _allocated(driver, nbytes)


def _allocated(driver: CudaDriver, nbytes: int) -> torch.Tensor:
    address = driver.pin(nbytes)
    memory = (ctypes.c_byte * nbytes).from_address(address)
    weakref.finalize(memory, driver.unpin, address).atexit = False
    return torch.frombuffer(memory, dtype=torch.uint8)  # its storage keeps `memory` alive


def _registered(driver: CudaDriver, nbytes: int) -> torch.Tensor:
    own = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    own.madvise(mmap.MADV_DONTFORK)  # after a fork the GPU would have the pages of one process, and we others
    with suppress(OSError):  # a kernel without huge pages
        own.madvise(mmap.MADV_HUGEPAGE)
    memory = (ctypes.c_byte * nbytes).from_buffer(own)  # which keeps the mapping
    address = ctypes.addressof(memory)
    parts = [(address + start, 0, min(_PART_BYTES, nbytes - start)) for start in range(0, nbytes, _PART_BYTES)]
    with ThreadPoolExecutor(min(_THREADS, len(parts))) as threads:  # they run where this thread may
        list(threads.map(lambda part: ctypes.memset(*part), parts))
    driver.register(address, nbytes)
    weakref.finalize(memory, driver.unregister, address).atexit = False
    return torch.frombuffer(memory, dtype=torch.uint8)


def cpus_near(pci_bus_id: str, devices: Path = Path("/sys/bus/pci/devices")) -> frozenset[int]:
    """The cores of the GPU's NUMA node; empty = not known."""
    try:
        text = (devices / pci_bus_id / "local_cpulist").read_text().strip()
    except OSError:
        return frozenset()
    cpus: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


@contextmanager
def _running_on(cpus: frozenset[int]) -> Iterator[None]:
    """Run this thread on `cpus`, if any: pages come from the node of the thread that touches them first."""
    before = os.sched_getaffinity(0)
    try:
        if cpus:
            with suppress(OSError):  # none of them is ours: memory of another node is slower and works
                os.sched_setaffinity(0, cpus)
        yield
    finally:
        os.sched_setaffinity(0, before)
