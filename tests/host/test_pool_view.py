# SPDX-License-Identifier: Apache-2.0
"""What is counted of an engine's requests for the turn policy."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenpool.config import SLO
from tokenpool.host.pool_view import queue_stats
from tokenpool.sim.seat import Seat
from tokenpool.sim.timeline import Timeline
from tokenpool.sim.workload import ModelCosts, SimRequest

pytestmark = pytest.mark.cpu

SLO_10S = SLO(10.0, 0.1)


def request(arrival_s: float, prompt: int = 20, computed: int = 20, output: int = 0) -> SimpleNamespace:
    return SimpleNamespace(
        arrival_time=arrival_s,
        num_prompt_tokens=prompt,
        num_computed_tokens=computed,
        num_output_tokens=output,
        num_tokens=prompt + output,
    )


def scheduler(*requests: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(requests=dict(enumerate(requests)))


def test_what_is_due_is_what_can_still_be_on_time():
    """Twenty seconds late, twice what a first token has, and a request claims nothing; it counts all the same."""
    lost, late = request(85.0, output=10), request(106.0, output=10)  # due at 96 and 117
    first = request(108.0, computed=0)
    made = scheduler(lost, late, first)

    early = queue_stats(made, SLO_10S, 115.0)
    assert (96.0, 118.0, 116.0) == pytest.approx((early.next_due_s, early.first_due_s, early.until_s))
    later = queue_stats(made, SLO_10S, 116.5)
    assert (117.0, 118.0, 137.0) == pytest.approx((later.next_due_s, later.first_due_s, later.until_s))
    gone = queue_stats(made, SLO_10S, 200.0)
    assert (math.inf, math.inf, math.inf) == (gone.next_due_s, gone.first_due_s, gone.until_s)
    assert (2, 1, 20, 40) == gone[:4] and gone.arrival_s == 108.0


def test_without_an_slo_nothing_is_due():
    """And nothing is lost, however long it waits."""
    stats = queue_stats(scheduler(request(0.0), request(1.0, computed=0)), None, 1e6)

    assert (math.inf,) * 3 == (stats.first_due_s, stats.next_due_s, stats.until_s)


@given(
    st.lists(st.tuples(st.floats(0, 60), st.integers(0, 80), st.booleans()), min_size=1, max_size=8),
    st.lists(st.floats(0, 90), min_size=1, max_size=4),
)
def test_the_simulator_shows_what_the_host_shows(rows, times_s):
    """The same requests, waiting for a prefill or decoding, as time passes: the same due times at every look."""
    seat = Seat("m", 0, ModelCosts(1, 1.0, 0.1, 0.0, 0.0, 0.1, 0.0, 0.0), SLO_10S)
    for arrival_s, output, runs in sorted(rows):
        timeline = Timeline(SimRequest(arrival_s, "m", 20, 100), SLO_10S)
        timeline.num_delivered = output
        (seat.running if runs else seat.waiting).append(timeline)
    seat.count_waiting()
    seat.count_running()
    made = scheduler(*(request(at, computed=20 * runs, output=output) for at, output, runs in rows))

    for now_s in sorted(times_s):
        view, stats = seat.view(0.0, now_s), queue_stats(made, SLO_10S, now_s)
        assert (stats.first_due_s, stats.next_due_s) == pytest.approx((view.first_due_s, view.next_due_s))
