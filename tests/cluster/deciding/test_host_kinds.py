# SPDX-License-Identifier: Apache-2.0
"""Hosts of a kind: what Ray is asked for is what a model may be on, and no kind takes the hosts of another one."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cluster.deciding.test_scaling import BLANK, IDLE_S, PERIOD_S, model
from tokenpool.cluster.deciding.host_demand import Rules, hosts_needed
from tokenpool.cluster.deciding.matching import match
from tokenpool.cluster.deciding.scaling import HostUse, Load, Need, Scaling
from tokenpool.cluster_config import HostRange
from tokenpool.config import PoolConfig
from tokenpool.errors import ConfigError
from tokenpool.group_config import may_be_on
from tokenpool.host_kinds import ANY, Kind, is_within, kind_of, selectors

pytestmark = pytest.mark.cpu

VALUES = {"gpu": ("a100", "h100"), "zone": ("n", "s")}
NODES = [
    frozenset(f"{key}={value}" for key, value in zip(VALUES, values, strict=True) if value)
    for values in itertools.product(*((None, *values) for values in VALUES.values()))
]
"""The labels of every node that there may be, each with or without a value for each key."""
LABELS = [f"{key}={value}" for key, values in VALUES.items() for value in values]
KINDS = st.lists(st.sampled_from([*LABELS, *(f"!{label}" for label in LABELS)]), max_size=4).map(kind_of)
H100, A100 = ("gpu=h100",), ("gpu=a100",)


def meets(selector: dict[str, str], labels: frozenset[str]) -> bool:
    """As Ray's documentation has it: a node without the key is one that does not have the value."""
    own = dict(label.split("=") for label in labels)
    for key, words in selector.items():
        wanted = words.removeprefix("!").removeprefix("in(").removesuffix(")").split(", ")
        if (own.get(key) in wanted) is words.startswith("!"):
            return False
    return True


@given(kind=KINDS)
def test_ray_is_asked_for_the_nodes_that_a_model_may_be_on_and_no_others(kind):
    for labels in NODES:
        assert may_be_on(kind, labels) is any(meets(selector, labels) for selector in selectors(kind)), labels


@given(kind=KINDS)
def test_ray_takes_the_selectors(kind):
    label_utils = pytest.importorskip("ray._private.label_utils")
    for selector in selectors(kind):
        assert label_utils.validate_label_selector(selector) is None


@given(narrow=KINDS, wide=KINDS)
def test_what_is_within_another_kind_has_no_other_node(narrow, wide):
    if is_within(narrow, wide):
        assert all(may_be_on(wide, labels) for labels in NODES if may_be_on(narrow, labels))
    assert is_within(narrow, narrow) and is_within(narrow, ANY)


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (["gpu"], "'gpu' is nothing that Ray"),
        (["!10.0.0.7"], "write labels of nodes as key=value"),
        (["gpu=h100", "host-3"], "'host-3' is nothing"),
        (["gpu=-"], "such as gpu=h100"),
        (["gpu=h100", "!gpu=h100"], "leave no host"),
    ],
)
def test_what_ray_cannot_be_asked_for_is_refused_where_hosts_come_and_go(labels, problem):
    pool = {"models": [{"name": "a", "model": "org/m"}, {"name": "b", "model": "org/m", "hosts": labels}]}
    PoolConfig.from_dict(pool | {"cluster": {"hosts": 2}})
    with pytest.raises(ConfigError, match=r"models\[1\]\.hosts") as refused:
        PoolConfig.from_dict(pool | {"cluster": {"hosts": {"min": 0, "max": 2}}})
    assert problem in str(refused.value)


