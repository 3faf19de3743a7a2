# SPDX-License-Identifier: Apache-2.0
"""A model's place on a simulated device: its queue, its running requests, where its weights and KV are."""

from __future__ import annotations

import math
from collections import deque

from tokenpool.config import SLO
from tokenpool.policy.turns import Residency
from tokenpool.sim.timeline import Timeline
from tokenpool.sim.workload import ModelCosts


class Seat:
    """One model on one device; sums over its requests are kept, because they are read far more often than changed."""

    __slots__ = (
        "name", "index", "costs", "waiting", "running", "paused", "admitted", "residency", "ready_at_s", "kv_bytes", "kv_out_bytes",
        "waiting_tokens", "waiting_squares", "oldest_s", "context_tokens", "last_used_s",
    )  # fmt: skip

    def __init__(self, name: str, index: int, costs: ModelCosts) -> None:
        self.name, self.index, self.costs = name, index, costs
        self.waiting: deque[Timeline] = deque()
        """Requests without KV, oldest first."""
        self.running: list[Timeline] = []
        """Requests that decode."""
        self.paused: list[Timeline] = []
        """Requests that came with their KV, which is still in host memory."""
        self.admitted: list[Timeline] = []
        """Requests whose prefill is in the step that runs."""
        self.residency = Residency.WARM
        self.ready_at_s = 0.0
        """While loading: when the weights, and the KV that comes with them, are in."""
        self.kv_bytes = 0.0
        """On the device."""
        self.kv_out_bytes = 0.0
        """In host memory, of running requests."""
        self.waiting_tokens = self.waiting_squares = 0
        self.oldest_s = math.inf
        """Arrival of the oldest waiting request."""
        self.context_tokens = 0
        """Tokens of context that a decode step reads."""
        self.last_used_s = -math.inf

    @property
    def has_work(self) -> bool:
        """Whether any request is here."""
        return bool(self.running or self.waiting or self.paused or self.admitted)

    @property
    def num_decoding(self) -> int:
        """Requests with KV, wherever it lies."""
        return len(self.running) + len(self.paused)

    def next_due_s(self, slo: SLO) -> float:
        """Earliest due time of a next token of the running requests; inf without one."""
        requests, tpot_s = self.running + self.paused, slo.tpot_s
        if not requests:
            return math.inf
        return slo.ttft_s + min([request.arrival_s + request.num_delivered * tpot_s for request in requests])

    def count_waiting(self) -> None:
        """The queue changed."""
        lengths = [request.context_len for request in self.waiting]
        self.waiting_tokens = sum(lengths)
        self.waiting_squares = sum([n * n for n in lengths])
        self.oldest_s = self.waiting[0].arrival_s if self.waiting else math.inf

    def count_running(self, *, keep: list[Timeline] = ()) -> None:
        """Steps were run, or requests joined; those in `keep` have ended."""
        if keep:
            self.running = [request for request in self.running if request.num_left]
        self.context_tokens = sum([request.context_len for request in self.running])

    def resume(self, request: Timeline) -> None:
        """A request comes whose KV is in host memory."""
        self.paused.append(request)
        self.kv_out_bytes += request.context_len * self.costs.kv_bytes_per_token

    def join(self) -> None:
        """The KV of all requests is on the device, or on its way."""
        self.kv_bytes += self.kv_out_bytes
        self.kv_out_bytes = 0.0
        if self.paused:
            self.running += self.paused
            self.paused = []
            self.count_running()

    def preempt(self, request: Timeline) -> None:
        """Its KV is dropped; it is prefilled again, with the tokens it has, when there is room."""
        self.running.remove(request)
        self.waiting.appendleft(request)
        self.count_waiting()
        self.count_running()
