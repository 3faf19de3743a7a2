# SPDX-License-Identifier: Apache-2.0
"""Takes the KV of a model's running requests off the device at a token boundary and brings it back.

    in ── begin_out ──► leaving ── copies end ──► out ── begin_in ──► returning ── copies end ──► in
          copies start             slabs go              slabs come, worker's      image freed
                                                         ids mapped, copies start

`poll` finishes moves whose copies have ended; `settle` waits for them, for who needs what they free. A model that is
returning may be stepped already; which of its requests run is told in kv_transit.py.

Only blocks in use move. They come back into any slabs under other ids; their objects stay, so the scheduler's lists
stay right, and the runner adapter maps the ids that the worker keeps. Blocks that are only cached go to the host tier
by content, or are forgotten.

A token boundary is a moment at which no step of the model is under way: with async scheduling the engine's batch
queue is drained first. A model must not be stepped while it is leaving or out. Requests may arrive and end at any time:
new ones wait in the scheduler; a block whose last request ends while it is out leaves the image.

What else names KV blocks: the scheduler's deferred frees and the managers' partial hits hold block objects, which
stay. Lists of new blocks to zero, copies on write and hand-overs to connectors are drained by each step; `begin_out`
checks that. Encoder caches, structured outputs and samplers know no block. KV connectors keep ids of their own: a
model with one must not be moved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from vllm.v1.core.kv_cache_utils import KVCacheBlock

from tokenpool.errors import CapacityError, SwitchError
from tokenpool.host.kv.kv_transit import Group, KVTransit, blocks_of
from tokenpool.host.kv.runner_adapter import RunnerAdapter, adapter_of
from tokenpool.host.kv.slab_block_pool import SlabBlockPool
from tokenpool.host.kv.tier_link import TierLink
from tokenpool.memory.kv_blocks import KVImage
from tokenpool.memory.kv_tier import HostKVTier
from tokenpool.memory.states import KVState, check_transition


class SwappableModel(Protocol):
    """The part of a HostedModel that is used here."""

    core: Any
    build: Any
    """`build.pool` is a SlabBlockPool, or None of a model that keeps no KV."""

    @property
    def name(self) -> str:
        """The model's name in the pool."""


@dataclass(slots=True)
class SwapCounters:
    """Running totals of one host."""

    outs: int = 0
    ins: int = 0
    blocks_out: int = 0
    blocks_in: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    seconds_out: float = 0.0
    seconds_in: float = 0.0
    refusals: int = 0
    """Moves that found no memory where they went."""


@dataclass(frozen=True, slots=True)
class KVMove:
    """A move that has ended."""

    model: str
    to_device: bool
    nbytes: int
    start_s: float
    """Wall time at which the copies were begun."""
    seconds: float
    """How long the copies took."""


@dataclass(slots=True, eq=False)
class _Swap:
    """One model whose KV is not in."""

    hosted: SwappableModel
    state: KVState
    image: KVImage
    blocks: list[KVCacheBlock]
    """What `image.slots` holds, in its order."""
    transit: KVTransit
    """The copies of the last move."""
    slot_of: dict[int, int] = field(default_factory=dict)
    """id() of a block that still has a reference -> its slot."""
    start_s: float = field(default_factory=time.time)
    nbytes: int = 0


