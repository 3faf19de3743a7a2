# SPDX-License-Identifier: Apache-2.0
"""Memory of a GPU as NVML tells it, with a module in pynvml's place."""

from __future__ import annotations

import os
import sys

import pytest

from tests.helpers.devices.fake_nvml import FakeNvml
from tokenpool.errors import ConfigError
from tokenpool.memory.devices.nvml import read_gpu

pytestmark = pytest.mark.cpu

GIB = 1 << 30


@pytest.fixture
def nvml(monkeypatch):
    def install(*args, **kwargs) -> FakeNvml:
        made = FakeNvml(*args, **kwargs)
        monkeypatch.setitem(sys.modules, "pynvml", made)
        return made

    return install


def test_a_pool_gets_what_is_free_less_a_reserve(nvml):
    """The budget counts from what is free, not from what the GPU has; NVML is left closed."""
    module = nvml(80 * GIB, 70 * GIB, {os.getpid(): GIB, 4711: 9 * GIB})
    status = read_gpu("GPU-1")

    assert 58 * GIB == status.budget_bytes()
    assert ("Fake 100", 0.25, {4711: 9 * GIB}) == (status.name, status.busy_frac, status.foreign())
    assert "process 4711 holds 9GiB" == status.describe_foreign()
    assert 0 == module.open


def test_a_small_gpu_keeps_a_reserve_all_the_same(nvml):
    """A CUDA context and activations do not shrink with the GPU."""
    nvml(8 * GIB, 6 * GIB, {})

    assert 4 * GIB == read_gpu("GPU-1").budget_bytes()


def test_a_gpu_that_others_fill_is_refused_by_name(nvml):
    """The error says how much is free and who holds the rest."""
    nvml(80 * GIB, 11 * GIB, {4711: 60 * GIB, 4712: None})
    with pytest.raises(ConfigError, match="11GiB of 80GiB are free.*12GiB in reserve.*4711 holds 60GiB.*4712 holds an"):
        read_gpu("GPU-1").budget_bytes()


def test_what_a_gpu_does_not_tell_is_left_out(nvml):
    """Utilisation and processes are not told everywhere; memory is enough."""
    nvml(
        80 * GIB,
        80 * GIB,
        {1: 1},
        broken=("nvmlDeviceGetUtilizationRates", "nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetMigMode"),
    )
    status = read_gpu("GPU-1")

    assert (None, {}, "") == (status.busy_frac, status.processes, status.describe_foreign())


@pytest.mark.parametrize("broken", ["nvmlInit", "nvmlDeviceGetMemoryInfo"])
def test_a_broken_nvml_is_a_setting_to_correct(nvml, broken):
    """One line of ours instead of an NVMLError, and NVML is left closed."""
    module = nvml(GIB, GIB, {}, broken=(broken,))
    with pytest.raises(ConfigError, match=f"device: NVML cannot be asked: {broken}: Not Supported"):
        read_gpu("GPU-1")
    assert 0 == module.open


def test_a_missing_nvml_names_the_extra(monkeypatch):
    """Without the package the error says which extra brings it."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ConfigError, match=r"install tokenpool\[cuda\]"):
        read_gpu("GPU-1")


def test_a_gpu_that_is_split_tells_no_budget(nvml):
    """NVML has the memory of all parts of it: the user must say how much this one has."""
    nvml(80 * GIB, 80 * GIB, {}, mig=1)
    with pytest.raises(ConfigError, match="device_memory: .*split by MIG.*give the bytes of yours"):
        read_gpu("GPU-1").budget_bytes()
