# SPDX-License-Identifier: Apache-2.0
"""Lending on a Ray cluster: refused by name, because a controller counts on the memory that each host began with."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tokenpool.errors import ConfigError
from tokenpool.wire.budget import BudgetOrder, BudgetState


class NoLending:
    """See HostLending."""

    asleep: Mapping[str, int] = MappingProxyType({})

    async def set_budget(self, order: BudgetOrder) -> BudgetState:
        """See HostLending; raises ConfigError."""
        raise ConfigError("a pool on a Ray cluster keeps its memory budget: only a pool on one machine can change it")

    async def sleep(self, name: str, level: int, mode: str) -> None:
        """See HostLending; raises ConfigError."""
        raise ConfigError("models of a pool on a Ray cluster cannot sleep: only those of a pool on one machine can")

    async def wake(self, name: str) -> None:
        """See HostLending; nothing sleeps."""
