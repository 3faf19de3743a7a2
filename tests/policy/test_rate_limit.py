# SPDX-License-Identifier: Apache-2.0
"""A bucket lets through its rate and one minute's burst, and tells exactly when the next one passes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpool.policy.rate_limit import TokenBucket

pytestmark = pytest.mark.cpu

rates = st.floats(0.5, 1e6)
steps = st.lists(st.tuples(st.floats(0, 100), st.floats(0, 1e4)), max_size=50)


def test_a_minutes_worth_passes_at_once_and_then_the_rate():
    """60 per minute: 60 at time 0, then one per second."""
    bucket = TokenBucket(60, now_s=0.0)
    for _ in range(60):
        assert 0.0 == bucket.ready_in_s(0.0)
        bucket.take(0.0, 1)

    assert 1.0 == bucket.ready_in_s(0.0)
    assert pytest.approx(0.25) == bucket.ready_in_s(0.75)
    assert 0.0 == bucket.ready_in_s(1.0)


def test_an_overdraft_is_waited_off():
    """What was used beyond the level delays the next use by exactly that much."""
    bucket = TokenBucket(600, now_s=0.0)
    bucket.take(0.0, 1000)

    assert pytest.approx((400 + 1) / 10) == bucket.ready_in_s(0.0)


@given(rates, steps)
def test_no_more_than_rate_and_burst_pass(rate, uses):
    """Used only when ready, the bucket gives at most a burst plus the rate times the time."""
    bucket, now_s, used = TokenBucket(rate, now_s=0.0), 0.0, 0.0
    for wait_s, wanted in uses:
        now_s += wait_s
        amount = min(wanted, bucket.capacity)
        if bucket.ready_in_s(now_s, amount) == 0:
            bucket.take(now_s, amount)
            used += amount
    assert used <= bucket.capacity + rate / 60 * now_s + 1e-6 * max(1.0, used)


@given(rates, steps, st.floats(0, 2e6))
def test_it_is_ready_when_it_said(rate, uses, amount):
    """After the told wait, and not a little before, the amount can be taken."""
    bucket, now_s = TokenBucket(rate, now_s=0.0), 0.0
    for wait_s, used in uses:
        now_s += wait_s
        bucket.take(now_s, used)
    wait_s = bucket.ready_in_s(now_s, amount)
    if wait_s > 1e-3:
        assert bucket.ready_in_s(now_s + wait_s * 0.99, amount) > 0
    assert bucket.ready_in_s(now_s + wait_s * 1.0001 + 1e-6, amount) == pytest.approx(0.0, abs=1e-6)


@settings(max_examples=50)
@given(st.floats(100, 1e5), st.lists(st.floats(0.05, 1), min_size=1, max_size=6))
def test_shares_make_up_one_limit(rate, parts):
    """Buckets whose shares add up to 1 let through together what one bucket does."""
    total = sum(parts)
    buckets = [TokenBucket(rate, now_s=0.0, share=part / total) for part in parts]

    assert pytest.approx(rate, rel=1e-6, abs=len(parts)) == sum(bucket.level(0.0) for bucket in buckets)
    for bucket in buckets:
        bucket.take(0.0, bucket.level(0.0))
    assert pytest.approx(rate / 2, rel=1e-6) == sum(bucket.level(30.0) for bucket in buckets)


def test_a_new_share_makes_no_level_out_of_nothing():
    """What is given up takes its part along, what is new is as full as is said, and a debt stays."""
    bucket = TokenBucket(1000, now_s=0.0)
    bucket.take(0.0, 500)
    bucket.set_share(0.0, 0.5)
    assert (bucket.level(0.0), bucket.fill) == (pytest.approx(250), pytest.approx(0.5))
    bucket.set_share(0.0, 1.0, 0.5)
    assert bucket.level(0.0) == pytest.approx(500)
    bucket.take(0.0, 1500)
    for share in (0.5, 1.0):
        bucket.set_share(0.0, share)
        assert (bucket.level(0.0), bucket.fill) == (pytest.approx(-1000), 0.0)


@pytest.mark.parametrize("share", [0, -1, 1.01, float("nan")])
def test_a_share_is_a_part(share):
    """Nothing, less and more than the whole are refused."""
    with pytest.raises(ValueError, match="share"):
        TokenBucket(1, now_s=0.0, share=share)
