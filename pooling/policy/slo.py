# SPDX-License-Identifier: Apache-2.0
"""Tokens on time: token i of a request is due at arrival + ttft + i * tpot.

Used online, one `SloBook` per host, and on recorded token times, with `attainments`. All times are seconds of one
clock. Imports neither vllm nor ray.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tokenpool.config import SLO
from tokenpool.policy.latency import RecentLatencies

_INF = math.inf


def due_s(slo: SLO | None, arrival_s: float, index: int) -> float:
    """When token `index` of a request, from 0, is due; inf without an SLO."""
    return arrival_s + slo.ttft_s + index * slo.tpot_s if slo else _INF


def num_due(slo: SLO | None, arrival_s: float, now_s: float) -> int:
    """How many tokens of a request are due by `now_s`, if it is long enough; 0 without an SLO."""
    if slo is None or now_s < arrival_s + slo.ttft_s:
        return 0
    return math.floor((now_s - arrival_s - slo.ttft_s) / slo.tpot_s) + 1


def lost_s(slo: SLO | None) -> float:
    """Seconds by which a request may be late and still claims to be served in time; inf without an SLO.

    It is served on, beside the others of its model. But those that can still be on time do not wait until it has
    caught up: in an overload all would be late then.
    """
    return 2 * slo.ttft_s if slo else _INF


class RequestTimeline:
    """One request's tokens, folded into a few numbers as they come."""

    __slots__ = (
        "arrival_s", "num_delivered", "num_on_time", "slo",
        "_good_s", "_run_start_s", "_credit_s", "_first", "_first_s", "_last_s",
    )  # fmt: skip

    def __init__(self, slo: SLO | None, arrival_s: float) -> None:
        self.slo = slo
        """When tokens are due; None = never."""
        self.arrival_s = arrival_s
        """When the request came."""
        self.num_delivered = 0
        """Tokens so far."""
        self.num_on_time = 0
        """Those by their due time; all of them without an SLO."""
        self._good_s = 0.0
        self._run_start_s = 0.0
        self._credit_s = 0.0
        self._first = 0  # the first token that was seen here
        self._first_s = 0.0
        self._last_s = 0.0

    def go_on_after(self, num_tokens: int) -> None:
        """Begin with token `num_tokens`; what was before it is not judged here."""
        self.num_delivered = self.num_on_time = self._first = num_tokens

    @property
    def next_due_s(self) -> float:
        """When the next token is due; inf without an SLO."""
        return due_s(self.slo, self.arrival_s, self.num_delivered)

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds from token to token so far; None with fewer than two tokens."""
        gaps = self.num_delivered - self._first - 1
        return (self._last_s - self._first_s) / gaps if gaps > 0 else None

    def deliver(self, now_s: float, num_tokens: int = 1) -> int:
        """Take in tokens delivered now; returns how many of them are on time."""
        slo, first = self.slo, self.num_delivered
        self.num_delivered += num_tokens
        since_s = now_s - self.arrival_s
        self._last_s = since_s
        if first == self._first:
            self._first_s = since_s
        if slo is None:
            self.num_on_time += num_tokens
            return num_tokens
        on_time = 0
        for i in range(first, first + num_tokens):
            budget_s = slo.ttft_s + i * slo.tpot_s
            on_time += since_s <= budget_s
            if since_s - self._run_start_s <= budget_s:
                self._credit_s = budget_s
            else:  # the run of good tokens ends; what it was worth is kept, and the next starts here
                self._good_s += self._credit_s
                self._run_start_s, self._credit_s = since_s, 0.0
        self.num_on_time += on_time
        return on_time

    def time_weighted(self) -> float:
        """Share of the time up to the last token that met its deadlines, after Aegaeon's artifact; 0 without tokens.

        The budget ttft + i * tpot runs from the start of a run of good tokens. A token past it ends the run, whose
        last budget counts as good time, and starts the next run with the whole budget grown so far: this measure
        forgives what a fixed due time does not. The last run counts up to its last token.

        Source: Aegaeon (SOSP'25), the evaluation code of its artifact.
        """
        if not self.num_delivered:
            return 0.0
        if self.slo is None or self._last_s <= 0:
            return 1.0
        budget_s = self.slo.ttft_s + self.num_delivered * self.slo.tpot_s
        return (self._good_s + min(budget_s, self._last_s - self._run_start_s)) / self._last_s


class RateWindow:
    """Events per second over the last seconds, in a ring of buckets: O(1) to add, O(buckets) to read."""

    def __init__(self, longest_s: int = 60) -> None:
        self._counts = [0] * (longest_s + 1)  # one bucket per second, one more for the second that runs
        self._newest = 0

    def add(self, now_s: float, count: int) -> None:
        """Count events that happen now; time must not go back."""
        self._advance(now_s)
        self._counts[self._newest % len(self._counts)] += count

    def per_s(self, now_s: float, window_s: int) -> float:
        """Mean rate over the last `window_s` whole seconds; the running second is left out."""
        self._advance(now_s)
        counts, size = self._counts, len(self._counts)
        window_s = min(window_s, size - 1)
        end = self._newest % size
        begin = end - window_s
        if begin >= 0:
            return sum(counts[begin:end]) / window_s
        return (sum(counts[begin:]) + sum(counts[:end])) / window_s

    def _advance(self, now_s: float) -> None:
        second, size = math.floor(now_s), len(self._counts)
        if second - self._newest >= size:
            self._counts = [0] * size
            self._newest = second
        while self._newest < second:
            self._newest += 1
            self._counts[self._newest % size] = 0


class Attainments(NamedTuple):
    """Three shares, 0 to 1, of the same requests; 1 where there was nothing to miss."""

    token: float
    """Tokens by their due time, of all tokens; missing ones of failed requests count as missed."""
    request: float
    """Requests with every token on time."""
    time_weighted: float
    """Mean of `RequestTimeline.time_weighted`; failed requests count as 0."""
    num_requests: int = 0
    """How many ended requests this is about."""


class SloAccount:
    """The sums of one request class. Requests that still run are in `started` only, and with their tokens."""

    def __init__(self) -> None:
        self.started = 0
        """Requests that came in."""
        self.finished = 0
        """Requests that ended well."""
        self.failed = 0
        """Requests that ended with an error."""
        self.aborted = 0
        """Requests that their client gave up."""
        self.on_time = 0
        """Ended requests with every token on time."""
        self.tokens = 0
        """Tokens delivered."""
        self.tokens_on_time = 0
        """Tokens delivered by their due time; all of a request without an SLO."""
        self.tokens_due = 0
        """Tokens delivered, and those that failed requests should have had by then."""
        self.time_weighted_sum = 0.0
        """Sum of the time-weighted values of ended requests."""
        self._goodput = RateWindow()
        self.ttft = RecentLatencies()
        """Seconds from the arrival of requests to their first token."""
        self.tpot = RecentLatencies()
        """Mean seconds from token to token of requests that ended well."""

    def goodput_tokens_per_s(self, now_s: float, window_s: int = 10) -> float:
        """Tokens on time per second over the last `window_s` seconds, 60 at most."""
        return self._goodput.per_s(now_s, window_s)

    def attainments(self) -> Attainments:
        """Shares so far. Tokens of running requests count, running requests do not."""
        ended = self.finished + self.failed + self.aborted
        token = self.tokens_on_time / self.tokens_due if self.tokens_due else 1.0
        if not ended:
            return Attainments(token, 1.0, 1.0, 0)
        return Attainments(token, self.on_time / ended, self.time_weighted_sum / ended, ended)

    def start(self, slo: SLO | None, arrival_s: float) -> RequestTimeline:
        """A request comes in."""
        self.started += 1
        return RequestTimeline(slo, arrival_s)

    def deliver(self, timeline: RequestTimeline, num_tokens: int, now_s: float) -> int:
        """Tokens go out now; returns how many of them are on time."""
        if not timeline.num_delivered:
            self.ttft.add(now_s, now_s - timeline.arrival_s)
        on_time = timeline.deliver(now_s, num_tokens)
        self.tokens += num_tokens
        self.tokens_due += num_tokens
        self.tokens_on_time += on_time
        self._goodput.add(now_s, on_time)
        return on_time

    def finish(self, timeline: RequestTimeline) -> None:
        """The request ended well."""
        self.finished += 1
        if (tpot_s := timeline.tpot_s) is not None:
            self.tpot.add(timeline.arrival_s + timeline._last_s, tpot_s)
        self.on_time += timeline.num_on_time == timeline.num_delivered
        self.time_weighted_sum += timeline.time_weighted()

    def fail(self, timeline: RequestTimeline, now_s: float) -> None:
        """The request ended with an error: what was due by now, and at least one token, is missed."""
        self.failed += 1
        due = num_due(timeline.slo, timeline.arrival_s, now_s)
        missing = max(due, 1) - timeline.num_delivered
        self.tokens_due += max(0, missing)

    def abort(self, timeline: RequestTimeline, now_s: float) -> None:
        """The client went away: only what was due by now is missed."""
        self.aborted += 1
        missing = max(0, num_due(timeline.slo, timeline.arrival_s, now_s) - timeline.num_delivered)
        self.tokens_due += missing
        self.on_time += not missing and timeline.num_on_time == timeline.num_delivered
        self.time_weighted_sum += timeline.time_weighted() if timeline.num_delivered else not missing


class SloBook:
    """All requests of a host by id, and the accounts of their classes. O(1) memory per running request."""

    def __init__(self) -> None:
        self.accounts: dict[str, SloAccount] = {}
        """By class name; see `account`."""
        self._requests: dict[str, tuple[SloAccount, RequestTimeline]] = {}

    def start(self, request_id: str, name: str, slo: SLO | None, arrival_s: float, num_delivered: int = 0) -> None:
        """A request of class `name` comes in; the class is the model's name unless there are finer ones.

        `num_delivered` tokens came from elsewhere: they count there, and token i stays due when it was.
        """
        account = self.account(name)
        timeline = account.start(slo, arrival_s)
        timeline.go_on_after(num_delivered)
        self._requests[request_id] = account, timeline

    def account(self, name: str) -> SloAccount:
        """The account of a class, empty if it had no request yet."""
        return self.accounts.setdefault(name, SloAccount())

    def deliver(self, request_id: str, num_tokens: int, now_s: float) -> int:
        """Tokens go out now; returns how many of them are on time. An unknown request counts nowhere."""
        entry = self._requests.get(request_id)
        return entry[0].deliver(entry[1], num_tokens, now_s) if entry else 0

    def next_due_s(self, request_id: str) -> float:
        """When the request's next token is due; inf without an SLO or for an unknown request."""
        entry = self._requests.get(request_id)
        return entry[1].next_due_s if entry else _INF

    def finish(self, request_id: str) -> None:
        """The request ended well; an unknown one is ignored, here and below."""
        if entry := self._requests.pop(request_id, None):
            entry[0].finish(entry[1])

    def fail(self, request_id: str, now_s: float) -> None:
        """The request ended with an error."""
        if entry := self._requests.pop(request_id, None):
            entry[0].fail(entry[1], now_s)

    def abort(self, request_id: str, now_s: float) -> None:
        """The client gave the request up."""
        if entry := self._requests.pop(request_id, None):
            entry[0].abort(entry[1], now_s)


class RequestRecord(NamedTuple):
    """A request as it was recorded."""

    arrival_s: float
    slo: SLO | None
    token_times_s: Sequence[float]
    """When each token was delivered, in order."""
    failed_at_s: float | None = None
    """When it failed, or when the record ends without its end; None = it finished."""


def attainments(requests: Iterable[RequestRecord]) -> Attainments:
    """The three shares of recorded requests, by the same rules as online."""
    account = SloAccount()
    for record in requests:
        timeline = account.start(record.slo, record.arrival_s)
        # Past the account's window of goodput: records are in order of requests, not of time.
        on_time = sum([timeline.deliver(time_s) for time_s in record.token_times_s])
        account.tokens += len(record.token_times_s)
        account.tokens_due += len(record.token_times_s)
        account.tokens_on_time += on_time
        if record.failed_at_s is None:
            account.finish(timeline)
        else:
            account.fail(timeline, record.failed_at_s)
    return account.attainments()
