# SPDX-License-Identifier: Apache-2.0
"""What the host tier (kv_tier.py) keeps: images of paused requests, cached blocks, and room for blocks that come."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

from tokenpool.memory.host_slots import Slot, SlotPool


@dataclass(slots=True)
class TierCounters:
    """Running totals; bytes are those copied between device and host."""

    paused_out_bytes: int = 0
    paused_in_bytes: int = 0
    cached_out_bytes: int = 0
    cached_in_bytes: int = 0
    copies: int = 0
    """Copies between two places; neighbouring blocks go in one."""
    hits: int = 0
    """Cached blocks copied back to the device."""
    misses: int = 0
    """Lookups of models that have cached blocks here which found nothing."""
    evictions: int = 0
    """Cached blocks dropped for want of memory."""
    refusals: int = 0
    """Cached blocks not taken for want of memory."""


@dataclass(slots=True, eq=False)
class KVImage:
    """Blocks of one model's paused requests; `slots[i]` holds the i-th one, None after it was dropped."""

    model: str
    block_bytes: int
    slots: list[Slot | None]


@dataclass(slots=True, weakref_slot=True)
class CachedBlock:
    """One cached block; `tag` is given back with it and means nothing to the tier."""

    model: str
    key: bytes
    slot: Slot
    tag: int | None
    used: int
    """Tick of the last use."""


@dataclass(slots=True, eq=False)
class Arrival:
    """Slots set aside for blocks that come from another host; whoever brings them writes there beside the loop."""

    model: str
    slots: list[Slot]
    stale: set[bytes] | None = field(default_factory=set)
    """Keys that came to mean something else meanwhile; None = all."""


class OfferedBlock(NamedTuple):
    """A block on the device whose bytes are complete, or will be when the engine has done what it was told by now."""

    key: bytes
    tag: int | None
    address: int


@dataclass(slots=True)
class SizeClass:
    """All that is stored in blocks of one size."""

    paused: SlotPool
    cached: SlotPool
    lru: OrderedDict[tuple[str, bytes], CachedBlock] = field(default_factory=OrderedDict)
