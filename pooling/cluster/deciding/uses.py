# SPDX-License-Identifier: Apache-2.0
"""What the servers of a pool have of its models, put together. Each tells all that it has, again and again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field

from tokenpool.cluster.values import Use


@dataclass(slots=True)
class Want:
    """What all servers together have of a model; times are the controller's."""

    num_held: int = 0
    """Requests that wait for it."""
    num_unfinished: int = 0
    """Requests that are being answered, or go on once it is loaded."""
    since_s: float = math.inf
    """Since when the first one waits."""
    due_by_tenant: dict[str, float] = field(default_factory=dict)
    """When the most urgent of each tenant's that wait is due."""
    used_s: float = -math.inf
    """When it was used last."""

    @property
    def is_used(self) -> bool:
        """Whether somebody has a request for it."""
        return self.num_held > 0 or self.num_unfinished > 0

    def add(self, use: Use, told_s: float) -> None:
        """A server has that, as it told then."""
        self.num_held += use.num_held
        self.num_unfinished += use.num_unfinished
        self.used_s = max(self.used_s, told_s - use.idle_for_s)
        if use.num_held:
            self.since_s = min(self.since_s, told_s - use.held_for_s)
        for tenant, due_in_s in use.due_in_s.items():
            self.due_by_tenant[tenant] = min(told_s + due_in_s, self.due_by_tenant.get(tenant, math.inf))


class Uses:
    """By server; of one that is gone only when it used a model last is remembered."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[float, Mapping[str, Use]]] = {}
        self._used_s: dict[str, float] = {}

    def tell(self, server: str, uses: Mapping[str, Use], now_s: float) -> None:
        """A server has these, and nothing of any other model."""
        self._told[server] = now_s, uses

    def keep(self, servers: Set[str], models: Iterable[str]) -> None:
        """Forget other servers and models."""
        self._told = {server: told for server, told in self._told.items() if server in servers}
        self._used_s = {name: self._used_s[name] for name in models if name in self._used_s}

    def have_told(self, servers: Set[str]) -> bool:
        """Whether it is known what all of these have."""
        return servers <= self._told.keys()

    def rested_by(self, servers: Set[str], model: str, rest: int) -> bool:
        """Whether all of these have finished what they had of a model, in that rest of it."""
        told = [self._told[server][1].get(model, Use()).rested for server in servers if server in self._told]
        return len(told) == len(servers) and all(rested == rest for rested in told)

    def wants(self) -> dict[str, Want]:
        """What all have together, of the models that somebody has something of, or had."""
        wants = {name: Want(used_s=used_s) for name, used_s in self._used_s.items()}
        for told_s, uses in self._told.values():
            for name, use in uses.items():
                wants.setdefault(name, Want()).add(use, told_s)
        self._used_s.update({name: want.used_s for name, want in wants.items() if want.used_s > -math.inf})
        return wants
