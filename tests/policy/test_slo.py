# SPDX-License-Identifier: Apache-2.0
"""Tokens on time, by hand and against the definitions written out."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpool.config import SLO
from tokenpool.policy.slo import (
    Attainments,
    RateWindow,
    RequestRecord,
    RequestTimeline,
    SloAccount,
    SloBook,
    attainments,
    due_s,
    num_due,
)

pytestmark = pytest.mark.cpu

TEN = SLO(ttft_s=10.0, tpot_s=0.1)


def timeline_of(slo: SLO | None, *times_s: float) -> RequestTimeline:
    timeline = RequestTimeline(slo, 0.0)
    for time_s in times_s:
        timeline.deliver(time_s)
    return timeline


def test_due_times():
    """Token i is due at arrival + ttft + i * tpot; without an SLO never."""
    assert 115.0 == due_s(SLO(10.0, 0.5), 100.0, 10)
    assert math.inf == due_s(None, 100.0, 10)
    assert [0, 1, 1, 2, 3] == [num_due(SLO(2.0, 0.5), 10.0, now_s) for now_s in (11.9, 12.0, 12.4, 12.5, 13.0)]
    assert 0 == num_due(None, 10.0, 99.0)


def test_a_token_at_its_due_time_is_on_time():
    """The bound is inclusive; several tokens of one step are judged one by one."""
    timeline = RequestTimeline(SLO(2.0, 1.0), 100.0)
    assert 1 == timeline.deliver(102.0)
    assert 2 == timeline.deliver(104.5, num_tokens=4)  # due 103, 104, 105, 106
    assert (5, 3, 107.0) == (timeline.num_delivered, timeline.num_on_time, timeline.next_due_s)


@pytest.mark.parametrize(
    ("slo", "times_s", "value"),
    [
        (SLO(3, 2), (3, 6, 7, 8), 5 / 8),  # the second token ends the first run, worth 3; the last run counts 2
        (TEN, (5, 5.1, 5.2), 1.0),
        (TEN, (11, 20), 9 / 20),  # both late, yet the wait for the second is forgiven: its run starts at 11
        (TEN, (12,), 0.0),
        (TEN, (), 0.0),
        (TEN, (0,), 1.0),
        (None, (500,), 1.0),
    ],
)
def test_time_weighted_value(slo, times_s, value):
    """The artifact's measure, worked out by hand."""
    assert pytest.approx(value) == timeline_of(slo, *times_s).time_weighted()


def test_failures_miss_what_was_due_and_at_least_one_token():
    """A request that fails early misses its first token, one that fails late all tokens due by then."""
    slo = SLO(1.0, 1.0)
    early = RequestRecord(0.0, slo, (), failed_at_s=0.5)
    late = RequestRecord(0.0, slo, (1.0, 2.0), failed_at_s=4.5)  # tokens 0 to 3 were due
    good = RequestRecord(0.0, slo, (0.5, 1.5, 2.5))
    assert Attainments(0.0, 0.0, 0.0, 1) == attainments([early])
    assert Attainments(2 / 4, 0.0, 0.0, 1) == attainments([late])
    assert Attainments(5 / 8, 1 / 3, 1 / 3, 3) == attainments([early, late, good])
    assert Attainments(1.0, 1.0, 1.0, 0) == attainments([])


def test_a_client_that_goes_away_early_is_no_miss():
    """An abort misses only what was due by then."""
    account = SloAccount()
    account.abort(account.start(TEN, 0.0), 5.0)
    assert Attainments(1.0, 1.0, 1.0, 1) == account.attainments()
    account.abort(account.start(TEN, 0.0), 10.25)  # three tokens were due
    assert (3, 0.5) == (account.tokens_due, account.attainments().request)


def test_the_book_keeps_classes_apart():
    """Accounts are by class; requests that ended or never were count nowhere."""
    book = SloBook()
    book.start("r1", "chat", TEN, 0.0)
    book.start("r2", "batch", None, 0.0)
    assert (10.0, math.inf, math.inf) == tuple(map(book.next_due_s, ("r1", "r2", "r3")))
    assert (2, 1, 0) == (book.deliver("r1", 2, 1.0), book.deliver("r2", 1, 99.0), book.deliver("r3", 7, 99.0))
    book.finish("r1")
    book.fail("r2", 100.0)
    book.finish("r2")
    book.abort("r3", 100.0)
    chat, batch = book.accounts["chat"], book.accounts["batch"]
    assert (1, 1, 0, 2, 2) == (chat.started, chat.finished, chat.failed, chat.tokens, chat.tokens_on_time)
    assert (1, 0, 1, 1) == (batch.started, batch.finished, batch.failed, batch.tokens)
    assert math.inf == book.next_due_s("r1")


def test_a_request_that_began_elsewhere_keeps_its_due_times():
    """Token i is due when it always was; only the tokens that are delivered here are counted here."""
    book = SloBook()
    book.start("r", "chat", TEN, 0.0, 20)
    assert pytest.approx(12.0) == book.next_due_s("r")
    assert [1, 0] == [book.deliver("r", 1, 11.9), book.deliver("r", 1, 13.0)]
    book.finish("r")
    account = book.account("chat")
    assert (2, 2, 1) == (account.tokens, account.tokens_due, account.tokens_on_time)

    timeline = RequestTimeline(TEN, 0.0)
    timeline.go_on_after(20)
    for time_s in (12.0, 13.0, 16.0):
        timeline.deliver(time_s)
    assert 2.0 == timeline.tpot_s


def test_rates_are_over_whole_seconds():
    """The second that still runs is left out; what is older than the window too."""
    window = RateWindow(longest_s=60)
    for second in range(100, 120):
        window.add(second + 0.5, 4)
    assert 4.0 == window.per_s(120.0, 10)
    assert 80 / 60 == window.per_s(120.9, 60)
    assert 2.0 == window.per_s(125.0, 10)
    assert 0.0 == window.per_s(1000.0, 60)


@settings(deadline=None)
@given(
    events=st.lists(st.tuples(st.floats(0, 3), st.integers(1, 9)), max_size=60),
    window_s=st.integers(1, 60),
    later_s=st.floats(0, 90),
)
def test_windows_count_what_a_list_would(events, window_s, later_s):
    """The ring agrees with the full list of events."""
    window, now_s, seen = RateWindow(), 0.0, []
    for gap_s, count in events:
        now_s += gap_s
        window.add(now_s, count)
        seen.append((math.floor(now_s), count))
    end = math.floor(now_s + later_s)
    expected = sum(count for second, count in seen if end - window_s <= second < end)
    assert pytest.approx(expected / window_s) == window.per_s(now_s + later_s, window_s)


@settings(deadline=None)
@given(gaps=st.lists(st.floats(0, 5), min_size=1, max_size=40), ttft=st.floats(0.1, 9), tpot=st.floats(0.01, 2))
def test_counts_follow_the_definition(gaps, ttft, tpot):
    """Online counts equal the definition applied to the list, and all shares lie between 0 and 1."""
    times, now = [], 0.0
    for gap in gaps:
        now += gap
        times.append(now)
    slo = SLO(ttft, tpot)
    timeline = timeline_of(slo, *times)
    assert sum(t <= ttft + i * tpot for i, t in enumerate(times)) == timeline.num_on_time
    shares = attainments([RequestRecord(0.0, slo, times)])
    assert timeline.num_on_time / len(times) == shares.token
    assert all(0 <= share <= 1 + 1e-9 for share in shares[:3])
    if shares.request == 1:
        assert pytest.approx(1.0) == shares.time_weighted
