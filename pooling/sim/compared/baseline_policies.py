# SPDX-License-Identifier: Apache-2.0
"""Turn policies of baselines that no host could run, or that would not be of use in one."""

from __future__ import annotations

import itertools
import math

from tokenpool.policy.turns import Decision, ModelView, Phase, PoolView
from tokenpool.sim.device import SimDevice


class FirstCome:
    """A `TurnPolicy` that begins requests strictly in order of arrival and interrupts none.

    A running model admits what waits for it only while no request of another model has waited longer.
    """

    def decide(self, pool: PoolView) -> Decision:
        """The current model until its running requests have ended, else that of the oldest request."""
        current: ModelView | None = None
        first = pool.models[0]
        for view in pool.models:
            if view.model == pool.current:
                current = view
            if view.arrival_s < first.arrival_s:
                first = view
        if current is not None and current.num_running:
            admits = current.arrival_s <= first.arrival_s
            return Decision(current.model, Phase.MIXED if admits else Phase.DECODE, hold_s=math.inf)
        return Decision(first.model, hold_s=math.inf)


class ShortestFirst:
    """A `TurnPolicy` that runs the model of the request with the fewest tokens left. An oracle: it looks at answers.

    No view tells the length of answers, so it looks at `device`, which must be set.
    """

    device: SimDevice

    def decide(self, pool: PoolView) -> Decision:
        """The model of the shortest rest; the first of equal ones."""
        best, least = pool.models[0].model, math.inf
        for seat in self.device.active:
            for request in itertools.chain(seat.running, seat.waiting):
                if request.num_left < least:
                    best, least = seat.name, request.num_left
        return Decision(best, hold_s=math.inf)
