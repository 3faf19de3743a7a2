# SPDX-License-Identifier: Apache-2.0
"""Which device a host uses: the one of the platform that vLLM has found."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress

import torch
from vllm.platforms import current_platform

from tokenpool.errors import CapacityError, ConfigError
from tokenpool.host.load import cuda_copies
from tokenpool.memory.devices.cpu import CpuDevice
from tokenpool.memory.devices.cuda import CudaDevice
from tokenpool.memory.devices.cuda_driver import CUDA_WARNING, CudaDriver
from tokenpool.memory.devices.device import Device
from tokenpool.memory.devices.mirrored import MirroredDevice
from tokenpool.process.affinity import ALL_CPUS
from tokenpool.units import format_bytes

logger = logging.getLogger(__name__)

_PAGES_AT_ONCE = 8
"""Made without a pause; 1 to 3 ms each by public figures."""
WORKERS = {
    "cpu": "tokenpool.host.engine.cpu_worker.PooledCPUWorker",
    "cuda": "tokenpool.host.engine.cuda_worker.PooledCUDAWorker",
}
"""vLLM's device type -> the worker class for it."""


def make_device(page_size: int, cpu_link: int | None = None, rank: int = 0) -> Device:
    """The device of this process, which has this rank of a tensor parallel group; the others as in HostConfig.

    A CUDA device is warned about. Raises ConfigError for a platform without a device, or whose device cannot be used.
    """
    if current_platform.is_cpu():
        return CpuDevice(link_bytes_per_s=cpu_link)
    if current_platform.is_cuda():
        logger.warning(CUDA_WARNING)
        if rank:  # before anything makes a context: it would lie on the first GPU
            torch.cuda.set_device(rank)
        return CudaDevice(page_size, driver=CudaDriver(rank), ways=cuda_copies.ways())
    raise ConfigError(
        f"{current_platform.device_name} is not supported: install tokenpool[cpu] or tokenpool[cuda]", key="device"
    )


def run_near_gpu(device: Device) -> None:
    """Let this thread, and those that it starts from now on, run on the cores of its GPU's NUMA node, as far as known.

    vLLM's own way, `--numa-bind`, starts the process of a rank by numactl, which a container may not have.
    """
    gpu = _gpu_of(device)
    if gpu is not None and (cpus := gpu.near_cpus & ALL_CPUS):  # a core of another node is slower and works
        os.sched_setaffinity(0, cpus)


def make_room_for_loading(device: Device, make_room: Callable[[int], None], num_pages: int) -> int:
    """Before a model is built whose movable weights need `num_pages`, or fixed ones none beyond those it holds.

    On a GPU vLLM loads into torch's memory, outside the pool's pages; movable weights go from there to the host, and
    then into pages. `make_room` frees as many, and the memory of all free pages goes back to the GPU. Returns how many
    pages nobody may have until `give_back_loading_memory`. Raises CapacityError like `make_room`.
    """
    if _gpu_of(device) is None:
        return 0
    make_room(num_pages)
    device.release_unused()
    return num_pages


def give_back_loading_memory(device: Device, num_pages: int, pause: Callable[[], None]) -> None:
    """After loading: what the loader had is given back to the GPU, and backs pages again, up to `num_pages` in all.

    Pages are made now, a few between two calls of `pause`, and not when a step needs them.
    """
    if (gpu := _gpu_of(device)) is None:
        return
    make_pages = device.make_pages if isinstance(device, MirroredDevice) else gpu.make_pages
    torch.cuda.empty_cache()
    with suppress(OSError):  # something of the loader's is left: the others are made when they are needed
        for count in range(gpu.page_bytes // gpu.granularity, num_pages, _PAGES_AT_ONCE):
            make_pages(min(count + _PAGES_AT_ONCE, num_pages))
            pause()


def make_all_pages(device: Device, num_pages: int) -> Device:
    """At the start of a host: ask the GPU for all of its pages, so that a shortage is told now and not in a step.

    Returns the device; raises CapacityError.
    """
    if not isinstance(device, CudaDevice):
        return device
    try:
        device.make_pages(num_pages)
    except OSError as error:
        made, size = device.page_bytes // device.granularity, device.granularity
        device.release_unused()
        raise CapacityError(
            f"the GPU gives {made} of {num_pages} pages of {format_bytes(size)}: {error}; lower device_memory or stop "
            "what else uses the GPU",
            needed_pages=num_pages,
            free_pages=made,
        ) from error
    return device


def release_device_memory(device: Device) -> None:
    """Give what neither the pool nor torch uses at the moment back to the GPU."""
    if _gpu_of(device) is not None:
        device.release_unused()
        torch.cuda.empty_cache()


class EngineMemory:
    """What an engine takes of a GPU, this rank's, outside the pool's pages, by the driver's books, from now on.

    Its buffers, workspaces and graphs, and weights that stay where they were loaded. 0 on other devices. What other
    engines take meanwhile counts too.
    """

    def __init__(self, device: Device) -> None:
        self._device = _gpu_of(device)
        self._before = self._taken()

    def growth(self) -> int:
        """Bytes since this object was made."""
        return max(0, self._taken() - self._before)

    def _taken(self) -> int:
        if self._device is None:
            return 0
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device.driver.ordinal)
        return int(total - free - self._device.page_bytes)


def spare_host_bytes(device: Device, host_memory: int) -> int:
    """How much of the host memory for KV stays allocated while it is empty: page-locking it anew is slow."""
    return host_memory // 8 if _gpu_of(device) is not None else 0


def _gpu_of(device: Device) -> CudaDevice | None:
    """The GPU of this process behind a device, which may stand for all ranks; None where there is none."""
    own = device.first if isinstance(device, MirroredDevice) else device
    return own if isinstance(own, CudaDevice) else None
