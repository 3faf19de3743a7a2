# SPDX-License-Identifier: Apache-2.0
"""Engine hosts may use the matrix tiles that their CPU has."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from tokenpool.process.cpu_tiles import ask_for_tiles

pytestmark = pytest.mark.vllm

TILE_DATA = 1 << 18
MAKE_HOST = """
import ctypes
from tokenpool.host.engine_host import EngineHost
from tokenpool.wire.spec import HostConfig
host = EngineHost(HostConfig(device_memory=1 << 20, page_size=1 << 18))
allowed = ctypes.c_uint64()
assert 0 == ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(allowed))  # arch_prctl(ARCH_GET_XCOMP_PERM)
print(allowed.value)
"""


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="the CPU has no AMX")
def test_an_engine_host_asks_for_tiles():
    """In a process of its own: here another test may have asked."""
    result = subprocess.run([sys.executable, "-c", MAKE_HOST], capture_output=True, text=True, check=False)
    assert 0 == result.returncode, result.stderr[-3000:]
    assert TILE_DATA & int(result.stdout.split()[-1])


def test_a_refusal_is_told(monkeypatch, caplog):
    """By the kernel, of what the CPU has: what comes then would be an illegal instruction without a word."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False)
    ask_for_tiles()
    ((_, level, line),) = caplog.record_tuples
    assert logging.ERROR == level
    assert "--dtype float32" in line
