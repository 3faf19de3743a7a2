# SPDX-License-Identifier: Apache-2.0
"""The least time that devices need for a workload with every token on time: a bound for every scheduler."""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from tokenpool.config import SLO
from tokenpool.errors import check_setting
from tokenpool.sim.prefixes import unshared_tokens
from tokenpool.sim.workload import ModelCosts, SimRequest, Workload

_NUM_BINS = 256
"""Times at which the work due so far is looked at; fewer make the bound looser, never wrong."""


class Bound(NamedTuple):
    """What a workload needs at least."""

    gpu_s: float
    """Seconds of steps on all devices together; those of tensor parallel models count once per device."""
    num_steps: int
    """Steps of any kind: a model cannot do with fewer, however its requests are batched."""
    span_s: float
    """Seconds from the first arrival to the last due time."""
    peak_gpus: float
    """Largest ratio, over the times that were looked at, of the work that must be done between two of them to the time
    between them."""

    def utilisation(self, num_gpus: int) -> float:
        """Share of the time of `num_gpus` devices over the span that the work takes; above 1 it cannot be done."""
        return self.gpu_s / (num_gpus * self.span_s) if self.span_s else 0.0

    @property
    def num_gpus(self) -> int:
        """The least number of devices that could be enough."""
        return max(1, math.ceil(self.peak_gpus - 1e-9))


def bound(workload: Workload, costs: Mapping[str, ModelCosts], slo: SLO, *, windows_s: Sequence[float] = ()) -> Bound:
    """Return what `workload` needs if switching is free and memory endless; `costs` are by kind.

    Args:
        workload: every token of it on time.
        costs: with what hosts pay in each step, where that is to count.
        slo: of all models.
        windows_s: spans, in seconds, to look at as well as at the whole; see below.

    Why nothing can do with less, every token being on time. A step of a model gives a token to each of its requests
    at most, so a request needs j + 1 steps between its arrival and the due time of token j, the prefill being one of
    them. The fewest steps that do so are found by waiting: a model steps only when some token falls due that it
    has not made, and then all of its requests that are there get one. That is the greedy answer to covering
    intervals by points, and least at any time, not only at the end. Done once with and once without the first tokens,
    it gives the steps E and those D that decode at least, and

        seconds >= D * step_s + (E - D) * min(step_s, prefill_s) + what each token costs in any batch

    because costs are a constant per step and a share per token that does not depend on the batch. So it is
    exact for the steps that decode; a prefill pays its constant only where no decode step can carry it.

    Nothing can be done for a request before it comes. So what the requests need that come at or after a time s, and
    is due by t, must be done between s and t: if it is more than the devices can do in t - s, some token is late. This
    is looked at for s = the first arrival; with `windows_s` also for the requests that come in each such span, one
    begun every half of it. A part of the requests needs no more than all of them, so each of these is a bound by
    itself, and so is the largest. Blocks of prompts that came before s may be there already.

    Left out: copies of weights and KV, memory, limits on batches, that a step takes time before its token is there,
    which device a model runs on, and that the future is not known. It bounds policies with *every* token on time: a
    target below 100 % may need less. Costs must be those of `ModelCosts`: where step and prefill are other functions,
    this is none of their bound.

    O(steps), and twice that for each span; about a second for 160 models over two minutes.
    """
    requests = workload.requests
    if not requests:
        return Bound(0.0, 0, 0.0, 0.0)
    models = [
        _Asked(its, unshared_tokens([(r.model, r.blocks, r.input_len) for r in its]), costs[workload.kinds[model]])
        for model, its in by_model(requests).items()
    ]
    found = _bound_between(models, slo, requests[0].arrival_s, math.inf)
    assert found is not None, "there are requests"
    for window_s in windows_s:
        num_windows = max(1, math.ceil(2 * (requests[-1].arrival_s - requests[0].arrival_s) / window_s) - 1)
        for i in range(num_windows):
            from_s = requests[0].arrival_s + i * window_s / 2
            part = _bound_between(models, slo, from_s, from_s + window_s)
            if part is not None and part.peak_gpus > found.peak_gpus:
                found = found._replace(peak_gpus=part.peak_gpus)
    return found


class _Asked(NamedTuple):
    """Requests of one model, the tokens of each prompt that must be computed, and the model's costs."""

    requests: Sequence[SimRequest]
    num_tokens: Sequence[int]
    costs: ModelCosts

    def between(self, from_s: float, until_s: float) -> _Asked:
        arrivals = [request.arrival_s for request in self.requests]
        part = slice(bisect.bisect_left(arrivals, from_s), bisect.bisect_left(arrivals, until_s))
        return _Asked(self.requests[part], self.num_tokens[part], self.costs)


def _bound_between(models: Sequence[_Asked], slo: SLO, from_s: float, until_s: float) -> Bound | None:
    """What the requests need that come from and up to a time; None if none do."""
    parts = [part for model in models if (part := model.between(from_s, until_s)).requests]
    if not parts:
        return None
    start_s = min(part.requests[0].arrival_s for part in parts)
    last_s = max(r.arrival_s + (r.output_len - 1) * slo.tpot_s for part in parts for r in part.requests)
    span_s = last_s + slo.ttft_s - start_s
    bins = _Bins(start_s, span_s / _NUM_BINS)
    num_steps = sum([_add_model(bins, part, slo) for part in parts])
    due_s = list(accumulate(bins.work_s))
    peak = max(work_s / (bins.bin_s * i) for i, work_s in enumerate(due_s[1:], 1))
    return Bound(due_s[-1], num_steps, span_s, peak)


