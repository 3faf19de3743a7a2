# SPDX-License-Identifier: Apache-2.0
"""What leaves the device: enough, nothing superfluous, the cheapest first, and the same for the same values."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpool.policy.eviction import Candidate, EvictionKind, ReuseEstimator, choose_evictions

pytestmark = pytest.mark.cpu

CANDIDATES = st.lists(
    st.builds(
        Candidate,
        kind=st.sampled_from(EvictionKind),
        owner=st.sampled_from("abcd"),
        pages=st.integers(0, 20),
        cost_s=st.sampled_from([0.0, 0.1, 0.5, 2.0]),
        p_reuse=st.sampled_from([0.0, 0.3, 1.0]),
        needed_in_s=st.sampled_from([1.0, 5.0, math.inf]),
    ),
    max_size=8,
)


def weights(owner: str, pages: int, **fields: float) -> Candidate:
    return Candidate(EvictionKind.WEIGHTS, owner, pages, **fields)


def owners(chosen: list[Candidate] | None) -> list[str] | None:
    return None if chosen is None else [candidate.owner for candidate in chosen]


def test_the_cheapest_per_page_leaves_first():
    """Expected cost is seconds times probability; what counts is cost per page."""
    big = weights("big", 100, cost_s=1.0, p_reuse=0.5)  # 5 ms a page
    rare = weights("rare", 10, cost_s=1.0, p_reuse=0.01)  # 1 ms a page
    hot = weights("hot", 10, cost_s=1.0, p_reuse=0.9)
    assert ["rare"] == owners(choose_evictions([hot, big, rare], 10))
    assert ["big"] == owners(choose_evictions([hot, big, rare], 50))  # rare was taken first and is superfluous
    assert ["rare", "big"] == owners(choose_evictions([hot, big, rare], 105))
    assert choose_evictions([hot, big, rare], 121) is None
    assert [] == choose_evictions([hot], 0)


def test_between_equals_the_one_needed_later_leaves():
    """Busy models are all certain to come back: the policy's due times decide."""
    soon, later = weights("a", 4, cost_s=1.0, needed_in_s=0.5), weights("b", 4, cost_s=1.0, needed_in_s=9.0)
    assert ["b"] == owners(choose_evictions([soon, later], 4))
    cached = Candidate(EvictionKind.CACHED_KV, "a", 4)
    assert [EvictionKind.CACHED_KV] == [c.kind for c in choose_evictions([weights("a", 4), cached], 4)]


@settings(deadline=None)
@given(CANDIDATES, st.integers(0, 80))
def test_enough_and_nothing_superfluous(candidates, need_pages):
    """The answer reaches the need, and none of it could stay; None only if all together fall short."""
    chosen = choose_evictions(candidates, need_pages)
    if chosen is None:
        assert sum(c.pages for c in candidates) < need_pages
        return
    freed = sum(c.pages for c in chosen)
    assert freed >= need_pages
    assert all(freed - c.pages < need_pages for c in chosen)
    assert choose_evictions(candidates[::-1], need_pages) == chosen


def test_work_comes_before_what_may_come():
    """A model with work is needed for sure, the one that can be spared less; without work it is a matter of chance."""
    reuse = ReuseEstimator()
    reuse.observe_arrival("seldom", 0.0)
    for time_s in range(100):
        reuse.observe_arrival("often", float(time_s))

    need = [reuse.need(name, 100.0, has_work=False) for name in ("never", "seldom", "often")]
    assert sorted(set(need)) == need and need[1] < 0.1 < need[2] < 1
    assert 1.0 == reuse.need("never", 100.0, has_work=True)
    assert need[1] < reuse.need("often", 100.0, has_work=True, is_spare=True) < 1.0
    assert need[0] == reuse.need("never", 100.0, has_work=False, is_spare=True)


def test_reuse_probability_rises_with_arrivals_and_fades():
    """A model asked every 10 s is near its true rate after a while; silence makes it unlikely again."""
    reuse = ReuseEstimator(memory_s=100.0)
    assert 0.001 == reuse.probability("m", 0.0, 60.0)
    for second in range(0, 1000, 10):
        reuse.observe_arrival("m", float(second))
    assert pytest.approx(0.1, rel=0.06) == reuse.rate_per_s("m", 990.0)
    assert pytest.approx(1 - math.exp(-6.0), rel=0.02) == reuse.probability("m", 990.0, 60.0)
    assert reuse.probability("m", 1500.0, 60.0) < 0.05
    reuse.forget("m")
    assert 0.0 == reuse.rate_per_s("m", 1500.0)
