# SPDX-License-Identifier: Apache-2.0
"""How many hosts a pool asks for, empties and gives back: laws of the numbers, on a clock of the test."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cluster.deciding.test_reconcile import MIB, MemoryHost
from tokenpool.cluster.deciding.host_demand import Rules, can_empty, hosts_needed
from tokenpool.cluster.deciding.scaling import HostUse, Load, Need, Scaling
from tokenpool.cluster.placement import Situation
from tokenpool.cluster.values import Deployment
from tokenpool.cluster_config import HostRange
from tokenpool.host_kinds import ANY

pytestmark = pytest.mark.cpu

IDLE_S = 10.0
PERIOD_S = 0.5


class Fleet:
    """Hosts that are there at once, and gone at once."""

    def __init__(self, least: int = 0, most: int = 4) -> None:
        self.scaling = Scaling(HostRange(least, most), IDLE_S)
        self.now_s = 100.0
        self.uses: dict[str, HostUse] = {}
        self.changes: list[tuple[str, str]] = []
        self.are_there = True

    def look(self, **need) -> list[str]:
        """One period; returns what was decided."""
        self.now_s += PERIOD_S
        if (count := need.pop("num_for_models", None)) is not None:
            need["for_models"] = [ANY] * count
        made = self.scaling.decide(Need(self.now_s, up=dict(self.uses), **need))
        for host in self.scaling.ending.copy():
            assert self.uses.pop(host, HostUse()).num_seats == 0, "it has models"
            self.scaling.ended(host)
        for host in self.scaling.wanted:
            if self.are_there:
                self.uses.setdefault(host, HostUse())
        self.changes += [(change.action, change.host) for change in made]
        return [change.action for change in made]

    def run(self, seconds: float, **need) -> list[str]:
        return [action for _ in range(int(seconds / PERIOD_S)) for action in self.look(**need)]

    @property
    def count(self) -> int:
        return len(self.scaling.asked - self.scaling.leaving)


def test_from_none_to_one_and_back():
    f = Fleet()
    assert f.run(30) == [] and f.count == 0
    assert f.look(num_for_models=1) == ["host_asked"]
    assert f.run(60, num_for_models=1) == []
    assert f.run(IDLE_S - 1) == [] and f.count == 1
    assert f.run(3) == ["host_leaving", "host_ending"] and f.scaling.asked == set()
    f.look(num_for_models=1)
    assert f.scaling.asked == {"host-1"}, "no name is given twice"


def test_the_bounds_hold_whatever_is_asked():
    f = Fleet(least=2, most=3)
    assert f.look() == ["host_asked"] * 2
    f.run(5, num_for_models=9, load=Load(20.0, True))
    assert f.count == 3
    f.run(60)
    assert f.count == 2


def test_a_need_that_comes_back_keeps_the_host():
    """The time begins anew; a host that is being emptied is kept rather than another one asked for."""
    f = Fleet()
    f.look(num_for_models=1)
    f.run(IDLE_S - 2)
    f.look(num_for_models=1)
    assert f.run(IDLE_S - 2) == []
    f.uses["host-0"] = HostUse(num_seats=1, num_requests=1)
    assert f.run(5) == ["host_leaving"]
    assert f.look(num_for_models=1) == ["host_stays"] and f.scaling.wanted == ["host-0"] and not f.scaling.leaving


def test_only_as_many_go_as_were_too_many_all_the_time():
    f = Fleet()
    f.look(num_for_models=4)
    f.run(IDLE_S / 2, num_for_models=1)
    f.run(1, num_for_models=3)
    f.run(IDLE_S / 2, num_for_models=1)
    assert f.count == 3
    f.run(IDLE_S + 1, num_for_models=1)
    assert f.count == 1


def test_a_host_that_ray_has_no_node_for_is_waited_for_and_given_back_first():
    f = Fleet(most=2)
    f.look(num_for_models=1)
    f.are_there = False
    assert f.look(num_for_models=2) == ["host_asked"]
    assert f.run(500, num_for_models=2) == [], "one is asked for once, however long that takes"
    f.uses["host-0"] = HostUse(num_seats=1)
    assert f.run(IDLE_S + 1, num_for_models=1) == ["host_ending"] and f.scaling.wanted == ["host-0"]


def test_what_has_no_other_home_stays():
    f = Fleet()
    f.look(num_for_models=2)
    assert f.run(60, num_for_models=1, may_go=lambda host, leaving: False) == []
    assert f.run(20, num_for_models=1, may_go=lambda host, leaving: host == "host-0") == ["host_leaving", "host_ending"]
    assert f.scaling.wanted == ["host-1"]


def test_the_host_that_is_missed_least_goes():
    f = Fleet()
    f.look(num_for_models=3)
    f.uses = {"host-0": HostUse(1, 3), "host-1": HostUse(2, 0, 0.1), "host-2": HostUse(1, 1)}
    f.run(IDLE_S + 1, num_for_models=2)
    assert f.scaling.leaving == {"host-1"}


def test_what_is_not_known_takes_no_host():
    f = Fleet()
    f.look(num_for_models=1)
    assert f.run(60, is_known=False) == []


def test_a_leaving_host_that_dies_is_not_waited_for():
    f = Fleet()
    f.look(num_for_models=1)
    f.uses["host-0"] = HostUse(num_seats=1)
    f.run(IDLE_S + 1)
    assert f.scaling.leaving == {"host-0"}
    f.uses = {}
    f.are_there = False
    assert f.look() == ["host_ending"]


def test_a_host_that_the_operator_drained_is_replaced_and_given_back():
    f = Fleet()
    f.look(num_for_models=1)
    need = {"num_for_models": 1, "drained": frozenset({"host-0"})}
    assert f.look(**need) == ["host_asked"]
    f.uses["host-0"] = HostUse(num_seats=1)
    assert f.run(60, **need) == []
    f.uses["host-0"] = HostUse()
    assert f.run(IDLE_S + 1, **need) == ["host_ending"] and f.scaling.wanted == ["host-1"]


def test_a_model_without_a_home_gets_one_more_host_and_no_second_one_before_it_is_there():
    f = Fleet(most=8)
    f.look(num_for_models=1)
    f.run(1, num_for_models=1, homeless=ANY)
    assert f.count == 1, "what is there may be changing"
    f.are_there = False
    f.run(30, num_for_models=1, homeless=ANY)
    assert f.count == 2


def test_load_asks_for_what_is_missing_and_is_of_no_use_where_models_have_no_further_seat():
    f = Fleet(most=8)
    f.look(num_for_models=1)
    f.run(5, num_for_models=1, load=Load(0.85, True))
    assert f.count == 1
    f.run(5, num_for_models=1, load=Load(2.0, True), num_useful=2)
    assert f.count == 2
    f.run(5, num_for_models=1, load=Load(2.0, True))
    assert f.count == 3
    f.run(60, num_for_models=1, load=Load(1.2, False))
    assert f.count == 3, "two would be nearly full"
    f.run(60, num_for_models=1, load=Load(1.0, False))
    assert f.count == 2


def test_the_next_controller_goes_on_with_what_was_asked():
    f = Fleet()
    f.look(num_for_models=2)
    f.scaling.ending.add("host-1")
    again = Scaling(f.scaling.bounds, IDLE_S, *f.scaling.kept)
    assert (again.wanted, again.ending, again.next_index) == (["host-0"], {"host-1"}, 2)
    assert again.is_over("host-1") and not again.is_over("host-0") and not again.is_over("host-7")
    again.adopt("host-7")
    assert again.next_index == 8 and again.is_over("host-6")


NEEDS = st.tuples(
    st.integers(0, 6),
    st.floats(0, 6),
    st.booleans(),
    st.booleans(),
    st.integers(1, 40),
    st.booleans(),
    st.lists(st.integers(0, 9), max_size=2),
)


@settings(max_examples=300, deadline=None)
@given(bounds=st.tuples(st.integers(0, 3), st.integers(1, 5)), needs=st.lists(NEEDS, max_size=20))
def test_whatever_is_needed_the_bounds_hold_and_no_host_with_models_is_ended(bounds, needs):
    """And once nothing changes, nothing is decided any more."""
    least, most = bounds[0], max(bounds)
    f = Fleet(least, most)
    for num, total, is_over, is_homeless, periods, are_there, busy in needs:
        f.are_there = are_there
        for _ in range(periods):
            f.uses = {
                host: HostUse(int(host in f.scaling.wanted and int(host[5:]) % 10 in busy), 0, 0.0) for host in f.uses
            }
            f.look(num_for_models=num, load=Load(total, is_over), homeless=ANY if is_homeless else None)
            assert least <= f.count or len(f.scaling.asked) == most
            assert len(f.scaling.asked) <= most and f.scaling.leaving | f.scaling.ending <= f.scaling.asked
            assert num == 0 or f.scaling.wanted, "somebody waits"
        if not is_homeless:
            f.uses = dict.fromkeys(f.uses, HostUse())
            need = {"num_for_models": num, "load": Load(total, is_over)}
            f.run(3 * IDLE_S, **need)
            assert f.run(5 * IDLE_S, **need) == [], "it does not come to rest"


@settings(max_examples=300, deadline=None)
@given(work=st.floats(0, 8), overhead=st.floats(0, 0.5), count=st.integers(1, 8), is_late=st.booleans())
def test_constant_work_does_not_make_hosts_come_and_go(work, overhead, count, is_late):
    """The load of all hosts together grows with their number, because each host steps for itself."""
    f = Fleet(most=8)
    f.run(2, num_for_models=count)
    seen = []
    for _ in range(int(40 * IDLE_S)):
        total = work + overhead * f.count if work else 0.0
        f.look(num_for_models=1, load=Load(total, is_late or total > 0.9 * f.count))
        seen.append(f.count)
    rises = [b - a for a, b in itertools.pairwise(seen) if a != b]
    assert all(step > 0 for step in rises) or all(step < 0 for step in rises), rises


# -- what models need --------------------------------------------------------------------------------


def model(name: str, mib: int = 4, **more) -> Deployment:
    return Deployment(name, 1, weight_bytes=mib * MIB, **more)


BLANK = MemoryHost("h", pages=65).report(1.0)
"""64 pages of 1 MiB, and the one of null blocks."""


@pytest.mark.parametrize(
    ("sizes", "rules", "count"),
    [
        ([], Rules(), 0),
        ([4, 4, 4], Rules(), 1),
        ([40, 40], Rules(), 2),
        ([40, 30, 20, 10], Rules(), 2),
        ([4], Rules(replicas=3), 3),
        ([40, 40], Rules(replicas=2), 4),
        ([4, 4], Rules(apart=(("m0", "m1"),)), 2),
        ([40, 40, 10, 10], Rules(together=(("m0", "m2"), ("m1", "m3"))), 2),
        ([100, 4], Rules(), 1),
    ],
)
def test_hosts_that_models_need(sizes, rules, count):
    assert hosts_needed([model(f"m{i}", mib) for i, mib in enumerate(sizes)], BLANK, rules) == [ANY] * count


def test_before_a_host_was_seen_one_is_asked_for_or_as_many_as_replicas():
    assert hosts_needed([model("a", 90), model("b", 90)], None, Rules()) == [ANY]
    assert hosts_needed([model("a", 90, replicas=2), model("b")], None, Rules()) == [ANY] * 2


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 70), max_size=12), replicas=st.integers(1, 3))
def test_needed_hosts_are_enough_and_not_many_too_many(sizes, replicas):
    models = [model(f"m{i}", mib) for i, mib in enumerate(sizes)]
    count = len(hosts_needed(models, BLANK, Rules(replicas)))
    fitting = [mib + 1 for mib in sizes if mib + 1 <= 64]
    assert (count == 0) is (not sizes)
    assert count * 64 >= replicas * sum(fitting)
    assert count <= max(replicas, 2 * math.ceil(replicas * sum(fitting) / 64) + replicas)


def test_a_host_can_be_emptied_if_all_that_is_needed_on_it_has_room_elsewhere():
    hosts = {name: replace(BLANK, host=name) for name in ("h0", "h1", "h2")}
    models = {name: model(name, mib) for name, mib in (("a", 40), ("b", 30), ("c", 30), ("d", 20))}
    placed = {"a": {"h0"}, "b": {"h1"}, "c": {"h1"}, "d": {"h2"}}
    s = Situation(models, hosts, placed, {}, set(), 0.0)
    assert can_empty("h2", {"d"}, s, Rules(), frozenset()), "beside a"
    assert not can_empty("h1", {"b", "c"}, s, Rules(), frozenset()), "one of them only"
    assert can_empty("h1", {"b"}, s, Rules(), frozenset()), "nobody needs c"
    assert not can_empty("h0", {"a"}, s, Rules(), frozenset({"h2"})), "the one with room leaves"
    assert can_empty("h0", {"a"}, s, Rules(), frozenset())
    assert not can_empty("h0", {"a"}, s, Rules(apart=(("a", "d"),)), frozenset())
    assert not can_empty("h2", {"d"}, replace(s, draining={"h0"}), Rules(), frozenset())
