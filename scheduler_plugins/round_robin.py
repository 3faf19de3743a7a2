# SPDX-License-Identifier: Apache-2.0
"""Round robin: every model with work takes one engine step in turn."""

from __future__ import annotations

from collections.abc import Sequence

from tokenpool.policy.turns import QueueView


class RoundRobin:
    """A `TurnPolicy` under which a model with work waits at most one step of every other model."""

    def next_turn(self, ready: Sequence[QueueView], current: int | None) -> str:
        """The first ready model after the one that stepped last, in the order of their indices."""
        if current is not None:
            for view in ready:
                if view.index > current:
                    return view.model
        return ready[0].model
