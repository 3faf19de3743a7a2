# SPDX-License-Identifier: Apache-2.0
"""The CPU device as memory: ranges, copies and the pace of a link."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from tokenpool.memory.device_cpu import CpuDevice

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
