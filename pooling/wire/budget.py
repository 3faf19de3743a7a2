# SPDX-License-Identifier: Apache-2.0
"""What is asked of a host's memory budget while it runs, and what the host says of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class BudgetOrder:
    """A new budget, in bytes; None = as it is. Without either it is a question."""

    device_memory: int | None = None
    """0 parks the pool: all that can leave the device leaves it, and nothing comes before it is more."""
    host_memory: int | None = None

    @property
    def is_question(self) -> bool:
        """Whether nothing is to change."""
        return self.device_memory is None and self.host_memory is None


@dataclass(frozen=True, slots=True)
class BudgetState:
    """The present budget of a host; all sizes are bytes."""

    device_memory: int
    """What the pool may use of the device, in whole pages; 0 while it is parked."""
    host_memory: int
    device_memory_least: int
    """The smallest that would be taken beside 0: one request of full length of each model still fits."""
    device_memory_most: int
    """The largest: what the host has reserved addresses for, the pool file's `device_memory`."""
    device_held: dict[str, dict[str, int]] = field(default_factory=dict)
    """use -> owner -> bytes; what is lent out is not among them."""
    host_held: dict[str, dict[str, int]] = field(default_factory=dict)
    """use -> owner -> bytes."""
    node: dict[str, Any] = field(default_factory=dict)
    """The book of the node that the host shares copies with, as it was a second ago; empty without one."""
    asleep: dict[str, int] = field(default_factory=dict)
    """Models that sleep, with the level."""

    @property
    def is_parked(self) -> bool:
        """Whether nothing may come onto the device."""
        return self.device_memory == 0