# -- how many hosts of which kind ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("models", "kinds"),
    [
        ([(4, H100), (4, H100)], [H100]),
        ([(4, H100), (4, A100)], [H100, A100]),
        ([(40, ()), (4, H100)], [H100]),
        ([(40, H100), (4, ())], [H100]),
        ([(40, ("gpu=a100", "gpu=h100")), (4, H100)], [H100]),
        ([(40, H100), (40, ())], [H100, ANY]),
        ([(4, ("!zone=s",)), (4, H100)], [("!zone=s",), H100]),
        ([(4, ("!gpu=a100",)), (4, H100)], [H100]),
    ],
)
def test_models_share_hosts_that_are_there_for_both(models, kinds):
    """Before there is such a host, none waits for the other's."""
    models = [model(f"m{i}", mib, hosts=labels) for i, (mib, labels) in enumerate(models)]
    assert hosts_needed(models, BLANK, Rules(), [frozenset({"gpu=h100", "zone=n"})]) == kinds
    assert set(hosts_needed(models, BLANK, Rules())) == {kind_of(m.hosts) for m in models}


class KindFleet:
    """Hosts that are there at once where Ray has nodes of their kind, and gone at once."""

    def __init__(self, least: int = 0, most: int = 3, nodes: tuple[frozenset[str], ...] = tuple(NODES)) -> None:
        self.scaling = Scaling(HostRange(least, most), IDLE_S)
        self.nodes = nodes
        self.now_s = 100.0
        self.uses: dict[str, HostUse] = {}
        self.actions: list[str] = []
        self.changed_s = 0.0

    def look(self, *kinds: Kind, **need) -> None:
        self.now_s += PERIOD_S
        made = self.scaling.decide(Need(self.now_s, kinds, up=dict(self.uses), **need))
        self.actions += [change.action for change in made]
        self.changed_s = self.now_s if any(change.action == "host_ending" for change in made) else self.changed_s
        for host in self.scaling.ending.copy():
            assert self.uses.pop(host, HostUse()).num_seats == 0, "it has models"
            self.scaling.ended(host)
        for host in self.scaling.wanted:
            fitting = [labels for labels in self.nodes if may_be_on(self.scaling.kind(host), labels)]
            if fitting and host not in self.uses:
                self.uses[host] = HostUse(labels=fitting[len(self.uses) % len(fitting)])

    def run(self, seconds: float, *kinds: Kind, **need) -> None:
        for _ in range(int(seconds / PERIOD_S)):
            self.look(*kinds, **need)

    def num_of(self, kind: Kind) -> int:
        return sum(may_be_on(kind, use.labels) for use in self.uses.values())


def test_each_kind_gets_its_host_and_they_go_when_nobody_needs_them():
    f = KindFleet()
    f.run(2, H100, A100)
    assert (f.num_of(H100), f.num_of(A100), len(f.scaling.asked)) == (1, 1, 2)
    f.run(IDLE_S + 2, A100)
    assert (f.num_of(H100), f.num_of(A100), len(f.scaling.asked)) == (0, 1, 1)


def test_a_host_that_is_there_is_taken_for_every_kind_that_it_is_of():
    f = KindFleet(nodes=(frozenset({"gpu=h100", "zone=n"}),))
    f.run(2, H100)
    f.run(5, ("zone=n",))
    assert f.scaling.next_index == 1


def test_at_the_most_hosts_one_that_nobody_needs_makes_way():
    """At once, not after the idle time: somebody waits. One that is in use does not."""
    f = KindFleet(least=2, most=2)
    f.run(2, H100, H100)
    f.run(5, H100, A100, may_make_way=lambda host, leaving: False)
    assert f.num_of(H100) == 2
    f.run(5, H100, A100, may_go=lambda host, leaving: False)
    assert (f.num_of(H100), f.num_of(A100)) == (1, 1)


def test_a_kind_that_ray_has_no_node_for_is_in_nobodys_way():
    f = KindFleet(most=2, nodes=(frozenset({"gpu=h100"}),))
    f.run(2, A100)
    assert f.scaling.pending(f.uses) == {"host-0"} and f.scaling.kind("host-0") == A100
    f.run(2, A100, H100)
    assert f.num_of(H100) == 1
    f.run(5, A100, H100, homeless=H100)
    assert f.num_of(H100) == 1, "there may be no more"
    f.run(5, H100, homeless=H100)
    assert f.num_of(H100) == 2, "nobody waits for the other one any more"


