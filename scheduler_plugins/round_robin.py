# SPDX-License-Identifier: Apache-2.0
"""Round robin: every model with work takes one engine step in turn."""

from __future__ import annotations

from tokenpool.policy.turns import Decision, PoolView


class RoundRobin:
    """A `TurnPolicy` under which a model with work waits at most one step of every other model.

    The naive baseline: it looks at no due time and at no residency. As long as all models are resident a turn costs
    nothing and it is a good policy; with more models than fit it switches for every token.
    """

    def __init__(self) -> None:
        self._last = -1

    def decide(self, pool: PoolView) -> Decision:
        """The first model after the one that stepped last, in the order of their indices."""
        for view in pool.models:
            if view.index > self._last:
                break
        else:
            view = pool.models[0]
        self._last = view.index
        return Decision(view.model)
