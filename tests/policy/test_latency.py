# SPDX-License-Identifier: Apache-2.0
"""Recent latencies: quantiles by nearest rank of a bounded ring, and what an account puts into it."""

from __future__ import annotations

import pytest

from tokenpool.config import SLO
from tokenpool.policy.latency import LatencySummary, RecentLatencies
from tokenpool.policy.slo import SloAccount

pytestmark = pytest.mark.cpu


def test_quantiles_are_values_that_were_seen() -> None:
    """p50 and p99 of 1 to 100 are 50 and 99; of one value they are that value."""
    recent = RecentLatencies()
    assert recent.summary(0.0) is None
    recent.add(10.0, 7.0)
    assert LatencySummary(7.0, 7.0, 1) == recent.summary(10.0)

    recent = RecentLatencies()
    for value in reversed(range(1, 101)):
        recent.add(10.0, float(value))
    assert LatencySummary(50.0, 99.0, 100) == recent.summary(10.0)


def test_old_and_surplus_values_are_forgotten() -> None:
    """What is older than the window does not count, nor what the ring has lost."""
    recent = RecentLatencies(size=3)
    for time_s in range(5):
        recent.add(float(time_s), float(time_s))

    assert LatencySummary(3.0, 4.0, 3) == recent.summary(4.0)
    assert LatencySummary(4.0, 4.0, 1) == recent.summary(63.5)
    assert recent.summary(64.0) is None


@pytest.mark.parametrize("slo", [None, SLO(ttft_s=1.0, tpot_s=0.1)])
def test_an_account_notes_first_tokens_at_once_and_gaps_at_the_end(slo: SLO | None) -> None:
    """TTFT is there with the first token, TPOT once the request has ended well; one token has no gap."""
    account = SloAccount()
    long, short = account.start(slo, 100.0), account.start(slo, 101.0)
    account.deliver(long, 1, 100.5)
    account.deliver(short, 1, 101.25)
    assert LatencySummary(0.25, 0.5, 2) == account.ttft.summary(101.25)
    account.deliver(long, 2, 102.5)
    account.finish(short)
    assert account.tpot.summary(102.5) is None

    account.finish(long)
    assert LatencySummary(1.0, 1.0, 1) == account.tpot.summary(102.5)
    assert LatencySummary(0.25, 0.5, 2) == account.ttft.summary(102.5)
