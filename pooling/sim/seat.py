# SPDX-License-Identifier: Apache-2.0
"""A model's place on a simulated device: its queue, its running requests, where its weights and KV are."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence

from tokenpool.config import SLO
from tokenpool.policy.slo import lost_s
from tokenpool.policy.turns import ModelView, Residency
from tokenpool.sim.timeline import Timeline
from tokenpool.sim.workload import ModelCosts

_Head = tuple[str, int, int, int, int, int, float, float, float, float, float]
_new = tuple.__new__  # of a named tuple, in half the time
_Shown = tuple[_Head, tuple[float, float, int]]
"""Fields of a ModelView: up to `tpot_s`, and from `step_s` on."""


class Seat:
    """One model on one device; sums over its requests are kept, because they are read far more often than changed."""

    __slots__ = (
        "name", "index", "costs", "slo", "priority", "waiting", "running", "paused", "admitted", "residency",
        "ready_at_s", "kv_bytes", "kv_out_bytes", "waiting_tokens", "waiting_squares", "oldest_s", "context_tokens",
        "last_used_s", "is_built", "_shown", "_shown_until_s", "_where", "_view",
        "_lost_s",
    )  # fmt: skip

    def __init__(self, name: str, index: int, costs: ModelCosts, slo: SLO | None = None, priority: int = 0) -> None:
        self.name, self.index, self.costs, self.slo, self.priority = name, index, costs, slo, priority
        self.waiting: deque[Timeline] = deque()
        """Requests without KV, oldest first."""
        self.running: list[Timeline] = []
        """Requests that decode."""
        self.paused: list[Timeline] = []
        """Requests that came with their KV, which is still in host memory."""
        self.admitted: list[Timeline] = []
        """Requests whose prefill is in the step that runs."""
        self.residency = Residency.IN_HOST
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
        self.is_built = False
        """Whether its engine is there, and takes its memory."""
        self._shown: _Shown | None = None  # what `view` shows of the queues; None = count again
        self._shown_until_s = math.inf  # a request is lost then
        self._view = ModelView(name, index)  # the last one, and where its weights and KV were
        self._where = self._view.residency, self._view.kv_out, self._view.ready_in_s
        self._lost_s = lost_s(slo)

    @property
    def has_work(self) -> bool:
        """Whether any request is here."""
        return bool(self.running or self.waiting or self.paused or self.admitted)

    @property
    def num_requests(self) -> int:
        """Unfinished requests."""
        return len(self.running) + len(self.waiting) + len(self.paused) + len(self.admitted)

    @property
    def num_decoding(self) -> int:
        """Requests with KV, wherever it lies."""
        return len(self.running) + len(self.paused)

    def view(self, ready_in_s: float, now_s: float) -> ModelView:
        """The model as a turn policy sees it; see `policy.slo.lost_s` for what is due."""
        where = self.residency, self.kv_out_bytes > 0, ready_in_s
        if self._shown is None or now_s > self._shown_until_s:
            self._shown = self._show(now_s)
        elif self._where == where:  # most stay as they are while others run
            return self._view
        head, tail = self._shown
        self._where = where
        self._view = made = _new(ModelView, head + where + tail)
        return made

    def _show(self, now_s: float) -> _Shown:
        costs, slo = self.costs, self.slo
        decoding = self.running + self.paused if self.paused else self.running
        ttft_s, tpot_s = (slo.ttft_s, slo.tpot_s) if slo else (math.inf, math.inf)
        first_due_s, next_due_s = self._due_s(self.waiting, now_s), self._due_s(decoding, now_s)
        self._shown_until_s = min(first_due_s, next_due_s) + self._lost_s
        head: _Head = (
            self.name,
            self.index,
            self.priority,
            len(decoding),
            len(self.waiting),
            self.waiting_tokens,
            self.oldest_s,
            first_due_s,
            next_due_s,
            ttft_s,
            tpot_s,
        )
        step_s = costs.step(max(1, len(decoding)), self.context_tokens)
        prefill_s = costs.prefill(self.waiting_tokens, self.waiting_squares) if self.waiting else 0.0
        return head, (step_s, prefill_s, costs.weight_bytes)

    def _due_s(self, requests: Collection[Timeline], now_s: float) -> float:
        """When the next token of any of them is due that is not lost; inf if none is."""
        if self.slo is None or not requests:
            return math.inf
        tpot_s, least_s = self.slo.tpot_s, now_s - self.slo.ttft_s - self._lost_s
        dues = [r.arrival_s + r.num_delivered * tpot_s for r in requests]
        first_s = min(dues)
        if first_s < least_s:
            first_s = min([due_s for due_s in dues if due_s >= least_s], default=math.inf)
        return first_s + self.slo.ttft_s

    def count_waiting(self) -> None:
        """The queue changed."""
        self._shown = None
        lengths = [request.context_len for request in self.waiting]
        self.waiting_tokens = sum(lengths)
        self.waiting_squares = sum([n * n for n in lengths])
        self.oldest_s = self.waiting[0].arrival_s if self.waiting else math.inf

    def count_running(self, *, ended: Sequence[Timeline] = ()) -> None:
        """Steps were run, or requests joined; `ended` are among them."""
        self._shown = None
        if ended:
            self.running = [request for request in self.running if request.num_left]
        self.context_tokens = sum([request.context_len for request in self.running])

    def count_steps(self, steps: int) -> None:
        """All running requests got so many tokens, and none ended."""
        self._shown = None
        self.context_tokens += steps * len(self.running)

    def resume(self, request: Timeline) -> None:
        """A request comes whose KV is in host memory."""
        self.paused.append(request)
        self._shown = None
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

    def drop_kv(self) -> None:
        """The KV of all requests is dropped, wherever it is."""
        self.running += self.paused
        self.paused = []
        self.preempt_all()

    def preempt_all(self) -> None:
        """The KV of all running requests is dropped; the oldest is prefilled again first."""
        self.waiting.extendleft(reversed(self.running))
        self.running = []
        self.count_waiting()
        self.count_running()
