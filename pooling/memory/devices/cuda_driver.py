# SPDX-License-Identifier: Apache-2.0
"""The few calls of the CUDA driver that the pool makes, with plain ints in and out, every result checked.

Uses `cuda.bindings.driver` (PyPI: cuda-bindings), imported only when a driver is made. Calls may come from any
thread; each thread is given the device's primary context, the one that torch uses, on its first call.
"""

from __future__ import annotations

import errno
import importlib
import threading
from typing import Any

from tokenpool.errors import ConfigError

CUDA_WARNING = "CUDA is not yet run on hardware by this project: see docs/gpu.md for what was and was not checked"

_REGISTER_READ_ONLY = 8  # CU_MEMHOSTREGISTER_READ_ONLY

CALLS = {
    "cuInit": 1,
    "cuDeviceGet": 1,
    "cuDeviceGetPCIBusId": 2,
    "cuDevicePrimaryCtxRetain": 1,
    "cuCtxSetCurrent": 1,
    "cuThreadExchangeStreamCaptureMode": 1,
    "cuMemGetAllocationGranularity": 2,
    "cuMemAddressReserve": 4,
    "cuMemAddressFree": 2,
    "cuMemCreate": 3,
    "cuMemRelease": 1,
    "cuMemMap": 5,
    "cuMemUnmap": 2,
    "cuMemSetAccess": 4,
    "cuMemHostAlloc": 2,
    "cuMemFreeHost": 1,
    "cuMemHostRegister": 3,
    "cuMemHostUnregister": 1,
    "cuMemsetD8Async": 4,
    "cuMemcpyHtoDAsync": 4,
    "cuMemcpyDtoHAsync": 4,
    "cuStreamCreate": 1,
    "cuStreamSynchronize": 1,
    "cuStreamWaitEvent": 3,
    "cuEventCreate": 1,
    "cuEventElapsedTime": 2,
    "cuEventQuery": 1,
    "cuEventRecord": 2,
    "cuEventSynchronize": 1,
}
"""Every function used of the module, with the number of its arguments: what a test compares with the real one."""


class CudaError(OSError):
    """A driver call failed; `errno` is ENOMEM when memory is short, else EIO."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(errno.ENOMEM if name == "CUDA_ERROR_OUT_OF_MEMORY" else errno.EIO, f"{call}: {name} ({code})")
        self.call = call
        """The driver's function."""
        self.name = name
        """The driver's name of the error."""


