# SPDX-License-Identifier: Apache-2.0
"""Lets a process run vLLM's second model runner, or batches ahead, on the CPU, where vLLM does neither.

Both are vLLM's own code and run as they are: the kernels of the second runner in Triton's interpreter, at some 45 ms a
step. `use_second_runner` must be called before vLLM is imported, so it needs a process of its own. As a program this
module is the reference of tests/helpers/plain.py with both.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _AlwaysActive:
    """vLLM uses Triton only if exactly one backend says that it has a device."""

    @staticmethod
    def is_active() -> bool:
        return True


class _CpuBackend:
    driver = _AlwaysActive
    compiler = None


def use_second_runner() -> None:
    """Choose model runner V2 and Triton's interpreter for this process."""
    assert "vllm" not in sys.modules, "vLLM has chosen already"
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    from triton.backends import backends

    backends["cpu"] = _CpuBackend


@contextmanager
def async_scheduling_allowed() -> Iterator[None]:
    """Engines that are built meanwhile schedule a step ahead, unless their arguments say `async_scheduling=False`.

    vLLM turns it off on the CPU, where nothing is gained by it.
    """
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.__dict__["check_and_update_config"]

    def check_and_update_config(cls: type, vllm_config: object) -> None:
        scheduler = vllm_config.scheduler_config
        wanted = scheduler.async_scheduling
        original.__func__(cls, vllm_config)
        scheduler.async_scheduling = wanted

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    try:
        yield
    finally:
        CpuPlatform.check_and_update_config = original


def _main(second_runner: str, *args: str) -> None:
    if second_runner == "second":
        use_second_runner()
    from tests.helpers.plain import _main as run

    with async_scheduling_allowed():
        run(*args)


if __name__ == "__main__":
    _main(*sys.argv[1:])
