# SPDX-License-Identifier: Apache-2.0
"""The CPU device as memory: ranges, copies and the pace of a link."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch

from tokenpool.memory.devices.cpu import CpuDevice

pytestmark = pytest.mark.cpu

SIZE = 3 << 20


@pytest.mark.parametrize("link_bytes_per_s", [None, 1 << 30])
def test_bytes_go_to_the_device_and_back(link_bytes_per_s):
    """What is copied in is read on the device and comes back, at any pace; ranges start at huge pages."""
    device = CpuDevice(link_bytes_per_s=link_bytes_per_s)
    address = device.reserve(SIZE)
    device.map_zeroed(address, SIZE)
    sent, back = torch.randint(0, 255, (SIZE,), dtype=torch.uint8), device.host_buffer(SIZE)
    device.copy_in(address, sent)
    device.copy_out(back, address)

    assert torch.equal(sent, device.tensor(address, SIZE).view(torch.uint8))
    assert torch.equal(sent, back)
    assert address % (2 << 20) == 0
    device.unmap(address, SIZE)
    device.map_zeroed(address, SIZE)
    assert not device.tensor(address, SIZE).any()
    device.release(address, SIZE)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_host_memory_that_is_freed_leaves_the_process():
    """Also when malloc would take such sizes from its heap, as it does once it has freed larger ones."""
    device = CpuDevice()
    torch.ones(31 << 20, dtype=torch.uint8)
    buffers = [device.host_buffer(4 << 20).fill_(1) for _ in range(16)]
    above = device.host_buffer(1 << 18)  # small, and at the end of the heap
    part, before = buffers[3][-10:], _resident_bytes()
    buffers.clear()
    assert part.sum() == 10, "a slice keeps its buffer"
    del part

    assert before - _resident_bytes() > 60 << 20
    assert above.numel() == 1 << 18


def test_a_link_takes_its_time_without_a_core(monkeypatch):
    """A copy over a link sleeps for what the link would take beyond the copy itself."""
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    device = CpuDevice(link_bytes_per_s=SIZE // 10)
    address = device.reserve(SIZE)
    device.map_zeroed(address, SIZE)
    device.copy_in(address, device.host_buffer(SIZE))
    device.release(address, SIZE)

    assert len(slept) == 1
    assert 0 < slept[0] <= 10


def test_blocks_cross_a_link_beside_the_loop():
    """Copies of blocks are begun and not waited for; they end in their order, and who waits has them."""
    device, free = CpuDevice(link_bytes_per_s=1 << 40), threading.Event()
    address = device.reserve(SIZE)
    device.map_zeroed(address, SIZE)
    host, back = torch.full((SIZE,), 7, dtype=torch.uint8), device.host_buffer(SIZE)
    device._bus.submit(free.wait)
    there = device.begin_copies_in([(address, host)])
    here = device.begin_copies_out([(address, back)])
    assert not there.done() and not here.done()
    free.set()
    here.wait()
    assert there.done() and here.done()
    assert back.eq(7).all()
    assert there.seconds >= 0 <= here.seconds
    device.release(address, SIZE)
