# SPDX-License-Identifier: Apache-2.0
"""Requests that begin alike meet at one host, near its weights, but never at the price of a queue or a deadline."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tokenpool.policy.routing import HostQueue, Told, choose_host
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


def _told(num_requests=0, first_token_in_s=0.1, load=0.1, places=10, is_active=False, residency=RESIDENT):
    return HostQueue(num_requests, residency, first_token_in_s, load, places, is_active)


@pytest.mark.parametrize("prefix", [b"", *PREFIXES[:4]])
@pytest.mark.parametrize(
    ("hosts", "chosen"),
    [
        ([_told(), _told(20, 0.3, 0.5, is_active=True)], 1),  # one more in a batch is nearly free
        ([_told(), _told(256, 0.3, 0.5, 0, is_active=True)], 0),  # the batch is full
        ([_told(300, places=-44, is_active=True), _told(259, places=-3, is_active=True)], 1),  # both are
        ([_told(), _told(20, 0.3, 1.3, is_active=True)], 0),  # it has more to do than it can
        ([_told(load=1.6), _told(20, 0.3, 1.3, is_active=True)], 1),  # both have
        ([_told(), _told(20, 1.2, 0.5, is_active=True)], 0),  # a tenth of the ten seconds is gone
        ([_told(9, residency=WARM), _told(12)], 1),  # no batch: the weights decide
    ],
)
def test_a_batch_is_joined_while_it_has_room_and_its_host_has_time(hosts, chosen, prefix):
    assert choose_host(dict(zip(HOSTS, hosts, strict=False)), prefix, 10.0) == HOSTS[chosen]


def test_nothing_is_due_so_requests_spread():
    """A model without an SLO has no use for a large batch on one host beside an idle one."""
    assert choose_host({"h0": _told(20, is_active=True), "h1": _told()}) == "h1"


def test_no_request_waits_behind_others_while_a_host_could_begin_it():
    """Whatever hosts say: of those in time, with places and time, none has the first token much earlier."""
    rng = random.Random(1)
    for _ in range(3000):
        hosts = {
            name: _told(rng.randrange(40), rng.choice((0.05, 1, 4, 9)), rng.choice((0.1, 0.9, 1.5)),
                        rng.choice((-3, 0, 5)), rng.random() < 0.5, rng.choice((RESIDENT, WARM)))
            for name in HOSTS[: rng.randint(2, 4)]
        }  # fmt: skip
        chosen = hosts[choose_host(hosts, rng.choice((b"", *PREFIXES[:4])), 10.0)]
        free = [h for h in hosts.values() if h.first_token_in_s * 1.5 <= 10 and h.num_places > 0 and h.load <= 1.2]
        if free:
            assert chosen in free
            assert chosen.first_token_in_s <= min(h.first_token_in_s for h in free) + 1.0


REPORT = {
    "running": 0, "waiting": 0, "residency": "in host memory", "first_token_in_s": 1.0, "prefill_s": 0.2,
    "load": 0.5, "first_load": 0.1, "request_load": 0.02, "places": 3,
}  # fmt: skip


def test_what_was_told_is_brought_up_to_date_with_own_requests():
    """Two requests sent since: two prefills more, two places less, a batch; after 3 s the report counts no more."""
    told = Told(REPORT, 4, 100.0)
    fresh, later = told.queue(4, 100.5), told.queue(6, 100.5)

    assert (1.0, 0.62, 3, False) == pytest.approx((*fresh[2:5], fresh.is_active))
    assert (1.4, 0.66, 1, True) == pytest.approx((*later[2:5], later.is_active))
    assert HostQueue(6) == told.queue(6, 103.1)


def test_a_host_of_an_older_version_reports_no_load():
    old = {key: REPORT[key] for key in ("running", "waiting", "residency", "first_token_in_s", "prefill_s")}
    assert HostQueue(5, WARM, pytest.approx(1.2)) == Told(old, 4, 0.0).queue(5, 1.0)
