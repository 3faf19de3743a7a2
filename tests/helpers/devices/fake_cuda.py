# SPDX-License-Identifier: Apache-2.0
"""`cuda.bindings.driver` for a machine without a GPU: records calls, refuses wrong ones, and moves real bytes.

Physical handles are memory files, mapping is mmap, a page without access faults. Work on a stream is done when
somebody waits for it and not before, so that a missing wait shows as missing bytes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum
from itertools import count
from types import SimpleNamespace
from typing import Any

from tokenpool.memory.devices.cuda import BatchCopy, CudaDevice
from tokenpool.memory.devices.cuda_driver import CudaDriver
from tokenpool.memory.devices.dlpack import CPU

GRANULARITY = 64 << 10
Ways = Sequence[tuple[int, BatchCopy | None]]
_FIXED = 0x10
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_READY = 600


def _enum(**names: int) -> Any:
    return SimpleNamespace(**{name: SimpleNamespace(name=name, value=value) for name, value in names.items()})


class FakeCuda:
    """The module's names that `CudaDriver` uses. `calls` holds (name, *args) of every call that was made."""

    CUresult = Result
    CUmemAllocationType = _enum(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemLocationType = _enum(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAccess_flags = _enum(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
    CUmemAllocationGranularity_flags = _enum(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)
    CUstreamCaptureMode = _enum(CU_STREAM_CAPTURE_MODE_RELAXED=2)
    CUstream_flags = _enum(CU_STREAM_NON_BLOCKING=1)
    CUevent_flags = _enum(CU_EVENT_BLOCKING_SYNC=1, CU_EVENT_DISABLE_TIMING=2)

    def __init__(self, handles: int = 10_000) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.allowed: dict[str, int] = {}
        """Name of a call -> how many of them still succeed."""
        self.handles_left = handles
        self.handles: dict[int, int] = {}  # handle -> memory file
        self.reserved: dict[int, int] = {}
        self.mapped: dict[int, int] = {}  # address -> handle
        self.readable: set[int] = set()
        self.pinned: dict[int, int] = {}
        self.threads: list[tuple[int, str]] = []
        self._names = count(100)
        self._streams: dict[int, deque[Any]] = {0: deque()}
        self._events: dict[int, tuple[int, object] | None] = {}
        self._timed: set[int] = set()
        self._lock = threading.RLock()
        self._page = 0

    def __getattr__(self, name: str) -> Any:
        call = getattr(type(self), f"_{name}", None)
        if not name.startswith("cu") or call is None:
            raise AttributeError(name)

        def checked(*args: Any) -> tuple[Any, ...]:
            with self._lock:
                self.calls.append((name, *args))
                if name in self.allowed:
                    self.allowed[name] -= 1
                    if self.allowed[name] < 0:
                        return (Result.CUDA_ERROR_INVALID_VALUE,)
                return call(self, *args)

        return checked

    def count(self, name: str) -> int:
        return sum(call[0] == name for call in self.calls)

    # -- set-up --------------------------------------------------------------------------------------

    CUmemAllocationProp = CUmemAccessDesc = staticmethod(lambda: SimpleNamespace(location=SimpleNamespace()))

    def _cuInit(self, flags: int) -> Any:
        return (Result.CUDA_SUCCESS,)

    def _cuDeviceGet(self, ordinal: int) -> Any:
        return Result.CUDA_SUCCESS, 10 + ordinal

    def _cuDeviceGetPCIBusId(self, length: int, device: int) -> Any:
        return Result.CUDA_SUCCESS, b"0000:3B:00.0".ljust(length, b"\0")

    def _cuDevicePrimaryCtxRetain(self, device: int) -> Any:
        return Result.CUDA_SUCCESS, "context"

    def _cuCtxSetCurrent(self, context: str) -> Any:
        self.threads.append((threading.get_ident(), context))
        return (Result.CUDA_SUCCESS,)

    def _cuThreadExchangeStreamCaptureMode(self, mode: Any) -> Any:
        self.threads.append((threading.get_ident(), mode.name))
        return Result.CUDA_SUCCESS, 0

    # -- memory --------------------------------------------------------------------------------------

    def _cuMemGetAllocationGranularity(self, prop: Any, flag: Any) -> Any:
        assert prop.type.value == prop.location.type.value == 1
        return Result.CUDA_SUCCESS, GRANULARITY

    def _cuMemAddressReserve(self, nbytes: int, align: int, address: int, flags: int) -> Any:
        assert nbytes % GRANULARITY == align == address == flags == 0
        start = _libc.mmap(None, nbytes + GRANULARITY, 0, 0x4022, -1, 0)
        place = -(-start // GRANULARITY) * GRANULARITY
        self.reserved[place] = nbytes
        return Result.CUDA_SUCCESS, place

    def _cuMemAddressFree(self, address: int, nbytes: int) -> Any:
        if self.reserved.get(address) != nbytes or any(address <= a < address + nbytes for a in self.mapped):
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        del self.reserved[address]
        assert _libc.munmap(address, nbytes) == 0
        return (Result.CUDA_SUCCESS,)

    def _cuMemCreate(self, nbytes: int, prop: Any, flags: int) -> Any:
        assert self._page in (0, nbytes) and nbytes % GRANULARITY == 0, "handles of one size"
        if not self.handles_left:
            return Result.CUDA_ERROR_OUT_OF_MEMORY, None
        self._page = nbytes
        self.handles_left -= 1
        handle = next(self._names)
        self.handles[handle] = os.memfd_create("handle")
        os.truncate(self.handles[handle], nbytes)
        return Result.CUDA_SUCCESS, handle

    def _cuMemRelease(self, handle: int) -> Any:
        assert handle not in self.mapped.values(), "a mapped handle was released"
        os.close(self.handles.pop(handle))
        self.handles_left += 1
        return (Result.CUDA_SUCCESS,)

    def _cuMemMap(self, address: int, nbytes: int, offset: int, handle: int, flags: int) -> Any:
        inside = any(start <= address and address + nbytes <= start + size for start, size in self.reserved.items())
        if not inside or address in self.mapped or (offset, flags) != (0, 0):
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        assert _libc.mmap(address, nbytes, 0, mmap.MAP_SHARED | _FIXED, self.handles[handle], 0) == address
        self.mapped[address] = handle
        return (Result.CUDA_SUCCESS,)

    def _cuMemSetAccess(self, address: int, nbytes: int, access: list[Any], num: int) -> Any:
        pages = range(address, address + nbytes, self._page)
        if not all(page in self.mapped for page in pages) or len(access) != num or access[0].flags.value != 3:
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        assert _libc.mprotect(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE) == 0
        self.readable.update(pages)
        return (Result.CUDA_SUCCESS,)

    def _cuMemUnmap(self, address: int, nbytes: int) -> Any:
        pages = range(address, address + nbytes, self._page)
        if not all(page in self.mapped for page in pages):
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        assert _libc.mmap(address, nbytes, 0, 0x4022 | _FIXED, -1, 0) == address
        for page in pages:
            del self.mapped[page]
            self.readable.discard(page)
        return (Result.CUDA_SUCCESS,)

    def _cuMemHostAlloc(self, nbytes: int, flags: int) -> Any:
        address = _libc.mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, 0x22, -1, 0)
        self.pinned[address] = nbytes
        return Result.CUDA_SUCCESS, address

    def _cuMemFreeHost(self, address: int) -> Any:
        assert _libc.munmap(address, self.pinned.pop(address)) == 0
        return (Result.CUDA_SUCCESS,)

    def _cuMemHostRegister(self, address: int, nbytes: int, flags: int) -> Any:
        assert address not in self.pinned and flags in (0, 8)
        self.pinned[address] = nbytes
        return (Result.CUDA_SUCCESS,)

    def _cuMemHostUnregister(self, address: int) -> Any:
        ctypes.string_at(address, 1)  # is still there
        del self.pinned[address]
        return (Result.CUDA_SUCCESS,)

    # -- streams -------------------------------------------------------------------------------------

    def _cuStreamCreate(self, flags: int) -> Any:
        assert flags == 1
        stream = next(self._names)
        self._streams[stream] = deque()
        return Result.CUDA_SUCCESS, stream

    def _cuEventCreate(self, flags: int) -> Any:
        assert flags in (1, 3)
        event = next(self._names)
        self._events[event] = None
        if flags == 1:
            self._timed.add(event)
        return Result.CUDA_SUCCESS, event

    def _cuEventRecord(self, event: int, stream: int) -> Any:
        mark = object()
        self._streams[stream].append(mark)
        self._events[event] = (stream, mark)
        return (Result.CUDA_SUCCESS,)

    def _cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> Any:
        state = self._events[event]
        self._streams[stream].append(lambda: self._run_to(state))
        return (Result.CUDA_SUCCESS,)

    def _cuStreamSynchronize(self, stream: int) -> Any:
        while self._streams[stream]:
            self._run_one(stream)
        return (Result.CUDA_SUCCESS,)

    def _cuEventSynchronize(self, event: int) -> Any:
        self._run_to(self._events[event])
        return (Result.CUDA_SUCCESS,)

    def _cuEventQuery(self, event: int) -> Any:
        return (Result.CUDA_SUCCESS if self._is_past(event) else Result.CUDA_ERROR_NOT_READY,)

    def _cuEventElapsedTime(self, start: int, end: int) -> Any:
        assert {start, end} <= self._timed and self._is_past(start) and self._is_past(end)
        return Result.CUDA_SUCCESS, 2.5

    def _is_past(self, event: int) -> bool:
        state = self._events[event]
        return state is None or state[1] not in self._streams[state[0]]

    def _cuMemsetD8Async(self, address: int, byte: int, nbytes: int, stream: int) -> Any:
        self._check_device(address, nbytes)
        return self.launch(lambda: ctypes.memset(address, byte, nbytes), stream)

    def _cuMemcpyHtoDAsync(self, address: int, host: int, nbytes: int, stream: int) -> Any:
        self._check_device(address, nbytes)
        self._check_pinned(host, nbytes)
        return self.launch(lambda: ctypes.memmove(address, host, nbytes), stream)

    def _cuMemcpyDtoHAsync(self, host: int, address: int, nbytes: int, stream: int) -> Any:
        self._check_device(address, nbytes)
        self._check_pinned(host, nbytes)
        return self.launch(lambda: ctypes.memmove(host, address, nbytes), stream)

    def launch(self, work: Callable[[], Any], stream: int) -> Any:
        """Put work on a stream, as a kernel launch does."""
        self._streams[stream].append(work)
        return (Result.CUDA_SUCCESS,)

    def is_idle(self, stream: int) -> bool:
        return not self._streams[stream]

    def _run_to(self, state: tuple[int, object] | None) -> None:
        if state is not None:
            stream, mark = state
            while mark in self._streams[stream]:
                self._run_one(stream)

    def _run_one(self, stream: int) -> None:
        work = self._streams[stream].popleft()
        if callable(work):
            work()

    def _check_device(self, address: int, nbytes: int) -> None:
        first = address // GRANULARITY * GRANULARITY
        for place in range(first, address + nbytes, GRANULARITY):
            assert any(page <= place < page + self._page for page in self.readable), f"{place:#x} is not mapped"

    def _check_pinned(self, address: int, nbytes: int) -> None:
        assert any(a <= address and address + nbytes <= a + n for a, n in self.pinned.items()), "memory is not pinned"


class FakeCudaDevice(CudaDevice):
    """A CudaDevice whose memory the CPU can read; `fake` is its driver module, `compute` the engine's stream."""

    _dlpack_type = CPU

    def __init__(self, page_bytes: int = GRANULARITY, *, handles: int = 10_000, ways: Ways = ((0, None),)):
        self.fake = FakeCuda(handles)
        self.compute = self.fake._cuStreamCreate(1)[1]
        driver = CudaDriver(api=self.fake)
        super().__init__(page_bytes, driver=driver, compute_stream=lambda: self.compute, ways=ways)

    def run_engine(self) -> None:
        """Do all that is on the engine's stream by now."""
        self.fake._cuStreamSynchronize(self.compute)
