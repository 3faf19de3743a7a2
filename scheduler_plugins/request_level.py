# SPDX-License-Identifier: Apache-2.0
"""Request-level switching: a model keeps the device until it has no work."""

from __future__ import annotations

import math

from tokenpool.policy.turns import Decision, PoolView


class RequestLevel:
    """A `TurnPolicy` that switches only between requests, never inside one.

    The model whose turn it is runs, and admits what arrives, until it is idle. Then the model whose oldest waiting
    request came first gets the turn, a tie going to the smaller index; a model that has only running requests, paused
    by some other policy, comes before all. Nothing is prefetched. A model waits for the whole queue of the model
    before it: this is the baseline that token-level turns are measured against.

    Source: the serving scheme of ServerlessLLM (OSDI'24) reduced to one device; its locality-aware placement and live
    migration concern several devices and are left out.
    """

    def decide(self, pool: PoolView) -> Decision:
        """The current model while it has work, else the one that has waited longest."""
        oldest = pool.models[0]
        oldest_s = math.inf
        for view in pool.models:
            if view.model == pool.current:
                return Decision(view.model, hold_s=math.inf)
            arrival_s = view.arrival_s if view.num_waiting else -math.inf
            if arrival_s < oldest_s:
                oldest, oldest_s = view, arrival_s
        return Decision(oldest.model, hold_s=math.inf)
