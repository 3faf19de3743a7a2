# SPDX-License-Identifier: Apache-2.0
"""CudaDriver against the real cuda-bindings: names, signatures, and what arrives at the driver. Needs no GPU.

Skipped where cuda-bindings is not installed: `pip install cuda-bindings` and run this file.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tokenpool.memory.devices.cuda_driver import CALLS

pytestmark = pytest.mark.cpu

CODE = """
from tokenpool.memory.devices.cuda_driver import CudaDriver, CudaError
driver = CudaDriver(3)
print(driver.pci_bus_id(), driver.granularity())
address = driver.reserve(4 << 20)
handle = driver.create(2 << 20)
driver.map(address, 2 << 20, handle)
driver.allow(address, 2 << 20)
stream, event, host = driver.stream(), driver.event(), driver.pin(12345)
driver.fill(address, 100, 255, stream)
driver.copy_in(address, host, 7, stream)
driver.copy_out(host, address, 8, stream)
driver.record(event, stream)
driver.wait_event(stream, event)
driver.wait_event(0, event)
driver.synchronize_event(event)
timed = driver.event(timed=True)
print(driver.has_happened(event), driver.has_happened(timed), driver.elapsed_s(timed, timed))
driver.synchronize(stream)
driver.unpin(host)
driver.register(0xf000, 4097)
driver.unregister(0xf000)
driver.register(0xf000, 4096, read_only=True)
driver.unregister(0xf000)
driver.unmap(address, 2 << 20)
driver.destroy(handle)
driver.free(address, 4 << 20)
try:
    driver.create(1 << 41)
except CudaError as error:
    print(error)
"""

EXPECTED = """\
cuDeviceGet 3
cuDevicePrimaryCtxRetain 40
cuDeviceGetPCIBusId 32 40
cuCtxSetCurrent 0x77
cuMemGetAllocationGranularity type=1 location=1:3 flag=0
cuMemAddressReserve 0x400000 0 0 0
cuMemCreate 0x200000 location=1:3 0
cuMemMap 0xa00000000000 0x200000 0 0xb0b0
cuMemSetAccess 0xa00000000000 0x200000
 location=1:3 flags=3 count=1
cuStreamCreate 1
cuEventCreate 3
cuMemHostAlloc 0x3039 0
cuMemsetD8Async 0xa00000000000 255 0x64 0xd000
cuMemcpyHtoDAsync 0xa00000000000 0xc000 0x7 0xd000
cuMemcpyDtoHAsync 0xc000 0xa00000000000 0x8 0xd000
cuEventRecord 0xe000 0xd000
cuStreamWaitEvent 0xd000 0xe000 0
cuStreamWaitEvent 0 0xe000 0
cuEventSynchronize 0xe000
cuEventCreate 1
cuEventQuery 0xe000
cuEventQuery 0xe001
cuEventElapsedTime 0xe001 0xe001
cuStreamSynchronize 0xd000
cuMemFreeHost 0xc000
cuMemHostRegister 0xf000 0x1001 0
cuMemHostUnregister 0xf000
cuMemHostRegister 0xf000 0x1000 8
cuMemHostUnregister 0xf000
cuMemUnmap 0xa00000000000 0x200000
cuMemRelease 0xb0b0
cuMemAddressFree 0xa00000000000 0x400000
cuMemCreate 0x20000000000 location=1:3 0
"""


@pytest.fixture(scope="module")
def bindings():
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError:
        pytest.skip("cuda-bindings is NOT installed: no name of the CUDA driver was checked")


def test_every_call_exists_with_as_many_arguments(bindings):
    """Each function that is used is in the module and takes what it is given."""
    for name, num_args in CALLS.items():
        signature = getattr(bindings, name).__doc__.strip().splitlines()[0]
        inside = signature[signature.index("(") + 1 : signature.rindex(")")]
        depth, commas = 0, 0
        for letter in inside:
            depth += (letter in "[(") - (letter in "])")
            commas += letter == "," and not depth
        assert num_args == (commas + 1 if inside.strip() else 0), signature


def test_every_constant_exists_with_its_value(bindings):
    """The flags that are passed mean what the driver's header says."""
    values = {
        "CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED": 1,
        "CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE": 1,
        "CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE": 3,
        "CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM": 0,
        "CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED": 2,
        "CUstream_flags.CU_STREAM_NON_BLOCKING": 1,
        "CUevent_flags.CU_EVENT_BLOCKING_SYNC": 1,
        "CUevent_flags.CU_EVENT_DISABLE_TIMING": 2,
        "CUresult.CUDA_SUCCESS": 0,
        "CUresult.CUDA_ERROR_OUT_OF_MEMORY": 2,
        "CUresult.CUDA_ERROR_NOT_READY": 600,
    }
    for name, value in values.items():
        kind, _, member = name.partition(".")
        assert value == getattr(getattr(bindings, kind), member).value, name


def test_arguments_arrive_at_the_driver(bindings, tmp_path):
    """Through the real bindings a driver in C gets each address, size, handle, flag and stream as it was meant."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is NO C compiler: what arrives at the driver was not checked")
    source = Path(__file__).with_name("cuda_stub.c")
    library = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    log = tmp_path / "log"
    env = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "CUDA_STUB_LOG": str(log)}
    ran = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr

    assert EXPECTED == log.read_text()
    error = "[Errno 12] cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY (2)"
    assert ["0000:3b:00.0 2097152", "False True 0.0025", error] == ran.stdout.splitlines()
