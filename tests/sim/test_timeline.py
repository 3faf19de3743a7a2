# SPDX-License-Identifier: Apache-2.0
"""Runs of tokens are accounted as one token after the other would be."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpool.config import SLO
from tokenpool.policy.slo import RequestTimeline
from tokenpool.sim.timeline import Timeline
from tokenpool.sim.workload import SimRequest

pytestmark = pytest.mark.cpu

# Multiples of 1/64 s are exact in binary, so both sides round alike.
TICK = st.integers(1, 400).map(lambda n: n / 64)
RUN = st.tuples(st.integers(0, 300).map(lambda n: n / 64), st.integers(1, 40).map(lambda n: n / 64), st.integers(1, 30))


@settings(deadline=None, max_examples=300)
@given(ttft_s=TICK, tpot_s=st.integers(1, 30).map(lambda n: n / 64), runs=st.lists(RUN, min_size=1, max_size=8))
def test_runs_of_tokens_count_like_single_tokens(ttft_s, tpot_s, runs):
    """On-time tokens and the time-weighted value equal those of the online book."""
    total = sum(count for _, _, count in runs)
    slo = SLO(ttft_s, tpot_s)
    request = Timeline(SimRequest(10.0, "m", 5, total), slo)
    online = RequestTimeline(slo, 10.0)
    now_s = 10.0
    for pause_s, step_s, count in runs:
        start_s = now_s + pause_s
        request.deliver(start_s, step_s, count)
        for j in range(count):
            now_s = start_s + step_s * (j + 1)
            online.deliver(now_s)

    assert online.num_on_time == request.num_on_time
    assert online.num_delivered == request.num_delivered
    assert online.time_weighted() == pytest.approx(request.time_weighted(), abs=1e-9)


def test_without_an_slo_every_token_is_on_time():
    """As in the online book; only a request that failed is worth nothing."""
    request, online = Timeline(SimRequest(10.0, "m", 5, 4), None), RequestTimeline(None, 10.0)
    request.deliver(20.0, 3.0, 4)
    for token in range(4):
        online.deliver(23.0 + 3.0 * token)

    assert (4, 1.0) == (request.num_on_time, request.time_weighted())
    assert (online.num_on_time, online.time_weighted()) == (request.num_on_time, request.time_weighted())
    assert request.is_all_on_time and 32.0 == request.end_s
    request.failed = True
    assert 0.0 == request.time_weighted()


def test_a_worked_example():
    """Tokens at 3, 6, 7 and 8 s with ttft 3 s and tpot 2 s: due at 3, 5, 7, 9, so one is late."""
    request = Timeline(SimRequest(0.0, "m", 5, 4), SLO(3.0, 2.0))
    request.deliver(0.0, 3.0, 2)
    request.deliver(6.0, 1.0, 2)

    assert 3 == request.num_on_time
    assert 3.0 == request.first_token_s
    assert 5 / 8 == request.time_weighted()
