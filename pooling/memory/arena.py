# SPDX-License-Identifier: Apache-2.0
"""The KV arena: one reserved address range that every model of a device views with its own block stride.

    base                      base + null_bytes
     | null region             | slab 0      | slab 1      | ...                 | tail (never backed)
     | a's null | b's null |   | b b b b b b | (no access) | a a a a a a a a a   |

A model's view starts at its private null block, so block 0 is the null block and block i lies at
offset + i * block_bytes. A slab's blocks are those that lie wholly inside it; a block that straddles two slabs
is never used. Granting a slab therefore changes no tensor: it backs a page and adds ids to a free list.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tokenpool.errors import CapacityError
from tokenpool.memory.devices.device import Device
from tokenpool.memory.ledger import PageLedger, PageUse
from tokenpool.memory.page_counts import pages_for

NULL_OWNER = "null blocks"
_ALIGN = 4096
_MAX_NULL_PAGES = 64


@dataclass(frozen=True, slots=True)
class ArenaView:
    """Where one model's KV blocks lie in the arena; sizes are bytes."""

    owner: str
    offset: int
    """Offset of the model's null block, hence of its block 0, from the arena's base."""
    block_bytes: int


class KVArena:
    """Backs slabs with pages, keeps each model's null block mapped, and does the block-id arithmetic.

    Slab k is backed by page k of the ledger. Called on the host loop's thread only.
    """

    def __init__(self, device: Device, ledger: PageLedger, *, poison: bool = False) -> None:
        if ledger.page_size % device.granularity:
            raise CapacityError(
                f"page_size {ledger.page_size} is no multiple of the device's {device.granularity} bytes"
            )
        self.device = device
        self.ledger = ledger
        self.slab_bytes = ledger.page_size
        self.num_slabs = ledger.num_pages
        self.poison = poison
        """Fill slabs with 0xFF (NaN in every float type) when they are taken away: for tests."""
        self.null_bytes = _MAX_NULL_PAGES * self.slab_bytes
        self.span_bytes = self.null_bytes + self.num_slabs * self.slab_bytes
        """Bytes of a view that starts at offset 0: what an engine is told its KV memory is."""
        self.make_room: Callable[[int], None] = lambda count: None
        """Called before pages are taken for null blocks; the allocator frees as many or raises CapacityError."""
        self._reserved_bytes = self.span_bytes + self.null_bytes
        self.base = device.reserve(self._reserved_bytes, harmless=True)
        self._mapped: set[int] = set()
        self._null_pages: list[int] = []
        self._views: dict[str, ArenaView] = {}

    def close(self) -> None:
        """Release the address range; no tensor over it may be used afterwards."""
        self.device.release(self.base, self._reserved_bytes)

    # -- views ---------------------------------------------------------------------------------------

    def place_of(self, owner: str, block_bytes: int) -> ArenaView:
        """The view that `owner` would get now; raises CapacityError for blocks that pages cannot hold."""
        if block_bytes > self.slab_bytes:
            raise CapacityError(
                f"model {owner!r}: one KV block of all layers is {block_bytes} bytes, more than page_size "
                f"{self.slab_bytes}; raise page_size or lower --block-size"
            )
        offset = self._find_null_gap(block_bytes)
        view = ArenaView(owner, offset, block_bytes)
        if self.min_blocks_per_slab(view) < 1:
            raise CapacityError(
                f"model {owner!r}: one KV block of all layers is {block_bytes} bytes, a page of {self.slab_bytes} "
                "may hold none of them whole; raise page_size or lower --block-size"
            )
        return view

    def open_view(self, owner: str, block_bytes: int) -> ArenaView:
        """Place `owner`'s null block and return its view; raises CapacityError when it cannot be backed."""
        view = self.place_of(owner, block_bytes)
        missing = pages_for(view.offset + block_bytes, self.slab_bytes) - len(self._null_pages)
        if missing > 0:
            self.make_room(missing)
            self._map_null_pages(owner, missing)
        self._views[owner] = view
        return view

    def close_view(self, owner: str) -> None:
        """Forget `owner`'s view; its null block's place is used again, null pages stay mapped."""
        view = self._views.pop(owner)
        self.device.fill(self.base + view.offset, view.block_bytes, 0)

    def _map_null_pages(self, owner: str, count: int) -> None:
        """Back so many more pages of the null region; those that the device gives stay when it refuses one."""
        pages = self.ledger.take(NULL_OWNER, PageUse.NULL, count)
        try:
            while pages:
                self.device.map_zeroed(self.base + len(self._null_pages) * self.slab_bytes, self.slab_bytes)
                self._null_pages.append(pages.pop(0))
        except OSError as error:
            raise CapacityError(
                f"model {owner!r}: the device gives no memory for its null block, {len(pages)} pages of "
                f"{self.slab_bytes} bytes are missing: {error}; lower device_memory or stop what else uses the device",
                needed_pages=len(pages),
            ) from error
        finally:
            self.ledger.give(NULL_OWNER, PageUse.NULL, pages)

    def _find_null_gap(self, nbytes: int) -> int:
        # So that no border of a slab cuts a block in two where blocks fill a slab, and else as late as can be.
        align = math.lcm(_ALIGN, math.gcd(nbytes, self.slab_bytes))
        end = 0
        for view in sorted(self._views.values(), key=lambda v: v.offset):
            if view.offset - end >= nbytes:
                break
            end = -(-(view.offset + view.block_bytes) // align) * align
        if end + nbytes > self.null_bytes:
            raise CapacityError(
                f"no place for another null block of {nbytes} bytes: {len(self._views)} models fill the "
                f"arena's null region of {self.null_bytes} bytes; raise page_size or remove a model"
            )
        return end

    def tensor(self, view: ArenaView) -> torch.Tensor:
        """An int8 tensor of shape (span_bytes,) whose byte 0 is the first byte of the view's block 0."""
        return self.device.tensor(self.base + view.offset, self.span_bytes)

    # -- slabs ---------------------------------------------------------------------------------------

    def block_ids(self, view: ArenaView, slab: int) -> range:
        """Ids of the view's blocks that lie wholly inside `slab`."""
        start = self.null_bytes + slab * self.slab_bytes - view.offset
        return range(-(-start // view.block_bytes), (start + self.slab_bytes) // view.block_bytes)

    def slab_of(self, view: ArenaView, block_id: int) -> int:
        """The slab in which block `block_id` of the view lies; negative for the null block."""
        return (view.offset + block_id * view.block_bytes - self.null_bytes) // self.slab_bytes

    def min_blocks_per_slab(self, view: ArenaView) -> int:
        """Blocks that any slab holds at least, wherever its border falls."""
        step = math.gcd(view.offset, view.block_bytes, self.slab_bytes)  # a block begins so many bytes behind a border
        return (self.slab_bytes - view.block_bytes + step) // view.block_bytes

    def map_slab(self, slab: int) -> None:
        """Back `slab` with zeroed memory."""
        if slab in self._mapped:
            raise AssertionError(f"slab {slab} is mapped already")
        self.device.map_zeroed(self._address(slab), self.slab_bytes)
        self._mapped.add(slab)

    def unmap_slab(self, slab: int) -> None:
        """Let `slab`'s memory go, behind copies that are under way; see `Device.park`."""
        self._mapped.remove(slab)
        if self.poison:
            self.device.fill(self._address(slab), self.slab_bytes, 0xFF)
        self.device.park(self._address(slab), self.slab_bytes)

    def _address(self, slab: int) -> int:
        return self.base + self.null_bytes + slab * self.slab_bytes

    def check(self) -> None:
        """Raise AssertionError unless exactly the pages held for KV are mapped and no null blocks overlap."""
        held = {page for page in range(self.num_slabs) if self._is_kv(page)}
        assert self._mapped == held, f"mapped {sorted(self._mapped)} but held for KV {sorted(held)}"
        end = 0
        for view in sorted(self._views.values(), key=lambda v: v.offset):
            assert view.offset >= end, f"null block of {view.owner!r} overlaps another"
            end = view.offset + view.block_bytes
        assert end <= len(self._null_pages) * self.slab_bytes, "a null block has no memory"

    def _is_kv(self, page: int) -> bool:
        holder = self.ledger.holder(page)
        return holder is not None and holder[1] is PageUse.KV
