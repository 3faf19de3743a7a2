# SPDX-License-Identifier: Apache-2.0
"""One simulated request, whose tokens come in runs of equal steps: each run is accounted in constant time."""

from __future__ import annotations

import math

from tokenpool.config import SLO
from tokenpool.sim.workload import SimRequest


class Timeline:
    """A request on its way, and its due times; the measures are those of `policy.slo.RequestTimeline`.

    The difference is that `deliver` takes many tokens at once, at equal distances, without a loop over them.
    """

    __slots__ = (
        "spec", "slo", "arrival_s", "ttft_s", "tpot_s", "num_delivered", "num_left", "context_len", "num_on_time",
        "num_cached", "first_token_s", "failed", "_last_s", "_good_s", "_run_start_s", "_credit_s",
    )  # fmt: skip

    def __init__(self, spec: SimRequest, slo: SLO | None) -> None:
        self.spec, self.slo, self.arrival_s = spec, slo, spec.arrival_s
        self.ttft_s, self.tpot_s = (slo.ttft_s, slo.tpot_s) if slo else (math.inf, math.inf)
        self.num_delivered = 0
        self.num_left = spec.output_len
        """Tokens still to come."""
        self.context_len = spec.input_len
        """Tokens whose KV the next step reads."""
        self.num_on_time = 0
        self.num_cached = 0
        """Prompt tokens whose KV was kept from others, in its last prefill."""
        self.first_token_s = math.inf
        self.failed = False
        """Given up by the pool; tokens that were not delivered are missed."""
        self._last_s = self._good_s = self._run_start_s = self._credit_s = 0.0

    @property
    def end_s(self) -> float:
        """When the last token came that was delivered."""
        return self.arrival_s + self._last_s

    @property
    def is_all_on_time(self) -> bool:
        """Whether the request ended with every token on time."""
        return self.num_on_time == self.spec.output_len

    def deliver(self, start_s: float, step_s: float, count: int) -> None:
        """Tokens come at start_s + step_s, start_s + 2 * step_s, ..., `count` of them."""
        first = self.num_delivered
        if not first:
            self.first_token_s = start_s + step_s
        self.num_delivered = first + count
        self.num_left -= count
        self.context_len += count
        since_s = start_s - self.arrival_s + step_s  # of the first of them
        self._last_s = since_s + step_s * (count - 1)
        if self.slo is None:
            self.num_on_time += count
            return
        budget_s = self.ttft_s + first * self.tpot_s
        slope_s = step_s - self.tpot_s
        late_s = since_s - budget_s
        # Token j of these is late by late_s + slope_s * j.
        if slope_s <= 0:
            if late_s <= 0:
                self.num_on_time += count
                if since_s - self._run_start_s - budget_s <= 0:  # as `_weigh` would: all of them are good
                    self._credit_s = budget_s + self.tpot_s * (count - 1)
                    return
            elif slope_s:
                self.num_on_time += count - min(count, math.ceil(late_s / -slope_s))
        elif late_s <= 0:
            self.num_on_time += min(count, math.floor(-late_s / slope_s) + 1)
        self._weigh(since_s, step_s, budget_s, count)

    def _weigh(self, since_s: float, step_s: float, budget_s: float, count: int) -> None:
        """The books of the time-weighted value, run of good tokens by run."""
        slope_s, done = step_s - self.tpot_s, 0
        while done < count:
            gap_s = since_s + step_s * done - self._run_start_s - budget_s - self.tpot_s * done
            if gap_s > 0:  # this token ends the run
                self._good_s += self._credit_s
                self._run_start_s, self._credit_s = since_s + step_s * done, 0.0
                done += 1
                continue
            good = count - done if slope_s <= 0 else min(count - done, math.floor(-gap_s / slope_s) + 1)
            done += good
            self._credit_s = budget_s + self.tpot_s * (done - 1)

    def time_weighted(self) -> float:
        """See `policy.slo.RequestTimeline.time_weighted`; 0 for a request that failed or has no token."""
        if self.failed or not self.num_delivered:
            return 0.0
        if self.slo is None or self._last_s <= 0:
            return 1.0
        budget_s = self.ttft_s + self.num_delivered * self.tpot_s
        return (self._good_s + min(budget_s, self._last_s - self._run_start_s)) / self._last_s
