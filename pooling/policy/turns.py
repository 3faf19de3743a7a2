# SPDX-License-Identifier: Apache-2.0
"""The turn policy: whose engine takes the next step. Pure values in, a name out; no vllm, no ray, no clock reads."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import NamedTuple, Protocol

from tokenpool.errors import ConfigError

ENTRY_POINT_GROUP = "tokenpool.turn_policies"


class QueueView(NamedTuple):
    """One model with work, as a turn policy sees it."""

    model: str
    index: int
    """Place of the model in the order in which models were added; unique."""
    num_running: int
    num_waiting: int
    priority: int


class TurnPolicy(Protocol):
    """Decides turns; one instance per host."""

    def next_turn(self, ready: Sequence[QueueView], current: int | None) -> str:
        """Name of the model to step next.

        Args:
            ready: the models that can step now, in order of their index; never empty.
            current: index of the model that stepped last, or None.
        """


def load_turn_policy(name: str) -> TurnPolicy:
    """Instantiate the policy registered as `name`; raises ConfigError naming the known ones."""
    known = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in known:
        raise ConfigError(f"scheduling.policy: no policy {name!r}; known: {', '.join(sorted(known))}")
    return known[name].load()()