def test_a_model_that_waits_for_a_kind_keeps_no_other_host():
    """However long Ray has no node for it: what is not needed goes, and what was asked for it stays."""
    f = KindFleet(most=4, nodes=(frozenset(),))
    f.run(2, ANY, ANY)
    f.run(3, ANY, ANY, homeless=H100)
    assert [f.scaling.kind(host) for host in f.scaling.wanted] == [ANY, ANY, H100]
    f.run(3 * IDLE_S, ANY, homeless=H100)
    assert sorted(f.scaling.kind(host) for host in f.scaling.wanted) == [ANY, H100]


def test_load_asks_for_hosts_of_the_kind_that_has_too_much_to_do():
    f = KindFleet(most=4)
    f.run(2, H100, A100)
    f.run(2, H100, A100, load=Load(2.4, True, A100))
    assert (f.num_of(H100), f.num_of(A100)) == (1, 2)


def test_the_next_controller_asks_for_the_same_kinds():
    f = KindFleet(nodes=())
    f.run(1, H100, ANY)
    again = Scaling(f.scaling.bounds, IDLE_S, *f.scaling.kept)
    assert [again.kind(host) for host in again.wanted] == [H100, ANY]


SOME = st.sampled_from([ANY, ANY, H100, A100, ("zone=n",), ("!gpu=a100",), ("gpu=a100", "gpu=h100")])
NEEDS = st.tuples(
    st.lists(SOME, max_size=4), st.one_of(st.none(), SOME), st.floats(0, 4), st.booleans(), st.integers(1, 40),
    st.sets(st.integers(0, 5), max_size=2),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    bounds=st.tuples(st.integers(0, 3), st.integers(1, 5)),
    nodes=st.lists(st.sampled_from(NODES), max_size=4).map(tuple),
    needs=st.lists(NEEDS, max_size=12),
    last=st.lists(SOME, max_size=4),
)
def test_whatever_kinds_are_needed_the_bounds_hold_and_each_gets_its_host(bounds, nodes, needs, last):
    """Once nothing changes, all kinds have a host that Ray has nodes for, as far as there may be hosts, and nothing is
    decided any more."""
    least, most = bounds[0], max(bounds)
    f = KindFleet(least, most, nodes)
    for kinds, homeless, total, is_over, periods, busy in needs:
        for _ in range(periods):
            f.uses = {h: use._replace(num_seats=int(int(h[5:]) % 6 in busy)) for h, use in f.uses.items()}
            f.look(*kinds, homeless=homeless, load=Load(total, is_over, kinds[0] if kinds else ANY))
            assert len(f.scaling.asked) <= most and f.scaling.leaving | f.scaling.ending <= f.scaling.asked
            is_changing = f.now_s - f.changed_s < 2 * PERIOD_S  # one goes, and the next one is asked for
            assert is_changing or len(f.scaling.asked) >= min(most, max(least, len(kinds)))
    f.uses = {host: use._replace(num_seats=0) for host, use in f.uses.items()}
    f.run(3 * IDLE_S, *last)
    before = len(f.actions)
    f.run(4 * IDLE_S, *last)
    assert f.actions[before:] == [], "it does not come to rest"
    assert len(f.scaling.asked) >= least
    wanted = last[:most]
    hosts = {host: (f.uses[host].labels if host in f.uses else None) for host in f.scaling.asked}

    def is_of(host: str, kind: Kind) -> bool:
        labels = hosts[host]
        return f.scaling.kind(host) == kind if labels is None else may_be_on(kind, labels)

    assert len(match(wanted, hosts, is_of)) == len(wanted), "a kind has neither a host nor one that is asked for"
    assert all(use.labels in nodes for use in f.uses.values())
