# SPDX-License-Identifier: Apache-2.0
"""What must hold on every device, written once: tests/memory checks it on the CPU, tests/gpu on a GPU.

`page` is a size that the device maps; nothing here reads device memory but through tensors.
"""

from __future__ import annotations

import random

import torch

from tests.helpers.devices.weight_rig import LIMIT_S, bytes_of, random_tensors
from tokenpool.memory.arena import KVArena
from tokenpool.memory.devices.device import Device
from tokenpool.memory.host_ledger import HostLedger
from tokenpool.memory.kv_blocks import OfferedBlock
from tokenpool.memory.kv_tier import HostKVTier
from tokenpool.memory.ledger import PageLedger, PageUse
from tokenpool.memory.weights import WeightStore


def _engine_is_done(device: Device) -> None:
    """Let a stand-in for a GPU do what is on the engine's stream; a real one does so before it is read."""
    getattr(device, "run_engine", lambda: None)()


def bytes_go_there_and_back(device: Device, page: int) -> None:
    """What is copied in is read on the device and comes back; a page that is mapped again is zero."""
    address = device.reserve(3 * page)
    device.map_zeroed(address, 3 * page)
    _engine_is_done(device)
    assert not device.tensor(address, 3 * page).any()
    sent, back = device.host_buffer(3 * page), device.host_buffer(3 * page)
    sent.copy_(torch.randint(0, 255, (3 * page,), dtype=torch.uint8))
    device.copy_in(address, sent)
    device.copy_out(back, address)
    assert torch.equal(sent, device.tensor(address, 3 * page).view(torch.uint8).cpu())
    assert torch.equal(sent, back)
    device.begin_copy_in(address + page, sent[:100])()
    assert torch.equal(sent[:100], device.tensor(address + page, 100).view(torch.uint8).cpu())
    device.unmap(address, 3 * page)
    device.map_zeroed(address + page, page)
    _engine_is_done(device)
    assert not device.tensor(address + page, page).any()
    device.release(address, 3 * page)