def max_models(
    make: Callable[[int], Workload],
    costs: Mapping[str, ModelCosts],
    slo: SLO,
    num_gpus: int,
    *,
    limit: int = 4096,
    windows_s: Sequence[float] = (),
) -> int:
    """Return the largest number of models, up to `limit`, whose work fits on `num_gpus` devices in time.

    `make` returns the workload of so many models; that of more must need more. It fits if at all times the work due
    by then is at most what the devices can do since the first arrival, and the same in all `windows_s`, see `bound`.
    0 = not even one model.
    """
    check_setting(num_gpus >= 1, "num_gpus", "must be at least 1")
    check_setting(limit >= 1, "limit", "must be at least 1")

    def fits(count: int) -> bool:
        workload = make(count)
        if bound(workload, costs, slo).peak_gpus > num_gpus:
            return False
        return not windows_s or bound(workload, costs, slo, windows_s=windows_s).peak_gpus <= num_gpus

    good, bad = 0, 1
    while bad <= limit and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, limit + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def least_steps(needs: Sequence[tuple[float, float, int]], tpot_s: float) -> Iterator[float]:
    """Yield the times of the fewest steps that serve `needs`, each as late as it may be.

    A need is (from_s, first_due_s, count), in order of from_s: `count` steps at or after from_s, the first by
    first_due_s and each next one tpot_s later. O(log needs) per need, O(1) per step.
    """
    # A need that joins after k steps has its next due time at first_due_s + (steps - k) * tpot_s: so the order of
    # the needs never changes.
    due: list[tuple[float, int]] = []
    num_steps = position = 0
    while True:
        while due and due[0][1] <= num_steps:
            heapq.heappop(due)
        now_s = due[0][0] + num_steps * tpot_s if due else math.inf
        if position < len(needs) and needs[position][0] <= now_s:
            _, first_due_s, count = needs[position]
            position += 1
            if count > 0:
                heapq.heappush(due, (first_due_s - num_steps * tpot_s, num_steps + count))
        elif due:
            num_steps += 1
            yield now_s
        else:
            return


def by_model(requests: Sequence[SimRequest]) -> dict[str, list[SimRequest]]:
    """Return the requests of each model, in their order."""
    found: dict[str, list[SimRequest]] = {}
    for request in requests:
        found.setdefault(request.model, []).append(request)
    return found


class _Bins:
    """Seconds of work by the time when they are due, rounded up to the end of a bin."""

    def __init__(self, start_s: float, bin_s: float) -> None:
        self.start_s, self.bin_s = start_s, bin_s
        self.work_s = [0.0] * (_NUM_BINS + 1)

    def index(self, due_s: float) -> int:
        return min(_NUM_BINS, max(1, math.ceil((due_s - self.start_s) / self.bin_s)))

    def add(self, due_s: float, work_s: float) -> None:
        self.work_s[self.index(due_s)] += work_s


def _add_model(bins: _Bins, asked: _Asked, slo: SLO) -> int:
    """Add the work of a model; returns its number of steps."""
    (requests, unshared, costs), ttft_s, tpot_s = asked, slo.ttft_s, slo.tpot_s
    extra_s = min(costs.step_s, costs.prefill_s)
    num_steps = 0
    for due_s in least_steps([(r.arrival_s, r.arrival_s + ttft_s, r.output_len) for r in requests], tpot_s):
        bins.add(due_s, extra_s * costs.num_gpus)
        num_steps += 1
    decodes = [(r.arrival_s, r.arrival_s + ttft_s + tpot_s, r.output_len - 1) for r in requests]
    for due_s in least_steps(decodes, tpot_s):
        bins.add(due_s, (costs.step_s - extra_s) * costs.num_gpus)
    for request, num_tokens in zip(requests, unshared, strict=True):
        _add_tokens(bins, request, num_tokens, costs, slo)
    return num_steps


def _add_tokens(bins: _Bins, request: SimRequest, num_tokens: int, costs: ModelCosts, slo: SLO) -> None:
    """What each token costs in any batch, bin by bin; `num_tokens` of the prompt must be computed."""
    first_due_s, count = request.arrival_s + slo.ttft_s, request.output_len - 1
    squares = request.input_len**2 - (request.input_len - num_tokens) ** 2
    work_s = costs.prefill(num_tokens, squares) - costs.prefill_s
    bins.add(first_due_s, work_s * costs.num_gpus)
    done = 0
    while done < count:
        i = bins.index(first_due_s + (done + 1) * slo.tpot_s)
        end_s = bins.start_s + i * bins.bin_s
        upto = min(count, max(done + 1, math.floor((end_s - first_due_s) / slo.tpot_s + 1e-9)))
        if i == _NUM_BINS:
            upto = count
        context = request.input_len * (upto - done) + (upto * (upto + 1) - done * (done + 1)) // 2
        work_s = costs.step_per_request_s * (upto - done) + costs.step_per_token_s * context
        bins.add(end_s, work_s * costs.num_gpus)
        done = upto
