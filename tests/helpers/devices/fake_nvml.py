# SPDX-License-Identifier: Apache-2.0
"""A module in pynvml's place, for one GPU named GPU-1."""

from __future__ import annotations

from types import SimpleNamespace


class NVMLError(Exception):
    pass


class FakeNvml:
    """pynvml for one GPU named GPU-1; `broken` are calls that NVML does not support here."""

    NVMLError = NVMLError

    def __init__(
        self, total: int, free: int, processes: dict[int, int | None], broken: tuple[str, ...] = (), mig: int = 0
    ) -> None:
        self._memory = SimpleNamespace(total=total, free=free)
        self._processes = [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in processes.items()]
        self._broken = broken
        self._mig = mig
        self.open = 0

    def _check(self, call: str) -> None:
        assert self.open == 1 or call == "nvmlInit"
        if call in self._broken:
            raise NVMLError(f"{call}: Not Supported")

    def nvmlInit(self) -> None:
        self._check("nvmlInit")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self._check("nvmlDeviceGetHandleByUUID")
        if uuid != "GPU-1":
            raise NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetMemoryInfo(self, gpu: str) -> SimpleNamespace:
        self._check("nvmlDeviceGetMemoryInfo")
        return self._memory

    def nvmlDeviceGetName(self, gpu: str) -> str:
        return "Fake 100"

    def nvmlDeviceGetUtilizationRates(self, gpu: str) -> SimpleNamespace:
        self._check("nvmlDeviceGetUtilizationRates")
        return SimpleNamespace(gpu=25)

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: str) -> list[SimpleNamespace]:
        self._check("nvmlDeviceGetComputeRunningProcesses")
        return self._processes

    def nvmlDeviceGetMigMode(self, gpu: str) -> list[int]:
        self._check("nvmlDeviceGetMigMode")
        return [self._mig, self._mig]