def slabs_are_zero_at_each_grant(device: Device, page: int, seed: int = 1) -> None:
    """Slabs that were written, poisoned and given to another model read as zero; null blocks stay apart."""
    rng = random.Random(seed)
    ledger = PageLedger(12, page)
    arena = KVArena(device, ledger, poison=True)
    views = {name: arena.open_view(name, size) for name, size in (("a", page // 4), ("b", page // 3 // 256 * 256))}
    tensors = {name: arena.tensor(view) for name, view in views.items()}
    held: list[tuple[str, int]] = []
    for _ in range(60):
        if len(held) < 8 and rng.random() < 0.6:
            name = rng.choice("ab")
            slab = ledger.take(name, PageUse.KV)[0]
            arena.map_slab(slab)
            _engine_is_done(device)
            view = views[name]
            for block in arena.block_ids(view, slab):
                place = tensors[name][block * view.block_bytes : (block + 1) * view.block_bytes]
                assert not place.any(), "a granted block holds old bytes"
                place.fill_(rng.randrange(1, 127))
            held.append((name, slab))
        elif held:
            name, slab = held.pop(rng.randrange(len(held)))
            arena.unmap_slab(slab)
            ledger.give(name, PageUse.KV, [slab])
        arena.check()
    _engine_is_done(device)
    for name, view in views.items():
        assert not tensors[name][: view.block_bytes].any(), "a null block was written"
    arena.close()


def weights_come_back(device: Device, page: int, seed: int = 1) -> None:
    """Whatever the tensors, they hold the same bytes at the same addresses each time their model is resident."""
    address = device.reserve(page)
    where = device.tensor(address, page).device
    device.release(address, page)
    tensors = [tensor.to(where) for tensor in random_tensors(seed, 12)]
    before = bytes_of(tensors)
    ledger, host = PageLedger(8, page), HostLedger(1 << 30)
    store = WeightStore(device, ledger, host, poison=True, chunk_bytes=4 << 10)
    store.adopt("a", tensors)
    places = [tensor.data_ptr() for tensor in tensors]
    for _ in range(3):
        assert before == bytes_of(tensors)
        assert places == [tensor.data_ptr() for tensor in tensors]
        store.evict("a")
        assert 8 == ledger.num_free
        store.map("a")
        assert store.copy("a").wait(LIMIT_S)
        store.finish("a")
        store.check()
    assert before == bytes_of(tensors)
    store.close()
    ledger.check()


def kv_comes_back_elsewhere(device: Device, page: int, seed: int = 1) -> None:
    """Blocks go to the host and come back to other places, neighbours and single ones, with their bytes."""
    rng, block, num_blocks = random.Random(seed), page // 16, 64
    address = device.reserve(2 * num_blocks * block)
    device.map_zeroed(address, 2 * num_blocks * block)
    _engine_is_done(device)
    here = device.tensor(address, 2 * num_blocks * block).view(2 * num_blocks, block)
    tier = HostKVTier(HostLedger(2 * num_blocks * block), device, buffer_bytes=5 * block)
    for _ in range(4):
        source = sorted(rng.sample(range(num_blocks), 20))
        for value, index in enumerate(source):
            here[index] = value + 1
        image = tier.new_image("a", block, len(source))
        tier.begin_copy_out(image, [address + index * block for index in source]).wait()
        here.fill_(0)
        target = rng.sample(range(num_blocks, 2 * num_blocks), 20)
        middle = len(target) // 2
        halves = [{i: p * block + address for i, p in enumerate(target) if i // middle == half} for half in (0, 1)]
        first, second = [tier.begin_copy_in(image, half) for half in halves]
        second.wait()
        assert first.done(), "copies of one device end in their order"
        want = torch.zeros(2 * num_blocks, dtype=torch.int8)
        want[target] = torch.arange(1, 21, dtype=torch.int8)
        assert torch.equal(want, here.amin(1).cpu())
        assert torch.equal(want, here.amax(1).cpu())
        tier.free_image(image)
    tier.check()
    device.release(address, 2 * num_blocks * block)


def cached_blocks_come_back_unwaited(device: Device, page: int, seed: int = 1) -> None:
    """Blocks are saved, overwritten and brought back to other places, while nobody waits but the engine's stream."""
    rng, block, num_blocks = random.Random(seed), page // 16, 32
    address = device.reserve(2 * num_blocks * block)
    device.map_zeroed(address, 2 * num_blocks * block)
    _engine_is_done(device)
    here = device.tensor(address, 2 * num_blocks * block).view(2 * num_blocks, block)
    tier = HostKVTier(HostLedger(num_blocks * block), device, buffer_bytes=5 * block)
    for turn in range(4):
        values = {bytes([turn, index]): rng.randrange(1, 127) for index in rng.sample(range(num_blocks), 12)}
        for key, value in values.items():
            here[key[1]] = value
        saved = tier.offer("a", [OfferedBlock(key, None, address + key[1] * block) for key in values], block)
        assert saved is not None
        saved.precede_compute()
        _engine_is_done(device)
        here[:num_blocks] = 0  # on the engine's stream
        places = dict(zip(values, rng.sample(range(num_blocks, 2 * num_blocks), 12), strict=True))
        tier.begin_load("a", {key: address + place * block for key, place in places.items()}).precede_compute()
        _engine_is_done(device)
        for key, place in places.items():
            assert here[place].eq(values[key]).all().item()
        tier.check()
    for key, value in values.items():
        buffer, index = tier.entries_of("a")[key].slot
        buffer.settle()
        assert buffer.data[index * block :][:block].eq(value).all(), "the host reads what has not arrived"
    device.release(address, 2 * num_blocks * block)


LAWS = (
    bytes_go_there_and_back,
    slabs_are_zero_at_each_grant,
    weights_come_back,
    kv_comes_back_elsewhere,
    cached_blocks_come_back_unwaited,
)
