# SPDX-License-Identifier: Apache-2.0
"""What hosts and frontends would report to a capacity controller, counted in a simulated cluster."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Mapping

from tokenpool.config import SLO
from tokenpool.policy.capacity import CapacityModel, StepCosts, windows
from tokenpool.policy.slo import RateWindow, num_due
from tokenpool.sim.timeline import Timeline
from tokenpool.sim.workload import ModelCosts

WINDOWS = windows()
_LONG_S, _SHORT_S = int(WINDOWS.long_s), int(WINDOWS.short_s)
_FIRST_GUESS_TOKENS = 256
"""Length of an answer, before the first has ended."""
_ROUNDING_S = 1e-6
"""So close to its due time a token may be on time or not."""
_FADE = 0.98
"""Weight of each ended request beside the next one."""


class Traffic:
    """What was asked of one model: windows of arrivals and prompt tokens, and the mean length of ended answers."""

    def __init__(self) -> None:
        self._arrivals, self._inputs = RateWindow(_LONG_S), RateWindow(_LONG_S)
        self._weight = self._tokens = 0.0

    def arrive(self, request: Timeline) -> None:
        """A request came in."""
        self._arrivals.add(request.arrival_s, 1)
        self._inputs.add(request.arrival_s, request.spec.input_len)

    def end(self, request: Timeline) -> None:
        """A request got all its tokens."""
        self._weight = _FADE * self._weight + 1
        self._tokens = _FADE * self._tokens + request.num_delivered

    def seen(
        self, model: str, costs: ModelCosts, now_s: float, *, slo: SLO, min_replicas: int, since_move_s: float
    ) -> CapacityModel:
        """The model as a controller sees it."""
        window_s = max(1, min(_LONG_S, int(now_s)))
        per_s = self._arrivals.per_s(now_s, window_s)
        length = (self._tokens + 5 * _FIRST_GUESS_TOKENS) / (self._weight + 5)
        return CapacityModel(
            model,
            costs.weight_bytes,
            ttft_s=slo.ttft_s,
            tpot_s=slo.tpot_s,
            arrivals_per_s=per_s,
            recent_arrivals_per_s=self._arrivals.per_s(now_s, min(window_s, _SHORT_S)),
            input_tokens_per_s=self._inputs.per_s(now_s, window_s),
            output_tokens_per_s=per_s * length,
            costs=step_costs(costs),
            min_replicas=min_replicas,
            since_move_s=since_move_s,
        )


class Punctuality:
    """Tokens of one device by model and tick: how many came or fell due, and how many of them on time."""

    def __init__(self) -> None:
        self._ticks: deque[tuple[float, float, Mapping[str, tuple[int, int]]]] = deque()
        self._counts: dict[str, list[int]] = {}
        self._seen: dict[Timeline, tuple[int, int]] = {}
        self._late: dict[str, int] = {}

    def end(self, request: Timeline) -> None:
        """A request ended here, or left."""
        self._count(request)
        self._seen.pop(request, None)

    def tick(self, now_s: float, busy_s: float, requests: Iterable[Timeline]) -> None:
        """Look at the requests that are here; `busy_s` is the device's total."""
        late: dict[str, int] = {}
        for request in requests:
            self._count(request)
            due = num_due(request.slo, request.arrival_s, now_s)
            missing = min(due, request.spec.output_len) - request.num_delivered
            if missing > 0:
                model = request.spec.model
                late[model] = late.get(model, 0) + missing
        self._late = late
        counts = {model: (delivered, on_time) for model, (delivered, on_time) in self._counts.items()}
        self._counts = {}
        self._ticks.append((now_s, busy_s, counts))
        while len(self._ticks) > 1 and self._ticks[1][0] <= now_s - WINDOWS.seat_s:
            self._ticks.popleft()

    def busy_frac(self) -> float:
        """Share of the window in which the device stepped."""
        (first_s, first, _), (last_s, last, _) = self._ticks[0], self._ticks[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0

    def of(self, model: str) -> tuple[float, float]:
        """Tokens per second of a model that came or are overdue now, and the share of them on time."""
        ticks = list(self._ticks)[1:] if len(self._ticks) > 1 else self._ticks
        delivered = sum([counts[model][0] for _, _, counts in ticks if model in counts])
        on_time = sum([counts[model][1] for _, _, counts in ticks if model in counts])
        due = delivered + self._late.get(model, 0)
        span_s = max(1.0, self._ticks[-1][0] - self._ticks[0][0]) if self._ticks else 1.0
        return due / span_s, on_time / due if due else 1.0

    def _count(self, request: Timeline) -> None:
        before = self._seen.get(request, (0, 0))
        now = self._seen[request] = request.num_delivered, request.num_on_time
        if now != before:
            sums = self._counts.setdefault(request.spec.model, [0, 0])
            sums[0] += now[0] - before[0]
            sums[1] += now[1] - before[1]


def num_late(request: Timeline, until_s: float) -> int:
    """Tokens of a request on its way which are late for certain; what it gets from `until_s` on is not known."""
    due = min(num_due(request.slo, request.arrival_s, until_s - _ROUNDING_S), request.spec.output_len)
    return request.num_delivered - request.num_on_time + max(0, due - request.num_delivered)


@functools.cache
def step_costs(costs: ModelCosts) -> StepCosts:
    """The coefficients that a host would have learnt; the square term of prefills is taken at 1,000 tokens."""
    per_token_s = costs.prefill_per_token_s + 1000 * costs.prefill_per_token2_s
    return StepCosts(costs.step_s, costs.step_per_request_s, costs.step_per_token_s, costs.prefill_s, per_token_s)
