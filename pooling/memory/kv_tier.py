# SPDX-License-Identifier: Apache-2.0
"""KV blocks in host memory: images of paused requests, and cached blocks by content.

An image holds the blocks of one model's paused requests until they come back; it is never dropped. A cached block is
found by model and content key, least recently used ones go first, and all of them go when host memory is needed.
Imports no vllm: a key is any bytes that name a block's content.

Copies of cached blocks are begun and not waited for: one device's copies end in the order in which they were begun, so
a block that is still on its way here can be sent back at once. Whoever touches host memory itself waits for them.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tokenpool.memory.devices.device import BlockCopy, Copies, Device
from tokenpool.memory.host_ledger import HostLedger, HostUse
from tokenpool.memory.host_slots import FREE_SLOTS, Slot, SlotBuffer, SlotPool, in_runs
from tokenpool.memory.kv_blocks import Arrival, CachedBlock, KVImage, OfferedBlock, SizeClass, TierCounters

_LEAST_BUFFER, _MOST_BUFFER = 1 << 20, 32 << 20


class HostKVTier:
    """Stores KV blocks in host memory that it accounts in `host`. Called on the host loop's thread only.

    `buffer_bytes` is the most that one host buffer holds; by default 1/64 of the budget, within 1 to 32 MiB, because
    cached blocks go by whole buffers when others need memory. Empty buffers of images are kept up to `spare_bytes`,
    because pinning memory anew is slow; they and cached blocks are what `drop_cached` gives up.
    """

    def __init__(
        self, host: HostLedger, device: Device, *, buffer_bytes: int | None = None, spare_bytes: int = 0
    ) -> None:
        self.host = host
        self.device = device
        self.counters = TierCounters()
        self._buffer_bytes = buffer_bytes or min(_MOST_BUFFER, max(_LEAST_BUFFER, host.budget_bytes // 64))
        self._spare_bytes = spare_bytes
        self._classes: dict[int, SizeClass] = {}  # by block_bytes
        self._entries: dict[str, dict[bytes, CachedBlock]] = {}  # by model, then by key
        self._generations: Counter[str] = Counter()
        self._images: list[KVImage] = []
        self._under_way: deque[Copies] = deque()  # of cached blocks
        self._arrivals: list[Arrival] = []
        self._tick = 0

    # -- images --------------------------------------------------------------------------------------

    def new_image(self, model: str, block_bytes: int, num_blocks: int) -> KVImage:
        """Make room for `num_blocks` blocks; raises CapacityError and changes no image if there is none."""
        pool = self._class(block_bytes).paused
        missing = pool.missing_bytes(num_blocks)
        if missing > self.host.free_bytes:
            self.drop_cached(missing - self.host.free_bytes)
        image = KVImage(model, block_bytes, list(pool.take(model, num_blocks)))
        self._images.append(image)
        return image

    def begin_copy_out(self, image: KVImage, addresses: Sequence[int]) -> Copies:
        """Copy one device block per slot into the image; `addresses[i]` is where the i-th one starts."""
        copies = self._copies(image, enumerate(addresses))
        begun = self.device.begin_copies_out(copies)
        self.counters.paused_out_bytes += sum(host.numel() for _, host in copies)
        self.counters.copies += len(copies)
        return begun

    def begin_copy_in(self, image: KVImage, addresses: Mapping[int, int]) -> Copies:
        """Copy the blocks with these indices to these addresses; the image must not be freed meanwhile."""
        copies = self._copies(image, sorted(addresses.items()))
        begun = self.device.begin_copies_in(copies)
        self.counters.paused_in_bytes += sum(host.numel() for _, host in copies)
        self.counters.copies += len(copies)
        return begun

    def drop_block(self, image: KVImage, index: int) -> None:
        """Forget one block of an image, whose request ended."""
        slot = image.slots[index]
        assert slot is not None, "dropped twice"
        image.slots[index] = None
        self._class(image.block_bytes).paused.give(image.model, slot)

    def free_image(self, image: KVImage) -> None:
        """Forget an image and what is left in it."""
        self._images.remove(image)
        for index, slot in enumerate(image.slots):
            if slot is not None:
                self.drop_block(image, index)

    def _copies(self, image: KVImage, addresses: Iterable[tuple[int, int]]) -> list[BlockCopy]:
        places = []
        for index, address in addresses:
            slot = image.slots[index]
            assert slot is not None, "dropped"
            places.append((slot, address))
        return in_runs(places, image.block_bytes)

    # -- cached blocks -------------------------------------------------------------------------------

    def entries_of(self, model: str) -> Mapping[bytes, CachedBlock]:
        """What is cached for `model`, by key; a live view, the same object as long as the tier lives."""
        return self._entries.setdefault(model, {})

    def generation(self, model: str) -> int:
        """Another number each time all that was cached for `model` was forgotten: keys then mean other bytes.

        What was found before this was read is of this generation, or of an earlier one. For any thread.
        """
        return self._generations[model]

    def offer(
        self, model: str, blocks: Iterable[OfferedBlock], block_bytes: int, *, most_bytes: int | None = None
    ) -> Copies | None:
        """Begin to copy device blocks into the tier, in one batch; None if nothing is to be copied.

        `blocks` come in the order in which they may be dropped again. Those that are here already stay; of the others
        the last ones are taken, as many as there is memory for and at most `most_bytes`. Nobody may write to the
        blocks on the device before the copies have ended.
        """
        new = {block.key: block for block in blocks if not self.refresh(model, block.key)}
        kept = list(new.values())[-max(1, most_bytes // block_bytes) if most_bytes is not None else 0 :]
        slots = self._cached_slots(model, len(kept), block_bytes) if kept else []
        self.counters.refusals += len(new) - len(slots)
        kept = kept[len(kept) - len(slots) :]
        if not kept:
            return None
        slot_of = dict(zip(sorted(block.address for block in kept), slots, strict=True))
        copies = in_runs(((slot, address) for address, slot in slot_of.items()), block_bytes)
        try:
            begun = self.device.begin_copies_out(copies)
        except OSError:  # a cache may forget
            for slot in slots:
                self._class(block_bytes).cached.give(model, slot)
            self.counters.refusals += len(slots)
            return None
        self._note(begun, slots)  # before others can find them: who reads beside the loop looks whether copies go on
        for block in kept:
            self._insert(model, block.key, block.tag, slot_of[block.address])
        self.counters.cached_out_bytes += len(kept) * block_bytes
        self.counters.copies += len(copies)
        return begun

    def offer_from_image(self, image: KVImage, index: int, key: bytes, tag: int | None) -> bool:
        """Copy a block of an image among the cached ones; the image keeps its own."""
        source = image.slots[index]
        assert source is not None
        if self.refresh(image.model, key):
            return True
        slot = self._cached_slot(image.model, image.block_bytes)
        if slot is None:
            return False
        slot.buffer.settle()
        slot.view().copy_(source.view())
        self._insert(image.model, key, tag, slot)
        return True

    def begin_load(self, model: str, places: Mapping[bytes, int]) -> Copies:
        """Begin to copy cached blocks, all of which must be here, to these addresses by key. The tier keeps them.

        Raises OSError, and any part is there, when the device refuses.
        """
        slots = {self._entries[model][key].slot: address for key, address in places.items()}
        block_bytes = next(iter(slots)).buffer.block_bytes
        copies = in_runs(sorted(slots.items(), key=lambda place: place[1]), block_bytes)
        begun = self.device.begin_copies_in(copies)
        self._note(begun, slots)
        for key in places:
            self.refresh(model, key)
        self.counters.hits += len(places)
        self.counters.cached_in_bytes += len(places) * block_bytes
        self.counters.copies += len(copies)
        return begun

    def tag_of(self, model: str, key: bytes) -> int | None:
        """What a block that is here was offered with."""
        return self._entries[model][key].tag

    def refresh(self, model: str, key: bytes) -> bool:
        """Whether a cached block is here; one that is counts as used now."""
        entry = self._entries.get(model, {}).get(key)
        if entry is None:
            return False
        self._tick += 1
        entry.used = self._tick
        self._class(entry.slot.buffer.block_bytes).lru.move_to_end((model, key))
        return True

    @property
    def is_copying(self) -> bool:
        """Whether copies of cached blocks are under way."""
        while self._under_way and self._under_way[0].done():
            self._under_way.popleft()
        return bool(self._under_way)

    def _note(self, copies: Copies, slots: Iterable[Slot]) -> None:
        if not copies.done():
            self._under_way.append(copies)
            for slot in slots:
                slot.buffer.copies = copies

    def begin_arrival(self, model: str, count: int, block_bytes: int) -> Arrival:
        """Set slots aside for blocks of another host, as many of `count` as there is memory for.

        They are written to beside the loop, and nobody gets them until `end_arrival`, which must follow.
        """
        slots = self._cached_slots(model, count, block_bytes)
        self.counters.refusals += count - len(slots)
        arrival = Arrival(model, slots)
        for slot in slots:
            slot.buffer.settle()
            slot.buffer.occupants[slot.index] = arrival
        self._arrivals.append(arrival)
        return arrival

    def end_arrival(self, arrival: Arrival, came: Sequence[tuple[bytes, int | None] | None]) -> int:
        """Take in what came, and give the other slots back; returns how many of these blocks are here.

        `came[i]` is key and tag of the block whose bytes are in the i-th slot, None or beyond the end: nothing came.
        """
        self._arrivals.remove(arrival)
        num_here, stale = 0, arrival.stale
        for index, slot in enumerate(arrival.slots):
            block = came[index] if index < len(came) else None
            is_valid = block is not None and stale is not None and block[0] not in stale
            if block is not None and is_valid and not self.refresh(arrival.model, block[0]):
                self._insert(arrival.model, *block, slot)
            else:
                self._class(slot.buffer.block_bytes).cached.give(arrival.model, slot)
            num_here += is_valid
        return num_here

    def discard(self, model: str, key: bytes) -> None:
        """Forget one cached block, if it is here: what it names is no longer what it was."""
        entry = self._entries.get(model, {}).get(key)
        if entry is not None:
            self._remove(entry)
        for arrival in self._arrivals:
            if arrival.model == model and arrival.stale is not None:
                arrival.stale.add(key)

    def forget(self, model: str) -> None:
        """Forget all cached blocks of `model`: it is removed, or its weights changed."""
        self._generations[model] += 1  # first: see `generation`
        for entry in list(self._entries.get(model, {}).values()):
            self._remove(entry)
        for arrival in self._arrivals:
            if arrival.model == model:
                arrival.stale = None

    @property
    def droppable_bytes(self) -> int:
        """What `drop_cached` can give back at most."""
        spare = sum(b.nbytes for c in self._classes.values() for b in c.paused.buffers if not b.occupants)
        return self.host.total(HostUse.CACHED_KV) + spare - sum(b.nbytes for b in self._arriving_in().values())

    def _arriving_in(self) -> dict[int, SlotBuffer]:
        """Buffers that somebody writes to beside the loop."""
        return {id(slot.buffer): slot.buffer for arrival in self._arrivals for slot in arrival.slots}

    def drop_cached(self, nbytes: int) -> int:
        """Give at least `nbytes` of host memory back if cached blocks hold as much; returns how much it was.

        Whole buffers go, the one with the least recently used block first, and with it younger neighbours.
        """
        before = self.host.free_bytes
        for size_class in self._classes.values():
            size_class.paused.drop_empty()
        while self.host.free_bytes - before < nbytes:
            oldest = [next(iter(c.lru.values())) for c in self._classes.values() if c.lru]
            if not oldest:
                break
            buffer = min(oldest, key=lambda entry: entry.used).slot.buffer
            for entry in [e for e in buffer.occupants.values() if isinstance(e, CachedBlock)]:
                self._remove(entry)
                self.counters.evictions += 1
        return self.host.free_bytes - before

    def _cached_slot(self, model: str, block_bytes: int) -> Slot | None:
        slots = self._cached_slots(model, 1, block_bytes)
        if not slots:
            self.counters.refusals += 1
            return None
        return slots[0]

    def _cached_slots(self, model: str, count: int, block_bytes: int) -> list[Slot]:
        """Up to `count` slots: free ones, those of new memory, or those of least recently used blocks of this size."""
        size_class = self._class(block_bytes)
        slots, lru = size_class.cached, size_class.lru
        try:
            while slots.num_free < count and slots.try_grow():
                pass
        except (OSError, MemoryError):  # the machine has less than the budget says: a cache may do with what it has
            pass
        while slots.num_free < count and lru:
            self._remove(next(iter(lru.values())), keep_buffer=True)
            self.counters.evictions += 1
        while slots.num_free < count and self.drop_cached(block_bytes) and slots.try_grow():
            pass
        taken = slots.take(model, min(count, slots.num_free))
        slots.drop_empty()
        return taken

    def _insert(self, model: str, key: bytes, tag: int | None, slot: Slot) -> None:
        self._tick += 1
        entry = CachedBlock(model, key, slot, tag, self._tick)
        slot.buffer.occupants[slot.index] = entry
        self._class(slot.buffer.block_bytes).lru[model, key] = entry
        self._entries.setdefault(model, {})[key] = entry

    def _remove(self, entry: CachedBlock, *, keep_buffer: bool = False) -> None:
        size_class = self._class(entry.slot.buffer.block_bytes)
        del size_class.lru[entry.model, entry.key]
        del self._entries[entry.model][entry.key]
        size_class.cached.give(entry.model, entry.slot, keep_buffer=keep_buffer)

    def _class(self, block_bytes: int) -> SizeClass:
        found = self._classes.get(block_bytes)
        if found is None:
            paused, cached = (
                SlotPool(self.host, self.device, use, block_bytes, self._buffer_bytes, spare)
                for use, spare in ((HostUse.PAUSED_KV, self._spare_bytes), (HostUse.CACHED_KV, 0))
            )
            found = self._classes[block_bytes] = SizeClass(paused, cached)
        return found

    # -- state ---------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise AssertionError unless slots, entries, images and the host ledger agree."""
        self.host.check()
        held: Counter[tuple[str, HostUse]] = Counter()
        for block_bytes, c in self._classes.items():
            for pool in (c.paused, c.cached):
                pool.check()
                held[FREE_SLOTS, pool.use] += pool.num_free * block_bytes
                for buffer in pool.buffers:
                    for occupant in buffer.occupants.values():
                        owner = occupant.model if isinstance(occupant, CachedBlock | Arrival) else occupant
                        held[owner, pool.use] += block_bytes
        for (owner, use), nbytes in held.items():
            assert nbytes == self.host.held(owner, use), f"{owner!r} holds {nbytes} bytes of {use} here"
        for use in (HostUse.PAUSED_KV, HostUse.CACHED_KV):
            nbytes = sum(n for (_, u), n in held.items() if u is use)
            assert nbytes == self.host.total(use), f"{nbytes} bytes of {use} here, {self.host.total(use)} in the books"
        in_lru = {key: entry for c in self._classes.values() for key, entry in c.lru.items()}
        listed = {(model, key): e for model, keys in self._entries.items() for key, e in keys.items()}
        assert in_lru == listed, "cached blocks and their order differ"
        for c in self._classes.values():
            ticks = [entry.used for entry in c.lru.values()]
            assert ticks == sorted(ticks), "not in the order of use"
            stored = [e for b in c.cached.buffers for e in b.occupants.values()]
            entries = {id(e) for e in stored if not isinstance(e, Arrival)}
            assert entries == {id(e) for e in c.lru.values()}, "a slot is lost"
            arriving = [a for a in self._arrivals for slot in a.slots if slot.buffer in c.cached.buffers]
            assert len(arriving) == sum(isinstance(e, Arrival) for e in stored), "a slot waits for nothing"
        for bb, c in self._classes.items():
            used = sum(len(b.occupants) for b in c.paused.buffers)
            mine = [s for i in self._images if i.block_bytes == bb for s in i.slots if s is not None]
            assert used == len({(id(s.buffer), s.index) for s in mine}) == len(mine), "images share or lost slots"

    def snapshot(self) -> dict[str, Any]:
        """Plain values for state and metrics."""
        return {
            "paused_bytes": self.host.total(HostUse.PAUSED_KV),
            "cached_bytes": self.host.total(HostUse.CACHED_KV),
            "cached_blocks": {model: len(entries) for model, entries in self._entries.items() if entries},
            **asdict(self.counters),
        }
