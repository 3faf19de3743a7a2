# SPDX-License-Identifier: Apache-2.0
"""Requests that begin alike meet at one host, near its weights, but never at the price of a queue or a deadline."""

from __future__ import annotations

from collections import Counter

import pytest

from tokenpool.policy.routing import HostQueue, choose_host
from tokenpool.policy.turns import Residency

pytestmark = pytest.mark.cpu

HOSTS = ("h0", "h1", "h2", "h3")
PREFIXES = [bytes([n % 256, n >> 8]) * 8 for n in range(400)]
RESIDENT, LOADING, WARM, COLD = Residency.ON_DEVICE, Residency.COPYING, Residency.IN_HOST, Residency.ON_DISK


def _idle(hosts=HOSTS):
    return dict.fromkeys(hosts, HostQueue(0))


def _queues(*queues: tuple[int, Residency | None, float | None]) -> dict[str, HostQueue]:
    """Requests, residency and seconds to a first token of the hosts h0, h1, ..."""
    return {name: HostQueue(*queue) for name, queue in zip(HOSTS, queues, strict=False)}


def test_without_a_prefix_the_fewest_requests_decide():
    assert choose_host({"h0": HostQueue(2), "h1": HostQueue(1), "h2": HostQueue(1)}) == "h1"


def test_requests_that_begin_alike_go_to_one_host_whatever_the_order_of_hosts():
    for prefix in PREFIXES[:50]:
        assert choose_host(_idle(), prefix) == choose_host(_idle(reversed(HOSTS)), prefix)


def test_prefixes_spread_over_all_hosts():
    counts = Counter(choose_host(_idle(), prefix) for prefix in PREFIXES)
    assert set(counts) == set(HOSTS)
    assert min(counts.values()) > len(PREFIXES) / len(HOSTS) / 2


def test_a_busy_host_gets_no_more_for_its_cache():
    home = choose_host(_idle(), PREFIXES[0])
    assert choose_host(_idle() | {home: HostQueue(4)}, PREFIXES[0]) == home
    assert choose_host(_idle() | {home: HostQueue(5)}, PREFIXES[0]) != home


def test_a_host_that_leaves_moves_only_its_own_prefixes():
    before = {prefix: choose_host(_idle(), prefix) for prefix in PREFIXES}
    after = {prefix: choose_host(_idle(HOSTS[:-1]), prefix) for prefix in PREFIXES}
    assert all(after[prefix] == host for prefix, host in before.items() if host != HOSTS[-1])


@pytest.mark.parametrize("prefix", [b"", *PREFIXES[:4]])
@pytest.mark.parametrize(
    ("queues", "chosen"),
    [
        ([(0, WARM, None), (4, RESIDENT, None)], "h1"),  # the copy is saved
        ([(0, WARM, None), (5, RESIDENT, None)], "h0"),  # the queue costs more
        ([(0, COLD, None), (1, WARM, None)], "h1"),
        ([(0, WARM, None), (1, LOADING, None), (2, COLD, None)], "h1"),
        ([(0, WARM, None), (1, None, None)], "h1"),  # nothing is known against it
        ([(0, COLD, None), (9, WARM, None)], "h0"),
    ],
)
def test_with_queues_alike_the_weights_decide(queues, chosen, prefix):
    assert choose_host(_queues(*queues), prefix) == chosen


@pytest.mark.parametrize("prefix", [b"", *PREFIXES[:4]])
@pytest.mark.parametrize(
    ("queues", "slack_s", "chosen"),
    [
        ([(0, RESIDENT, 2.0), (9, WARM, 0.5)], 1.0, "h1"),  # the only one in time, whatever else speaks against it
        ([(0, RESIDENT, 2.0), (9, WARM, 0.5)], 9.0, "h0"),  # both are
        ([(0, RESIDENT, 0.8), (1, WARM, 0.5)], 1.0, "h1"),  # 0.8 s may be 1.2 s
        ([(0, RESIDENT, 3.0), (9, COLD, 2.0), (0, WARM, 4.0)], 1.0, "h1"),  # all late: the least
        ([(0, RESIDENT, 3.0), (9, COLD, 2.0)], -5.0, "h1"),
        ([(0, RESIDENT, float("inf")), (3, RESIDENT, 1.0)], 10.0, "h1"),
        ([(3, RESIDENT, None), (0, RESIDENT, 7.0)], 10.0, "h0"),  # what is not known is not late
    ],
)
def test_little_slack_goes_where_the_first_token_comes_in_time(queues, slack_s, chosen, prefix):
    assert choose_host(_queues(*queues), prefix, slack_s) == chosen
