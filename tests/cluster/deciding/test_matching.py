# SPDX-License-Identifier: Apache-2.0
"""Which host stands for which kind: as many as can be, however many hosts there are, and whatever their names."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cluster.deciding.test_host_kinds import A100, H100, NODES
from tokenpool.cluster.deciding.matching import Matching, match
from tokenpool.cluster.deciding.scaling import HostUse, Need, Scaling
from tokenpool.cluster_config import HostRange
from tokenpool.group_config import may_be_on
from tokenpool.host_kinds import ANY, Kind

pytestmark = pytest.mark.cpu

SOME_KINDS = st.lists(st.sampled_from([ANY, H100, A100, ("zone=n",)]), max_size=4)
SOME_NODES = st.lists(st.sampled_from(NODES), max_size=4)


def asking(hosts: Mapping[str, frozenset[str]]) -> Callable[[str, Kind], bool]:
    return lambda host, kind: may_be_on(kind, hosts[host])


def best_of(kinds: Sequence[Kind], hosts: Mapping[str, frozenset[str]]) -> tuple[bool, ...]:
    """Which of the kinds have a host in the best of all ways."""
    is_of, places = asking(hosts), [*hosts, *[None] * len(kinds)]
    ways = (
        tuple(host is not None for host in way)
        for way in set(itertools.permutations(places, len(kinds)))
        if all(host is None or is_of(host, kind) for host, kind in zip(way, kinds, strict=True))
    )
    return max(ways, key=lambda way: (sum(way), way))


@settings(deadline=None)
@given(kinds=SOME_KINDS, nodes=SOME_NODES, late=st.sets(st.integers(0, 3)))
def test_as_many_kinds_as_can_be_have_a_host_and_the_first_ones_first(kinds, nodes, late):
    """By trying all ways; and of the hosts that are to be taken last no more are taken than have to be."""
    hosts = {f"h{i}": labels for i, labels in enumerate(nodes)}
    last = {f"h{i}" for i in late} & hosts.keys()
    found = match(kinds, hosts, asking(hosts), last)
    assert len(set(found.values())) == len(found)
    assert all(may_be_on(kinds[i], hosts[host]) for i, host in found.items())
    assert tuple(i in found for i in range(len(kinds))) == best_of(kinds, hosts)
    first = {host: labels for host, labels in hosts.items() if host not in last}
    assert len(set(found.values()) - last) == sum(best_of(kinds, first))


@settings(deadline=None)
@given(kinds=SOME_KINDS, nodes=SOME_NODES, order=st.permutations(range(4)))
def test_a_host_is_left_out_if_and_only_if_as_many_kinds_have_one_without_it(kinds, nodes, order):
    hosts = {f"h{i}": labels for i, labels in enumerate(nodes)}
    matching = Matching(kinds, hosts, asking(hosts))
    count = len(matching)
    for host in [f"h{i}" for i in order if i < len(nodes)]:
        rest = {name: labels for name, labels in hosts.items() if name != host}
        is_spare = sum(best_of(kinds, rest)) == count
        assert matching.leave_out(host) is is_spare
        hosts = rest if is_spare else hosts
        found = matching.placed
        assert len(found) == len(matching) == count == len(set(found.values())) and set(found.values()) <= hosts.keys()
        assert all(may_be_on(kinds[i], hosts[name]) for i, name in found.items())


MANY = 1200


class Questions:
    """Counts how often it was asked whether a host is of a kind."""

    def __init__(self, labels: Mapping[str, frozenset[str]]) -> None:
        self.labels = labels
        self.count = 0

    def __call__(self, host: str, kind: Kind) -> bool:
        self.count += 1
        return may_be_on(kind, self.labels[host])


@pytest.mark.parametrize("num_wanted", [MANY // 2, MANY, 2 * MANY])
def test_many_hosts_of_any_kind(num_wanted):
    is_of = Questions({f"h{i}": frozenset() for i in range(MANY)})
    matching = Matching([ANY] * num_wanted, is_of.labels, is_of)
    assert len(matching) == min(num_wanted, MANY)
    num_spare = sum(matching.leave_out(host) for host in is_of.labels)
    assert num_spare == max(0, MANY - num_wanted)
    assert is_of.count <= 2 * MANY * math.log2(MANY)


@pytest.mark.parametrize("seed", range(3))
def test_many_hosts_with_labels(seed):
    """All kinds need all hosts, so that those that came first have to move for later ones."""
    rng = random.Random(seed)
    labels = {f"h{i}": NODES[i % len(NODES)] for i in range(MANY)}
    own = [(*sorted(label for label in node if label.startswith("gpu=")),) for node in labels.values()]
    kinds = sorted(own)  # those of any kind first
    is_of = Questions(dict(rng.sample(sorted(labels.items()), MANY)))
    found = match(kinds, is_of.labels, is_of)
    assert sorted(found) == [*range(MANY)] and set(found.values()) == labels.keys()
    assert all(may_be_on(kinds[i], labels[host]) for i, host in found.items())
    assert is_of.count <= len({*kinds}) * MANY


# -- what is decided does not depend on names --------------------------------------------------------

ZONE_N = ("zone=n",)
THERE = st.lists(st.sampled_from([(), ("gpu=h100",), ("gpu=a100",), ("gpu=h100", "zone=n")]), max_size=3)
PENDING = st.lists(st.sampled_from([ANY, H100, A100, ZONE_N]), max_size=2)
WANTED = st.lists(st.sampled_from([ANY, H100, A100, ZONE_N]), max_size=4)


def scaling_of(names: Sequence[str], there: Sequence[Kind], pending: Sequence[Kind]) -> tuple[Scaling, dict]:
    """Hosts that are there with these labels, and pending ones of these kinds; names as given."""
    waiting = dict(zip(names[len(there) :], pending, strict=True))
    scaling = Scaling(HostRange(0, 6), 10.0, names, (), len(names), waiting)
    return scaling, {host: frozenset(labels) for host, labels in zip(names, there, strict=False)}


@settings(max_examples=100, deadline=None)
@given(there=THERE, pending=PENDING, wanted=WANTED, homeless=st.sampled_from([ANY, H100, A100, ZONE_N]))
def test_hosts_with_other_names_are_decided_of_alike(there, pending, wanted, homeless):
    """Such as whether a host is spare that a model without room waits for, and whether one may make way."""
    names = [f"host-{i}" for i in range(len(there) + len(pending))]
    outcomes = set()
    for order in itertools.permutations(names):
        scaling, up = scaling_of(order, there, pending)
        may = scaling.may_make_way(homeless, wanted, up, lambda host: True)
        uses = {host: HostUse(labels=labels) for host, labels in up.items()}
        need = Need(100.0, wanted, homeless=homeless, up=uses)
        made = [*scaling.decide(need), *scaling.decide(Need(103.0, wanted, homeless=homeless, up=uses))]
        what = [(c.action, scaling.kind(c.host) if c.action == "host_asked" else None, c.reason) for c in made]
        outcomes.add((may, tuple(what)))
    assert len(outcomes) == 1, outcomes
