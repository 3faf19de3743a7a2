# SPDX-License-Identifier: Apache-2.0
"""The parts of the benches that decide what their numbers mean."""

from __future__ import annotations

import pytest

from bench.parts import traces
from bench.parts.common import percentile
from bench.parts.sized_models import shape
from bench.parts.trace_client import Outcome
from bench.serve_trace import find_example, find_limit, rate_at
from bench.token_path import size_problem
from tokenpool.config import SLO
from tokenpool.policy.slo import attainments

pytestmark = pytest.mark.cpu

OPTIONS = dict(models=5, requests=40, skew=1.0, input_len=(8, 16), output_len=(2, 4))


def outcome(*token_times_s: float, output_len: int = 3, problem: str = "") -> Outcome:
    request = traces.TracedRequest(0.0, "m", 8, output_len)
    return Outcome(request, arrival_s=100.0, token_times_s=[100.0 + t for t in token_times_s], problem=problem)


def test_a_seed_names_one_trace():
    """The same seed gives the same trace, another seed another one."""
    first = traces.generate(seed=1, **OPTIONS)

    assert first == traces.generate(seed=1, **OPTIONS)
    assert first != traces.generate(seed=2, **OPTIONS)
    assert {f"model-{index:02}" for index in range(5)} == {request.model for request in first}
    assert all(8 <= request.input_len <= 16 and 2 <= request.output_len <= 4 for request in first)


def test_a_rate_changes_nothing_but_arrivals():
    """At every rate the same requests come in the same order, and so many per second."""
    trace = traces.generate(seed=1, **OPTIONS)
    for rate in (0.5, 8.0):
        played = traces.at_rate(trace, rate)
        assert [request[1:] for request in trace] == [request[1:] for request in played]
        assert pytest.approx(len(trace) / rate * 1e3) == played[-1].arrival_ms


def test_a_written_trace_is_read_back(tmp_path):
    """A CSV file holds the whole trace."""
    trace = traces.generate(seed=1, **OPTIONS)
    traces.write(tmp_path / "trace.csv", trace)

    assert trace == traces.read(tmp_path / "trace.csv")


def test_a_trace_out_of_order_is_refused(tmp_path):
    """Arrivals that go back in time would be sent late."""
    traces.write(tmp_path / "trace.csv", traces.generate(seed=1, **OPTIONS)[::-1])

    with pytest.raises(ValueError, match="order"):
        traces.read(tmp_path / "trace.csv")


def test_a_trace_is_repeated_at_the_same_rate():
    """The same requests come again after the last one, so often that there are enough."""
    trace = traces.generate(seed=1, **OPTIONS)

    repeated = traces.at_least(trace, 100)
    played = traces.at_rate(repeated, 8.0)

    assert 3 * [request[1:] for request in trace] == [request[1:] for request in repeated]
    assert trace == traces.at_least(trace, 40)
    assert pytest.approx(15e3) == played[-1].arrival_ms
    assert played == sorted(played)


@pytest.mark.parametrize("limit", [0.01, 0.1, 0.7, 2.0, 3.1, 47.0, 1000.0])
def test_the_limit_of_any_machine_is_found(limit):
    """However fast the machine is: within an eighth of the gap, unless it lies outside of what is tried at all."""
    curve = {}

    def share_at(rate: float) -> float:
        assert rate not in curve
        curve[rate] = 1.0 if rate <= limit else 0.5
        return curve[rate]

    find_limit(share_at, 0.9, first_rate=2.0, halvings=3)

    found = rate_at(sorted(curve.items()), 0.9)
    if 1 / 16 <= limit <= 256:
        assert limit * 0.85 <= found <= limit * 1.15
        assert len(curve) <= 12
    else:
        assert found in (0.0, 256.0)


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([(1, 1.0), (2, 0.95), (4, 0.85)], 3.0),
        ([(1, 0.8), (2, 0.5)], 0.0),
        ([(1, 1.0), (2, 0.9)], 2.0),
        ([(1, 0.85), (2, 0.95), (3, 0.85)], 2.5),
    ],
)
def test_the_rate_is_found_between_neighbours(curve, expected):
    """The highest rate that reaches the goal, moved along the line to the next one."""
    assert pytest.approx(expected) == rate_at(curve, 0.9)


def test_all_tokens_of_a_request_that_failed_count_as_missed():
    """A request without an answer misses as many tokens as it asked for."""
    slo = SLO(1.0, 0.1)
    good, bad = outcome(0.5, 0.6, 0.7), outcome(0.5, output_len=7, problem="gone")

    shares = attainments([good.record(slo), bad.record(slo)])

    assert pytest.approx(4 / 10) == shares.token
    assert pytest.approx(1 / 2) == shares.request


def test_the_example_is_late_in_one_run_only():
    """Of requests late under one policy and in time under the other, the one that gains most is shown."""
    late = [outcome(5.0), outcome(2.0), outcome(9.0), outcome(0.1)]
    in_time = [outcome(0.5), outcome(0.2), outcome(3.0), outcome(0.1)]

    found = find_example(late, in_time, SLO(1.0, 0.1))

    assert found is not None and found["request"] == 0
    assert find_example(in_time, late, SLO(1.0, 0.1)) is None


@pytest.mark.parametrize("mib", [1, 16, 64, 256])
def test_a_model_has_the_size_asked_for(mib):
    """The weights of a made model are within 3 % of the size."""
    sizes = shape(mib)
    hidden, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    weights = layers * (3 * hidden * hidden + 3 * hidden * sizes["intermediate_size"]) + 2 * 512 * hidden

    assert pytest.approx(mib * (1 << 20), rel=0.03) == 2 * weights


@pytest.mark.parametrize(
    ("steps", "rounds", "is_far", "says"),
    [
        (1000, 10, False, None),
        (1000, 10, True, None),
        (20, 10, True, None),
        (19, 10, True, "--steps 20 or more"),
        (100, 1, True, "--rounds 2 or more"),
        (9, 10, False, "--steps 10 or more"),
        (1, 1, False, "--steps 2 or more"),
        (0, 0, False, "--rounds 1 or more, --steps 2 or more"),
        (2000, 10, False, "--steps 1450 or fewer"),
        (2000, 10, True, None),
        (3000, 2, True, "--steps 2900 or fewer"),
    ],
)
def test_steps_that_cannot_be_measured_are_told_before_anything_starts(steps, rounds, is_far, says):
    problem = size_problem(steps, rounds, is_far=is_far)
    assert problem is None if says is None else says in (problem or "")


@pytest.mark.parametrize(("steps", "rounds"), [(20, 10), (2, 1), (1450, 10)])
def test_what_is_not_refused_has_percentiles(steps, rounds):
    """As many values as each arm then gives."""
    for is_far in (False, True):
        if size_problem(steps, rounds, is_far=is_far) is None:
            each = steps // rounds - is_far  # between two steps there is one time
            assert percentile(list(range(each * rounds)), 50) >= 0
