# SPDX-License-Identifier: Apache-2.0
"""What `Lives` decides on, and what it says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import NamedTuple

from tokenpool.cluster.seats import Pair, Seat
from tokenpool.cluster.values import Deployment
from tokenpool.errors import PoolError


class Event(NamedTuple):
    """What was decided of a model."""

    action: str
    """`wake`, `rest`, `cold`, `demand_load` once it is served, or `load_failed`."""
    model: str
    reason: str
    error: PoolError | None = None
    """Why it cannot be loaded."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What is so now."""

    now_s: float
    models: Mapping[str, Deployment]
    retiring: Set[str]
    """Models that are being removed."""
    seats: Mapping[Pair, Seat]
    servers: Set[str]
    num_hosts: int
    has_room: Callable[[str, Set[str]], bool]
    """Whether a host has room for a model, once those others are gone."""
    errors: Mapping[str, PoolError]
    """Why models could not be loaded when that was tried last."""
    may_come: Callable[[str], bool] = lambda name: False
    """Whether another host may come that has room for a model."""
    stranded: Set[str] = frozenset()
    """Models whose hosts are given back, and that have no room elsewhere."""
