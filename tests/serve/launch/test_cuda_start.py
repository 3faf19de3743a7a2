# SPDX-License-Identifier: Apache-2.0
"""What `doctor` and the plan do where vLLM has found a CUDA platform; NVML and the bindings are stand-ins."""

from __future__ import annotations

import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
from vllm import platforms

from tests.helpers.devices.fake_nvml import FakeNvml
from tokenpool.cli.doctor import _report_device
from tokenpool.config import ModelSpec, PoolConfig
from tokenpool.errors import PoolError
from tokenpool.serve.launch import launch_plan

pytestmark = pytest.mark.vllm

GIB = 1 << 30


@pytest.fixture
def cuda(monkeypatch) -> SimpleNamespace:
    """vLLM's platform as on a machine with one GPU, of which 70 GiB are free, 4711 holding the rest."""
    platform = SimpleNamespace(
        is_cpu=lambda: False,
        is_cuda=lambda: True,
        is_unspecified=lambda: False,
        device_name="cuda",
        get_device_uuid=lambda: "GPU-1",
    )
    monkeypatch.setattr(platforms, "_current_platform", platform)
    monkeypatch.setattr(launch_plan, "current_platform", platform)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(80 * GIB, 70 * GIB, {4711: 10 * GIB}))
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", SimpleNamespace(cuInit=lambda flags: (0,)))
    return platform


def test_doctor_names_the_gpu_and_what_was_not_checked(cuda, capsys):
    """The GPU, its memory, who else uses it, and one line that CUDA is new here."""
    assert _report_device()
    lines = capsys.readouterr().out.splitlines()

    assert "device cuda: Fake 100, 70GiB of 80GiB free, 25% busy; process 4711 holds 10GiB" == lines[0]
    assert "docs/gpu.md" in lines[1]
    assert 2 == len(lines)


def test_doctor_says_what_is_missing(cuda, capsys, monkeypatch):
    """A GPU that cannot be used is not ok, with the extra to install."""
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    assert not _report_device()
    assert "install tokenpool[cuda]" in capsys.readouterr().out


def test_doctor_knows_other_platforms(cuda, capsys):
    """The CPU is supported, what is neither CPU nor CUDA is not."""
    cuda.is_cuda, cuda.device_name = lambda: False, "xpu"
    assert not _report_device()
    cuda.is_cpu, cuda.device_name = lambda: True, "cpu"
    assert _report_device()
    assert ["device xpu: not supported", "device cpu: supported"] == capsys.readouterr().out.splitlines()


def test_a_build_for_cuda_without_a_gpu_says_what_to_do(cuda, capsys):
    """The plan and `doctor` name the ways out; vLLM has no name for what is not there."""
    cuda.is_cuda, cuda.device_name, cuda.is_unspecified = lambda: False, None, lambda: True
    with pytest.raises(PoolError, match=r"^no GPU is here, and this vLLM .* a cluster.* install tokenpool\[cpu\]$"):
        launch_plan.plan_pool(PoolConfig(models=[ModelSpec("a", "org/a")]))
    assert not _report_device()
    assert capsys.readouterr().out.startswith("device: no GPU is here, and this vLLM is built for CUDA")


def test_automatic_device_memory_is_the_gpus(cuda):
    """It comes from what is free on the GPU, less the reserve, unless all models ask for a size."""
    config = PoolConfig(models=[ModelSpec("a", "org/a")])
    plan = launch_plan.ModelPlan(config.models[0], Namespace(kv_cache_memory_bytes=None), weight_bytes=0)

    assert 58 * GIB == launch_plan._auto_device_memory(config, [plan])
    plan.args.kv_cache_memory_bytes = GIB
    assert GIB + 2 * config.page_size == launch_plan._auto_device_memory(config, [plan])


def test_a_platform_without_a_device_is_refused(cuda):
    """The line names the platform and the extras."""
    cuda.is_cuda, cuda.device_name = lambda: False, "xpu"
    with pytest.raises(PoolError, match=r"device xpu is not supported: install tokenpool\[cpu\] or \[cuda\]"):
        launch_plan.plan_pool(PoolConfig(models=[ModelSpec("a", "org/a")]))
