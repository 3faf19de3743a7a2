# SPDX-License-Identifier: Apache-2.0
"""Requests that begin alike meet at one host, but never at the price of a queue."""

from __future__ import annotations

from collections import Counter

import pytest

from tokenpool.policy.routing import choose_host

pytestmark = pytest.mark.cpu

HOSTS = ("h0", "h1", "h2", "h3")
PREFIXES = [bytes([n % 256, n >> 8]) * 8 for n in range(400)]


def _idle(hosts=HOSTS):
    return dict.fromkeys(hosts, 0)


def test_without_a_prefix_the_fewest_requests_decide():
    assert choose_host({"h0": 2, "h1": 1, "h2": 1}) == "h1"


def test_requests_that_begin_alike_go_to_one_host_whatever_the_order_of_hosts():
    for prefix in PREFIXES[:50]:
        assert choose_host(_idle(), prefix) == choose_host(_idle(reversed(HOSTS)), prefix)


def test_prefixes_spread_over_all_hosts():
    counts = Counter(choose_host(_idle(), prefix) for prefix in PREFIXES)
    assert set(counts) == set(HOSTS)
    assert min(counts.values()) > len(PREFIXES) / len(HOSTS) / 2


def test_a_busy_host_gets_no_more_for_its_cache():
    home = choose_host(_idle(), PREFIXES[0])
    assert choose_host(_idle() | {home: 4}, PREFIXES[0]) == home
    assert choose_host(_idle() | {home: 5}, PREFIXES[0]) != home


def test_a_host_that_leaves_moves_only_its_own_prefixes():
    before = {prefix: choose_host(_idle(), prefix) for prefix in PREFIXES}
    after = {prefix: choose_host(_idle(HOSTS[:-1]), prefix) for prefix in PREFIXES}
    assert all(after[prefix] == host for prefix, host in before.items() if host != HOSTS[-1])
