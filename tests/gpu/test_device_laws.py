# SPDX-License-Identifier: Apache-2.0
"""The laws of memory on a real GPU, as the CPU tests state them, and what only a GPU can show."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.devices.device_laws import LAWS
from tokenpool.memory.devices.cuda import CudaDevice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: no law of memory was checked on a GPU"),
]

PAGE = 2 << 20


@pytest.fixture(scope="module")
def device():
    torch.cuda.init()
    made = CudaDevice(PAGE)
    yield made
    made.release_unused()


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(device, law):
    """What holds on the CPU device holds on the GPU."""
    law(device, PAGE)


@pytest.mark.parametrize("name", ["batch", "triton"])
def test_blocks_come_back_whichever_way_they_are_copied(device, name):
    """vLLM's batched copies move the same bytes as single ones."""
    from tests.helpers.devices.device_laws import kv_comes_back_elsewhere
    from tokenpool.host.load.cuda_copies import BATCH_COPIES

    before, device.ways = device.ways, ((0, BATCH_COPIES[name]),)
    try:
        kv_comes_back_elsewhere(device, PAGE)
    finally:
        device.ways = before


def test_a_graph_reads_the_page_that_is_mapped_now(device):
    """A captured CUDA graph stays valid when another physical page comes under its addresses."""
    address = device.reserve(2 * PAGE)
    source = device.tensor(address, PAGE).view(torch.float32)
    target = torch.zeros_like(source, device="cuda")
    device.map_zeroed(address, PAGE)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        target.copy_(source * 2)  # warm-up outside the capture
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            target.copy_(source * 2)
        for value in (1.0, 3.0):
            device.unmap(address, PAGE)
            device.map_zeroed(address + PAGE, PAGE)  # takes the page that was just free
            device.map_zeroed(address, PAGE)
            source.fill_(value)
            graph.replay()
            stream.synchronize()
            assert target.eq(2 * value).all()
            device.unmap(address + PAGE, PAGE)
    device.release(address, 2 * PAGE)


def test_a_stray_read_of_the_arena_finds_zeros(device):
    """Slabs that were never granted, and those whose page went elsewhere, can be read."""
    from tokenpool.memory.arena import KVArena
    from tokenpool.memory.ledger import PageLedger

    arena = KVArena(device, PageLedger(4, PAGE))
    everything = device.tensor(arena.base, arena._reserved_bytes)
    assert not everything.any()
    arena.map_slab(1)
    device.tensor(arena._address(1), PAGE).fill_(3)
    arena.unmap_slab(1)
    device.release_unused()
    assert not everything.any()
    arena.close()