class CudaDriver:
    """The driver for one device of this process, `ordinal` as torch counts (after CUDA_VISIBLE_DEVICES).

    Raises ConfigError without cuda-bindings or a driver, CudaError when a call fails. `api` is for tests.
    """

    def __init__(self, ordinal: int = 0, api: Any = None) -> None:
        self.ordinal = ordinal
        self._api = api or load_driver_api()
        self._maker = threading.get_ident()
        self._thread = threading.local()
        self._call("cuInit", 0)
        self._device = self._call("cuDeviceGet", ordinal)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self._prop = self._api.CUmemAllocationProp()
        self._prop.type = self._api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._prop.location.type = self._api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._prop.location.id = ordinal
        self._access = self._api.CUmemAccessDesc()
        self._access.location = self._prop.location
        self._access.flags = self._api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE

    def _call(self, name: str, *args: Any) -> Any:
        """Call a function of the driver; returns its one result, or None."""
        code, *values = getattr(self._api, name)(*args)
        if code != self._api.CUresult.CUDA_SUCCESS:
            raise CudaError(name, int(code), code.name)
        return values[0] if values else None

    def _on_device(self, name: str, *args: Any) -> Any:
        """Call a function that needs the context, on whatever thread this is."""
        if not getattr(self._thread, "ready", False):
            self._call("cuCtxSetCurrent", self._context)
            if threading.get_ident() != self._maker:
                # Else a copy or an allocation on a side thread would break a graph capture on the engine's thread.
                mode = self._api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
                self._call("cuThreadExchangeStreamCaptureMode", mode)
            self._thread.ready = True
        return self._call(name, *args)

    # -- the device ----------------------------------------------------------------------------------

    def pci_bus_id(self) -> str:
        """The device's place on the bus, as sysfs spells it: 0000:3b:00.0."""
        text: bytes = self._call("cuDeviceGetPCIBusId", 32, self._device)
        return text.split(b"\0")[0].decode().lower()

    def granularity(self) -> int:
        """Bytes of which sizes and addresses of handles are multiples."""
        flag = self._api.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        return int(self._on_device("cuMemGetAllocationGranularity", self._prop, flag))

    # -- addresses and memory ------------------------------------------------------------------------

    def reserve(self, nbytes: int) -> int:
        """Reserve a range of addresses, aligned as handles need it."""
        return int(self._on_device("cuMemAddressReserve", nbytes, 0, 0, 0))

    def free(self, address: int, nbytes: int) -> None:
        """Give a reserved range back, in which nothing is mapped."""
        self._on_device("cuMemAddressFree", address, nbytes)

    def create(self, nbytes: int) -> Any:
        """A handle of physical memory on the device."""
        return self._on_device("cuMemCreate", nbytes, self._prop, 0)

    def destroy(self, handle: Any) -> None:
        """Give the memory of a handle back that is not mapped."""
        self._on_device("cuMemRelease", handle)

    def map(self, address: int, nbytes: int, handle: Any) -> None:
        """Put a whole handle at an address; it may be used after `allow`."""
        self._on_device("cuMemMap", address, nbytes, 0, handle, 0)

    def allow(self, address: int, nbytes: int) -> None:
        """Let the device read and write a range that is wholly mapped."""
        self._on_device("cuMemSetAccess", address, nbytes, [self._access], 1)

    def unmap(self, address: int, nbytes: int) -> None:
        """Take away all handles in a range that begins and ends at borders of handles."""
        self._on_device("cuMemUnmap", address, nbytes)

    def pin(self, nbytes: int) -> int:
        """Allocate page-locked host memory; returns its address."""
        return int(self._on_device("cuMemHostAlloc", nbytes, 0))

    def unpin(self, address: int) -> None:
        """Free what `pin` gave."""
        self._on_device("cuMemFreeHost", address)

    def register(self, address: int, nbytes: int, *, read_only: bool = False) -> None:
        """Page-lock host memory that is there; its address and size need no alignment.

        With `read_only` others have made it, and this process cannot write it: not yet run on hardware.
        """
        self._on_device("cuMemHostRegister", address, nbytes, _REGISTER_READ_ONLY if read_only else 0)

    def unregister(self, address: int) -> None:
        """End what `register` did, before the memory is unmapped."""
        self._on_device("cuMemHostUnregister", address)

    # -- streams and events --------------------------------------------------------------------------

    def stream(self) -> int:
        """A stream that does not wait for the default stream, nor it for this one."""
        return int(self._on_device("cuStreamCreate", self._api.CUstream_flags.CU_STREAM_NON_BLOCKING.value))

    def synchronize(self, stream: int) -> None:
        """Wait on the host for all work on a stream."""
        self._on_device("cuStreamSynchronize", stream)

    def event(self, *, timed: bool = False) -> int:
        """An event, without a time unless `timed`; whoever waits for it on the host sleeps instead of spinning."""
        flags = self._api.CUevent_flags
        no_time = 0 if timed else flags.CU_EVENT_DISABLE_TIMING.value
        return int(self._on_device("cuEventCreate", no_time | flags.CU_EVENT_BLOCKING_SYNC.value))

    def record(self, event: int, stream: int) -> None:
        """Let the event stand for what is on the stream by now."""
        self._on_device("cuEventRecord", event, stream)

    def has_happened(self, event: int) -> bool:
        """Whether all that the event stands for is done."""
        try:
            self._on_device("cuEventQuery", event)
        except CudaError as error:
            if error.name == "CUDA_ERROR_NOT_READY":
                return False
            raise
        return True

    def elapsed_s(self, start: int, end: int) -> float:
        """Seconds on the device between two timed events that have happened."""
        return float(self._on_device("cuEventElapsedTime", start, end)) / 1e3

    def wait_event(self, stream: int, event: int) -> None:
        """Let later work on the stream wait for the event; the host goes on."""
        self._on_device("cuStreamWaitEvent", stream, event, 0)

    def synchronize_event(self, event: int) -> None:
        """Wait on the host for an event."""
        self._on_device("cuEventSynchronize", event)

    def fill(self, address: int, nbytes: int, byte: int, stream: int) -> None:
        """Set device bytes, in the stream's order."""
        self._on_device("cuMemsetD8Async", address, byte, nbytes, stream)

    def copy_in(self, address: int, host_address: int, nbytes: int, stream: int) -> None:
        """Copy pinned host memory to the device, in the stream's order."""
        self._on_device("cuMemcpyHtoDAsync", address, host_address, nbytes, stream)

    def copy_out(self, host_address: int, address: int, nbytes: int, stream: int) -> None:
        """Copy device memory to pinned host memory, in the stream's order."""
        self._on_device("cuMemcpyDtoHAsync", host_address, address, nbytes, stream)


def load_driver_api() -> Any:
    """The module of cuda-bindings, its driver found; raises ConfigError without one of them. Makes no context."""
    try:
        driver = importlib.import_module("cuda.bindings.driver")
        driver.cuInit(0)
    except ImportError as error:
        raise ConfigError(f"no CUDA bindings ({error}): install tokenpool[cuda]", key="device") from error
    except RuntimeError as error:  # cuda-bindings found no libcuda.so.1
        raise ConfigError(f"no NVIDIA driver on this machine: {str(error).splitlines()[0]}", key="device") from error
    return driver