class KVSwapper:
    """Moves models' KV between device and host; one per host, called on the host loop's thread only."""

    def __init__(self, tier: HostKVTier) -> None:
        self.tier = tier
        self.counters = SwapCounters()
        self.on_moved: Callable[[KVMove], None] = lambda move: None
        """Told of each move whose copies have ended."""
        self._adapters: dict[str, RunnerAdapter] = {}
        self._pools: dict[str, SlabBlockPool] = {}
        self._swaps: dict[str, _Swap] = {}

    # -- models --------------------------------------------------------------------------------------

    def add(self, hosted: SwappableModel) -> None:
        """Take a freshly built model in; raises ModelRefusedError if its model runner is not known."""
        if hosted.build.pool is not None:
            self._adapters[hosted.name] = adapter_of(hosted.name, hosted.core.model_executor)
            hosted.build.pool.use_tier(self.tier)
            self._pools[hosted.name] = hosted.build.pool

    def forget(self, model: str) -> None:
        """The model is removed, resident or not: drop all that host memory has of it."""
        self._adapters.pop(model, None)
        self._pools.pop(model, None)
        swap = self._swaps.pop(model, None)
        if swap is not None:
            swap.transit.wait()
            self.tier.free_image(swap.image)
        self.tier.forget(model)

    def after_step(self, hosted: SwappableModel) -> None:
        """A step of the model ended: its cached blocks may go to the host tier, unless another is under way."""
        pool = hosted.build.pool
        if pool is not None and pool.link is not None and not hosted.core.batch_queue:
            pool.link.mark_computed()

    @property
    def has_unsaved(self) -> bool:
        """Whether `copy_ahead` has something to do, now or when the copies under way have ended."""
        return self._next_unsaved() is not None

    def copy_ahead(self) -> None:
        """Between two steps: begin to save a few cached blocks that no request uses, unless some are on their way."""
        link = self._next_unsaved()
        if link is not None and not self.tier.is_copying:
            link.copy_ahead()

    def _next_unsaved(self) -> TierLink | None:
        """None also while a model is alone and a quarter of the pages is free: nothing is about to be lost."""
        links = self._links()
        found = next((link for link in links if link.has_unsaved), None)
        return found if found is not None and (len(links) > 1 or found.is_short_of_pages) else None

    def _links(self) -> list[TierLink]:
        return [pool.link for pool in self._pools.values() if pool.link is not None]

    def is_out(self, model: str) -> bool:
        """Whether the model's KV is off the device or leaves it: it must not be stepped."""
        swap = self._swaps.get(model)
        return swap is not None and swap.state is not KVState.RETURNING

    @property
    def is_moving(self) -> bool:
        """Whether copies are under way that `poll` should look at."""
        return any(swap.state is not KVState.OUT for swap in self._swaps.values())

    def leaving(self) -> list[str]:
        """Models whose slabs will be free as soon as their blocks are copied, first come first."""
        return [name for name, swap in self._swaps.items() if swap.state is KVState.LEAVING]

    def poll(self) -> None:
        """Finish the moves whose copies have ended."""
        for swap in list(self._swaps.values()):
            if swap.state is not KVState.OUT and swap.transit.poll():
                self._finish(swap)

    def settle(self, model: str) -> None:
        """Wait until the model is in or out, not between."""
        swap = self._swaps.get(model)
        if swap is not None and swap.state is not KVState.OUT:
            self._finish(swap)

    def state(self, model: str) -> KVState:
        """Where the model's KV is."""
        swap = self._swaps.get(model)
        return KVState.IN if swap is None else swap.state

    def bytes_out(self, hosted: SwappableModel) -> int:
        """Bytes that `out` would copy now, or that `into` would copy back; cached blocks not counted."""
        pool = hosted.build.pool
        return 0 if pool is None else pool.num_used_blocks * pool.view.block_bytes

    def slabs_needed(self, hosted: SwappableModel) -> int:
        """Slabs that `into` asks for."""
        return 0 if hosted.build.pool is None else hosted.build.pool.slabs_needed()

    def drop_cached(self, hosted: SwappableModel, n_slabs: int) -> int:
        """Take up to `n_slabs` slabs without a block in use from a resident model; returns how many."""
        pool = hosted.build.pool
        return 0 if pool is None or pool.is_detached else pool.give_back_idle(n_slabs)

    # -- out -----------------------------------------------------------------------------------------

    def out(self, hosted: SwappableModel) -> None:
        """Move the model's used blocks to the host and give all its slabs back.

        Raises CapacityError if host memory does not hold them, SwitchError if a copy fails; nothing has changed. A
        model that keeps no KV has nothing to move and stays resident.
        """
        if hosted.build.pool is None:
            return
        self.begin_out(hosted)
        self.settle(hosted.name)

    def begin_out(self, hosted: SwappableModel) -> None:
        """Reserve host memory and begin to copy; from here on the model must not be stepped.

        Raises CapacityError if host memory does not hold it, SwitchError if copies cannot be begun.
        """
        pool, name = hosted.build.pool, hosted.name
        self.settle(name)
        start = time.perf_counter()
        assert name in self._adapters and name not in self._swaps, f"{name!r} is not resident"
        _check_token_boundary(hosted.core, self._adapters[name])
        self.after_step(hosted)  # with async scheduling there was always another step under way until now
        blocks = pool.used_blocks()
        image = self._or_count_refusal(name, lambda: self.tier.new_image(name, pool.view.block_bytes, len(blocks)))
        try:
            copies = self.tier.begin_copy_out(image, [pool.address_of(block.block_id) for block in blocks])
        except BaseException as error:
            self.tier.free_image(image)
            raise SwitchError(name, "kv_out", str(error)) from error
        slot_of = {id(block): slot for slot, block in enumerate(blocks)}
        transit = pool.transit = KVTransit([(blocks, copies)])
        swap = self._swaps[name] = _Swap(hosted, KVState.LEAVING, image, blocks, transit, slot_of)
        swap.nbytes = len(blocks) * image.block_bytes
        self.counters.blocks_out += len(blocks)
        self.counters.bytes_out += swap.nbytes
        self.counters.seconds_out += time.perf_counter() - start

    def _finish(self, swap: _Swap) -> None:
        """Wait for the copies of a move and end it."""
        swap.transit.wait()
        swap.hosted.build.pool.transit = None
        to_device = swap.state is KVState.RETURNING
        (self._finish_in if to_device else self._finish_out)(swap)
        self.on_moved(KVMove(swap.hosted.name, to_device, swap.nbytes, swap.start_s, swap.transit.seconds))

    def _finish_out(self, swap: _Swap) -> None:
        """Give the slabs back."""
        start = time.perf_counter()
        pool, name = swap.hosted.build.pool, swap.hosted.name
        alive = {id(block) for block in pool.used_blocks()}
        for block in swap.blocks:  # of requests that ended since begin_out
            if id(block) not in alive:
                self.tier.drop_block(swap.image, swap.slot_of.pop(id(block)))
        assert alive == swap.slot_of.keys(), f"{name!r} was stepped while leaving"
        pool.detach(lambda block: self._left(name, block))
        _become(swap, KVState.OUT)
        self.counters.outs += 1
        self.counters.seconds_out += time.perf_counter() - start

    def _left(self, name: str, block: KVCacheBlock) -> None:
        """The last reference to a block that is out is gone."""
        swap = self._swaps.get(name)
        if swap is None:  # forgotten
            return
        slot = swap.slot_of.pop(id(block))
        if block.block_hash is not None:
            self.tier.offer_from_image(swap.image, slot, block.block_hash, block.block_hash_num_tokens)
        self.tier.drop_block(swap.image, slot)

    # -- in ------------------------------------------------------------------------------------------

    def into(self, hosted: SwappableModel) -> None:
        """Bring the model's blocks back and wait until all are there.

        Raises CapacityError if the allocator may not grant `slabs_needed` slabs, SwitchError if the device gives no
        memory or a copy fails; the model is out as before.
        """
        self.begin_in(hosted)
        self.settle(hosted.name)

    def begin_in(self, hosted: SwappableModel) -> None:
        """Get slabs, give the blocks their new ids and begin to copy; the model may be stepped again.

        Raises as `into` does. Without effect unless the model is out.
        """
        swap = self._swaps.get(hosted.name)
        if swap is not None and swap.state is KVState.LEAVING:
            self._finish(swap)
        if swap is None or swap.state is not KVState.OUT:
            return
        start = time.perf_counter()
        pool = hosted.build.pool
        ids = self._or_count_refusal(hosted.name, pool.attach)
        self._adapters[hosted.name].remap(ids)
        _become(swap, KVState.RETURNING)
        swap.start_s, swap.nbytes = time.time(), len(swap.slot_of) * swap.image.block_bytes
        groups: list[Group] = []
        try:
            for blocks in _by_request(swap):
                addresses = {swap.slot_of[id(block)]: pool.address_of(block.block_id) for block in blocks}
                groups.append((blocks, self.tier.begin_copy_in(swap.image, addresses)))
        except BaseException as error:
            KVTransit(groups).wait()
            _become(swap, KVState.OUT)
            pool.detach(lambda block: self._left(hosted.name, block))
            raise SwitchError(hosted.name, "kv_in", str(error)) from error
        swap.transit = pool.transit = KVTransit(groups)
        self.counters.blocks_in += len(swap.slot_of)
        self.counters.bytes_in += swap.nbytes
        self.counters.seconds_in += time.perf_counter() - start

    def _finish_in(self, swap: _Swap) -> None:
        """Free the image."""
        start = time.perf_counter()
        self.tier.free_image(swap.image)
        del self._swaps[swap.hosted.name]
        self.counters.ins += 1
        self.counters.seconds_in += time.perf_counter() - start

    def _or_count_refusal(self, name: str, move: Callable[[], Any]) -> Any:
        try:
            return move()
        except OSError as error:
            raise SwitchError(name, "map", f"the device gives no memory for KV: {error}") from error
        except CapacityError:
            self.counters.refusals += 1
            raise

    def check(self) -> None:
        """Raise AssertionError unless images hold the blocks that are out, and the tier's books agree."""
        self.tier.check()
        for name, swap in self._swaps.items():
            kept = {slot for slot, place in enumerate(swap.image.slots) if place is not None}
            assert kept == set(swap.slot_of.values()), f"the image of {name!r} differs from its blocks"
            if swap.state is KVState.OUT:
                alive = {id(block) for block in swap.blocks if block.ref_cnt}
                assert alive == swap.slot_of.keys(), f"blocks of {name!r} left unnoticed"


def _by_request(swap: _Swap) -> Iterator[list[KVCacheBlock]]:
    """The blocks to bring back: those of the request that runs first, then what each next one needs, then the rest."""
    scheduler, left = swap.hosted.core.scheduler, set(swap.slot_of)
    for request in scheduler.running:
        mine = [block for block in blocks_of(scheduler, request.request_id) if id(block) in left]
        left.difference_update(map(id, mine))
        if mine:
            yield mine
    if left:
        yield [block for block in swap.blocks if id(block) in left]


def _become(swap: _Swap, state: KVState) -> None:
    check_transition(swap.state, state)
    swap.state = state


def _check_token_boundary(core: Any, adapter: RunnerAdapter) -> None:
    """Raise AssertionError if a step of the engine is under way or left block ids for the next one."""
    assert not core.batch_queue, "steps are in flight: drain the engine's batch queue first"
    assert adapter.is_between_steps(), "a step was executed but not sampled"
    for manager in core.scheduler.kv_cache_manager.coordinator.single_type_managers:
        assert not manager.new_block_ids and not manager._pending_cow_copies, "block ids wait for the next step"
