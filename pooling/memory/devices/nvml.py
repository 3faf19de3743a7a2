# SPDX-License-Identifier: Apache-2.0
"""What NVML says about a GPU: memory, utilisation, and who else uses it. Makes no CUDA context.

`cudaMemGetInfo` needs a context and races with whatever runs; the pool asks NVML once, before it starts, and keeps a
reserve instead of asking again.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tokenpool.errors import ConfigError
from tokenpool.units import format_bytes

NO_GPU = (
    "no GPU is here, and this vLLM is built for CUDA: run tokenpool on a machine with a GPU and its driver, also as a "
    "server of a cluster, which plans for the GPU that it has; on CPUs install tokenpool[cpu]"
)
RESERVE_FRAC = 0.15
"""Of the GPU's memory, what the pool does not budget: the CUDA context, activations, workspaces and the CUDA graphs
of all models. A guess; it has not been measured."""
MIN_RESERVE_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class GpuStatus:
    """One GPU at one moment; sizes in bytes."""

    name: str
    total_bytes: int
    free_bytes: int
    busy_frac: float | None
    """Share of the last sample period in which a kernel ran; None = the GPU does not tell."""
    processes: dict[int, int | None]
    """Process id -> bytes it holds, None = not told, of the processes with a CUDA context that NVML shows."""
    is_split: bool = False
    """Whether MIG is on: its memory is that of all parts, of which a process has one."""

    def foreign(self) -> dict[int, int | None]:
        """The processes other than this one."""
        return {pid: nbytes for pid, nbytes in self.processes.items() if pid != os.getpid()}

    def budget_bytes(self) -> int:
        """What a pool may take of what is free now, a reserve kept; raises ConfigError if it is not told or nothing."""
        if self.is_split:
            raise ConfigError(
                f"{self.name} is split by MIG and tells the memory of all parts: give the bytes of yours, less about "
                f"{format_bytes(MIN_RESERVE_BYTES)}",
                key="device_memory",
            )
        reserve = max(MIN_RESERVE_BYTES, int(self.total_bytes * RESERVE_FRAC))
        if self.free_bytes > reserve:
            return self.free_bytes - reserve
        raise ConfigError(
            f"{format_bytes(self.free_bytes)} of {format_bytes(self.total_bytes)} are free on {self.name}, the pool "
            f"keeps {format_bytes(reserve)} in reserve; {self.describe_foreign() or 'no other process was seen'}",
            key="device_memory",
        )

    def describe_foreign(self) -> str:
        """The other processes and what they hold, in a few words; empty when there is none."""
        parts = [
            f"process {pid} holds {'an unknown amount' if nbytes is None else format_bytes(nbytes)}"
            for pid, nbytes in sorted(self.foreign().items())
        ]
        return ", ".join(parts)


def uuid_of_gpu(platform: Any) -> str:
    """The GPU that vLLM's platform has found; raises ConfigError for a part of one, which vLLM cannot look up."""
    try:
        return str(platform.get_device_uuid())
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"vLLM cannot tell which GPU it has, as with CUDA_VISIBLE_DEVICES=MIG-...: {error}; give device_memory in "
            "bytes",
            key="device_memory",
        ) from error


def read_gpu(uuid: str) -> GpuStatus:
    """Ask NVML for the GPU of that UUID; raises ConfigError when it cannot be asked."""
    with _nvml() as nvml:
        gpu = nvml.nvmlDeviceGetHandleByUUID(uuid)
        memory = nvml.nvmlDeviceGetMemoryInfo(gpu)
        name = nvml.nvmlDeviceGetName(gpu)
        try:
            busy_frac = nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100
        except nvml.NVMLError:  # not with MIG
            busy_frac = None
        try:
            running = nvml.nvmlDeviceGetComputeRunningProcesses(gpu)
        except nvml.NVMLError:  # not on all drivers, not in all containers
            running = []
        processes = {process.pid: process.usedGpuMemory for process in running}
        try:
            is_split = nvml.nvmlDeviceGetMigMode(gpu)[0] == 1
        except nvml.NVMLError:  # most GPUs cannot be split
            is_split = False
        return GpuStatus(name, int(memory.total), int(memory.free), busy_frac, processes, is_split)


@contextmanager
def _nvml() -> Iterator[Any]:
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError as error:
        raise ConfigError("pynvml is missing: install tokenpool[cuda]", key="device") from error
    try:
        nvml.nvmlInit()
        try:
            yield nvml
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        raise ConfigError(f"NVML cannot be asked: {error}", key="device") from error
