# SPDX-License-Identifier: Apache-2.0
"""Rates of models and seats from made-up reports of hosts."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenpool.cluster.traffic import TrafficBook
from tokenpool.cluster.values import HostedReport, HostReport

pytestmark = pytest.mark.cpu


def report(host: str, tokens: float | None, *, life: str = "1", requests: float = 0) -> HostReport:
    """A host with the model m that has given out so many tokens, each on time; None = it does not have it."""
    load = {"requests": requests, "prompt_tokens": 10 * requests, "finished": requests, "tokens": tokens or 0,
            "tokens_on_time": tokens or 0, "step_seconds": (tokens or 0) / 1000}  # fmt: skip
    models = {} if tokens is None else {"m": HostedReport(1, load)}
    return HostReport(host, life, 1, models=models)


def test_a_window_sees_only_what_is_in_it():
    """Ten tokens per second for a minute, then a hundred: the short window knows only the hundred."""
    book = TrafficBook(60.0)
    for second in range(71):
        book.take(second, [report("h", 10 * min(second, 60) + 100 * max(0, second - 60))], ["m"])

    assert book.models(10.0)["m"].tokens_per_s == pytest.approx(100)
    assert book.models(60.0)["m"].tokens_per_s == pytest.approx((50 * 10 + 10 * 100) / 60)
    assert book.seats(10.0)["m", "h", "1"].busy_frac == pytest.approx(0.1)


def test_a_model_that_moves_keeps_its_traffic():
    """Half a minute on one host, half on the next: its rate is that of the whole minute, and counted once."""
    book = TrafficBook(60.0)
    for second in range(31):
        book.take(second, [report("h", 10 * second), report("g", None)], ["m"])
    for second in range(31, 61):
        book.take(second, [report("h", None), report("g", 10 * (second - 31))], ["m"])

    assert book.models(60.0)["m"].tokens_per_s == pytest.approx(10, rel=0.05)
    assert list(book.seats(60.0)) == [("m", "g", "1")]


def test_totals_before_the_first_report_do_not_count():
    """A new controller finds old totals: that is no traffic."""
    book = TrafficBook(60.0)
    for second in range(5):
        book.take(second, [report("h", 1_000_000)], ["m"])

    assert book.models(60.0) == {}


def test_a_model_without_a_host_has_no_traffic_but_is_remembered():
    """Its host is gone for a while; what it had stays in the window, nothing falls below zero."""
    book = TrafficBook(60.0)
    for second in range(11):
        book.take(second, [report("h", 10 * second)], ["m"])
    for second in range(11, 21):
        book.take(second, [], ["m"])
    book.take(21, [report("h", 5, life="2")], ["m"])

    assert book.models(60.0)["m"].tokens_per_s == pytest.approx(100 / 21)


def test_totals_that_begin_anew_count_from_zero():
    """A model that was unloaded and loaded again in one life of the host."""
    book = TrafficBook(60.0)
    for second, tokens in enumerate((100, 200, 10, 20)):
        book.take(second, [report("h", tokens)], ["m"])

    assert book.models(60.0)["m"].tokens_per_s == pytest.approx((100 + 10 + 10) / 3)


def test_a_backlog_counts_as_demand():
    """Twice as many requests come as end: the tokens wanted are twice those that are made."""
    book = TrafficBook(60.0)
    for second in range(11):
        made = report("h", 100 * second, requests=second)
        made.models["m"].load["requests"] = 2 * second
        book.take(second, [made], ["m"])

    rates = book.models(60.0)["m"]
    assert rates.wanted_tokens_per_s == pytest.approx(2 * rates.tokens_per_s)
    assert rates.on_time_frac == 1.0


TAKES = st.lists(st.tuples(st.floats(1.0, 3.0), st.integers(0, 9), st.sampled_from("ab"), st.booleans()), max_size=30)


@given(takes=TAKES)
def test_rates_are_numbers_however_a_model_comes_and_goes(takes: list[tuple[float, int, str, bool]]) -> None:
    """Also of one that is wanted anew, perhaps as another model of that name, while a host still works for it."""
    book, now_s, tokens = TrafficBook(6.0), 0.0, {"a": 0, "b": 0}
    for seconds, more, host, is_wanted in takes:
        now_s += seconds
        tokens[host] += more
        book.take(now_s, [report(host, tokens[host], requests=tokens[host])], ["m"] if is_wanted else [])
        for rates in (*book.models(6.0).values(), *book.models(2.0).values(), *book.seats(6.0).values()):
            assert all(math.isfinite(rate) and rate >= 0 for rate in rates)
