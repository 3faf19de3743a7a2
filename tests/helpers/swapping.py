# SPDX-License-Identifier: Apache-2.0
"""The least that a KVSwapper needs of a model, with real pools on a real arena and no engine."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, make_block_hash_with_group_id

from tokenpool.host.kv.kv_swap import KVSwapper
from tokenpool.host.kv.slab_block_pool import SlabBlockPool
from tokenpool.memory.arena import KVArena
from tokenpool.memory.devices.cpu import CpuDevice
from tokenpool.memory.host_ledger import HostLedger
from tokenpool.memory.kv_tier import HostKVTier
from tokenpool.memory.ledger import PageLedger
from tokenpool.memory.slab_allocator import SlabAllocator

PAGE = 64 << 10
HASHES = [BlockHash(bytes([n]) * 32) for n in range(8)]
ROWS, COLUMNS = 6, 40


def make_allocator(num_pages: int, device: CpuDevice | None = None) -> SlabAllocator:
    ledger = PageLedger(num_pages, PAGE)
    return SlabAllocator(ledger, KVArena(device or CpuDevice(), ledger, poison=True))


def key_of(hash_index: int, group: int = 0) -> bytes:
    return make_block_hash_with_group_id(HASHES[hash_index], group)


class GPUModelRunner:
    """Looks like vLLM's first model runner as far as block ids go: one group, one row per request."""

    __module__ = "vllm.v1.worker.gpu_model_runner"

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        table = SimpleNamespace(
            block_table=SimpleNamespace(np=np.zeros((ROWS, COLUMNS), np.int32)),
            num_blocks_per_row=np.zeros(ROWS, np.int32),
        )
        self.input_batch = SimpleNamespace(block_table=SimpleNamespace(block_tables=[table]))
        self.execute_model_state = None
        self.rows: dict[str, int] = {}
        self.table = table

    def put(self, request_id: str, block_ids: list[int]) -> None:
        """Take a request in, or replace its ids; the batch has a row for it if one is free."""
        free = set(range(ROWS)) - set(self.rows.values())
        if request_id not in self.rows and free:
            self.rows[request_id] = min(free)
        self.requests[request_id] = SimpleNamespace(block_ids=(list(block_ids),))
        row = self.rows.get(request_id)
        if row is not None:
            self.table.num_blocks_per_row[row] = len(block_ids)
            self.table.block_table.np[row, : len(block_ids)] = block_ids

    def drop(self, request_id: str) -> None:
        """Forget a request; what lies in its row stays there, as in vLLM."""
        del self.requests[request_id]
        row = self.rows.pop(request_id, None)
        if row is not None:
            self.table.num_blocks_per_row[row] = 0

    def ids_of(self, request_id: str) -> list[list[int]]:
        """What it holds of a request, once per place."""
        found = [self.requests[request_id].block_ids[0]]
        row = self.rows.get(request_id)
        if row is not None:
            count = self.table.num_blocks_per_row[row]
            found.append(self.table.block_table.np[row, :count].tolist())
        return found


class _Scheduler:
    """As much of a scheduler as says which request has which blocks."""

    def __init__(self) -> None:
        self.blocks_of: dict[str, list[KVCacheBlock]] = {}
        manager = SimpleNamespace(new_block_ids=[], _pending_cow_copies=[], req_to_blocks=self.blocks_of)
        coordinator = SimpleNamespace(single_type_managers=[manager])
        self.kv_cache_manager = SimpleNamespace(coordinator=coordinator)

    @property
    def running(self) -> list[Any]:
        return [SimpleNamespace(request_id=request_id) for request_id in self.blocks_of]


class FakeModel:
    """A model without an engine: a pool, a runner, and block contents that can be told apart."""

    def __init__(self, allocator: SlabAllocator, name: str, block_bytes: int, floor: int = 0) -> None:
        arena = allocator.arena
        self.name = name
        self.view = arena.open_view(name, block_bytes)
        self.pool = SlabBlockPool(allocator, self.view, floor, arena.span_bytes // block_bytes, True, 16)
        self.build = SimpleNamespace(pool=self.pool)
        self.runner = GPUModelRunner()
        worker = SimpleNamespace(worker=SimpleNamespace(model_runner=self.runner))
        scheduler = _Scheduler()
        self.requests = scheduler.blocks_of
        """Blocks of each request, for whoever moves the model."""
        self.core = SimpleNamespace(
            batch_queue=None,
            model_executor=SimpleNamespace(driver_worker=worker),
            scheduler=scheduler,
        )

    def write(self, block: KVCacheBlock, value: int) -> None:
        """Give the block's bytes a value that names it: its first and last eight."""
        start = self.pool.address_of(block.block_id)
        for address in (start, start + self.view.block_bytes - 8):
            ctypes.c_int64.from_address(address).value = value

    def read(self, block: KVCacheBlock) -> int:
        """The value in the block's bytes; -1 if its two ends differ."""
        start = self.pool.address_of(block.block_id)
        ends = {ctypes.c_int64.from_address(a).value for a in (start, start + self.view.block_bytes - 8)}
        return ends.pop() if len(ends) == 1 else -1

    def content(self, hash_index: int, group: int) -> int:
        """What a block under this hash holds: the same in each computation, another in each model."""
        return 1_000_000 * sum(self.name.encode()) + 1000 * hash_index + group

    def cache(self, block: KVCacheBlock, hash_index: int, group: int = 0) -> None:
        """Enter the block's hash as a scheduled step does; nothing is computed yet."""
        self.pool._insert_block_hash(key_of(hash_index, group), block, num_tokens=16 * (hash_index + 1))

    def computed(self, count: int) -> list[KVCacheBlock]:
        """So many new blocks, in use, with the hashes 0, 1, ... and what these name in them."""
        blocks = self.pool.get_new_blocks(count)
        for index, block in enumerate(blocks):
            self.cache(block, index)
            self.write(block, self.content(index, 0))
        self.mark_computed()
        return blocks

    def mark_computed(self) -> None:
        """The step is done."""
        if self.pool.link is not None:
            self.pool.link.mark_computed()


def make_swapper(allocator, models: list[FakeModel], budget: int = 4 << 20) -> KVSwapper:
    host = HostLedger(budget)
    tier = HostKVTier(host, allocator.arena.device, buffer_bytes=64 << 10)
    host.make_room = tier.drop_cached
    swapper = KVSwapper(tier)
    for model in models:
        swapper.add(model)
    return swapper
