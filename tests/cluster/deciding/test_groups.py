# SPDX-License-Identifier: Apache-2.0
"""Models together and apart, hosts that a model may be on or that drain: the controller with hosts in memory."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from tests.cluster.deciding.test_reconcile import MemoryHost, Rig, deployment
from tokenpool.cluster.live_placement import placement_of
from tokenpool.cluster.values import Deployment, SeatState
from tokenpool.cluster_config import ClusterConfig
from tokenpool.config import PoolConfig
from tokenpool.errors import CapacityError, ConfigError, HostError
from tokenpool.group_config import apart_by_model, may_be_on

pytestmark = pytest.mark.cpu

FAST, SLOW = frozenset({"fast", "gpu=h100"}), frozenset({"slow"})


def rig(*hosts: MemoryHost, capacity: str = "fixed", replicas: int = 1, **groups: tuple[tuple[str, ...], ...]) -> Rig:
    config = ClusterConfig(replicas=replicas, capacity=capacity, **groups)
    return Rig(*hosts, replicas=replicas, placement=placement_of(config))


def labelled(name: str, labels: frozenset[str], pages: int = 64) -> MemoryHost:
    host = MemoryHost(name, pages)
    host.labels = labels
    return host


def where(made: Rig, name: str) -> set[str]:
    return {host for host, models in made.loaded().items() if name in models}


def on(name: str, *hosts: str, mib: int = 4) -> Deployment:
    return Deployment(name, 1, weight_bytes=mib << 20, hosts=hosts)


@pytest.mark.parametrize(
    "wanted, labels, may",
    [
        ((), SLOW, True), (("fast",), FAST, True), (("fast",), SLOW, False), (("fast", "slow"), SLOW, True),
        (("!fast",), FAST, False), (("!fast",), SLOW, True), (("fast", "!gpu=h100"), FAST, False),
        (("gpu=h100",), FAST, True), (("gpu",), FAST, False), (("!x", "fast"), FAST, True),
    ],
)  # fmt: skip
def test_labels(wanted, labels, may):
    """One of those to have, none of those to keep off."""
    assert may_be_on(wanted, labels) is may


@pytest.mark.parametrize("capacity", ["fixed", "live"])
def test_a_model_is_placed_on_hosts_it_may_be_on(capacity):
    made = rig(labelled("h0", FAST), labelled("h1", SLOW), capacity=capacity)
    made.want([on("a", "fast"), on("b", "!fast"), on("c", "h1"), on("d", "slow", "fast")])
    made.settle(20)
    assert [where(made, name) for name in "abc"] == [{"h0"}, {"h1"}, {"h1"}] and where(made, "d")


def test_a_model_that_no_host_may_take_says_so():
    """It is failed, with a reason, rather than waited for."""
    made = rig(labelled("h0", SLOW))
    made.want([on("a", "fast")])
    made.settle()
    error = made.control.view().models["a"].error
    assert isinstance(error, CapacityError) and "may take it" in str(error)


@pytest.mark.parametrize("capacity", ["fixed", "live"])
def test_a_host_that_drains_is_emptied_once_others_serve(capacity):
    """Each model is served all the time; nothing comes back until it is used again."""
    made = rig(MemoryHost("h0"), MemoryHost("h1"), capacity=capacity)
    made.want([deployment(name) for name in "abcd"])
    made.settle(10)
    made.control.drain("h0", is_wanted=True)
    for _ in range(200):
        made.period()
        assert all(where(made, name) for name in "abcd")
    assert made.loaded() == {"h0": [], "h1": ["a", "b", "c", "d"]}
    assert made.control.view().draining == {"h0"}
    made.control.drain("h0", is_wanted=False)
    made.control.deploy(deployment("e"))
    made.settle(20)
    assert made.loaded()["h0"] == ["e"] and made.control.view().draining == frozenset()


def test_a_host_stays_drained_for_the_next_controller_and_an_unknown_one_is_refused():
    made = rig(MemoryHost("h0"), MemoryHost("h1"))
    made.want([deployment("a")])
    made.settle()
    made.control.drain("h1", is_wanted=True)
    with pytest.raises(ConfigError, match="there is no host 'h9': the pool has h0, h1"):
        made.control.drain("h9", is_wanted=True)
    assert made.controller(made.control.snapshot(), "second").draining == {"h1"}


def test_the_last_host_keeps_what_nobody_else_can_take():
    made = rig(MemoryHost("h0"), labelled("h1", SLOW, pages=2))
    made.want([deployment("a", mib=8)])
    made.settle()
    made.control.drain("h0", is_wanted=True)
    made.settle(30)
    assert made.loaded() == {"h0": ["a"], "h1": []}


@pytest.mark.parametrize("capacity", ["fixed", "live"])
def test_a_group_goes_where_there_is_room_for_all_of_it(capacity):
    """Not to the emptier host that takes only one of them."""
    made = rig(MemoryHost("h0", pages=13), MemoryHost("h1", pages=30), capacity=capacity, together=(("a", "b"),))
    made.want([deployment("a", 10), deployment("b", 10)])
    made.settle(20)
    assert made.loaded() == {"h0": [], "h1": ["a", "b"]}


def test_a_group_too_large_for_any_host_says_so():
    made = rig(MemoryHost("h0", pages=13), MemoryHost("h1", pages=13), together=(("a", "b"),))
    made.want([deployment("a", 10), deployment("b", 10)])
    made.settle()
    assert {type(view.error) for view in made.control.view().models.values()} == {CapacityError}


@pytest.mark.parametrize("capacity", ["fixed", "live"])
def test_a_group_is_served_elsewhere_where_a_host_refuses_one_of_it(capacity):
    made = rig(MemoryHost("h0"), MemoryHost("h1"), capacity=capacity, together=(("a", "b"),))
    for host in ("h0", "h1"):
        made.hosts[host].refuses = {"b": HostError("no")} if host == "h0" else {}
    made.want([deployment("a"), deployment("b")])
    made.settle(400)
    assert where(made, "a") & where(made, "b") == {"h1"}


TOGETHER, APART = (("a", "b"),), (("a", "c"), ("c", "d"))
MODELS = [*(deployment(name) for name in "abcd"), on("e", "fast"), on("f", "!fast")]
APART_OF = apart_by_model(TOGETHER, APART)


@pytest.mark.parametrize("capacity", ["fixed", "live"])
@pytest.mark.parametrize("seed", range(20))
def test_any_life_of_a_cluster_ends_as_the_rules_say(capacity, seed):
    """Hosts that die, drain, refuse models and come back; models that come and go; controllers that are replaced.

    No host ever loads two models that are apart, a drain leaves no model without a host, and at rest all is as written.
    """
    rng = random.Random(seed)
    hosts = [labelled(f"h{i}", FAST if i < 2 else SLOW) for i in range(4)]
    made = rig(*hosts, capacity=capacity, together=TOGETHER, apart=APART)
    made.want(MODELS)
    revision, drained = 1, ""
    for _ in range(25):
        event = rng.choice(("die", "drain", "undrain", "refuse", "accept", "model", "controller", "nothing"))
        host = made.hosts[rng.choice(sorted(made.hosts))]
        if event == "die":
            host.start()
        elif event == "drain" and not drained:
            drained = host.name if host.name in made.control.hosts else ""
            if drained:
                made.control.drain(drained, is_wanted=True)
        elif event == "undrain" and drained:
            made.control.drain(drained, is_wanted=False)
            drained = ""
        elif event == "refuse":
            host.refuses = {rng.choice("abcdef"): HostError("not now")}
        elif event == "accept":
            host.refuses = {}
        elif event == "model":
            gone = rng.choice("abcdef")
            made.control.withdraw(gone)
            made.settle(rng.randint(0, 2))
            made.control.deploy(next(m for m in MODELS if m.name == gone))
            made.settle(4)  # what was there is another version, and goes first
        elif event == "controller":
            revision += 1
            made.placement = placement_of(ClusterConfig(capacity=capacity, together=TOGETHER, apart=APART))
            made.replace_controller(made.control.snapshot(), f"next{revision}")
        before = {m.name for m in MODELS if where(made, m.name)}
        for _ in range(rng.randint(1, 8)):
            made.period()
            _check_apart(made)
            if event in ("drain", "undrain", "nothing", "accept"):
                assert before <= {m.name for m in MODELS if where(made, m.name)}
    for host in made.hosts.values():
        host.refuses = {}
    for _ in range(800):
        made.period()
        _check_apart(made)
    assert all(where(made, m.name) for m in MODELS), made.loaded()
    assert where(made, "a") == where(made, "b")
    assert where(made, "e") <= {"h0", "h1"} and where(made, "f") <= {"h2", "h3"}
    assert not drained or made.loaded()[drained] == []


def _check_apart(made: Rig) -> None:
    for host in made.hosts:
        seats = {name: seat for (name, where), seat in made.control.seats.items() if where == host}
        taken = [name for name, seat in seats.items() if seat.state in (SeatState.LOADING, SeatState.SERVING)]
        for one, other in combinations(sorted(taken), 2):
            assert other not in APART_OF.get(one, ()), f"{one} and {other} are on {host}"


def pool(cluster: dict[str, object], **of_model: object) -> PoolConfig:
    models = [{"name": name, "model": f"x/{name}"} for name in "abc"]
    models[0] |= of_model
    return PoolConfig.from_dict({"models": models, "cluster": cluster})


def test_one_group_needs_no_outer_list():
    assert pool({"together": ["a", "b"]}).cluster.together == (("a", "b"),)
    assert pool({"apart": [["a", "b"], ["a", "c"]]}).cluster.apart == (("a", "b"), ("a", "c"))
    assert pool({}, hosts="fast").models[0].hosts == ("fast",)
    assert pool({}, hosts=["fast", "!old"]).models[0].hosts == ("fast", "!old")


@pytest.mark.parametrize(
    "cluster, of_model, says",
    [
        ({"together": ["a", "x"]}, {}, "'x' is no model of the pool"),
        ({"apart": ["a", "x"]}, {}, "'x' is no model of the pool"),
        ({"together": ["a"]}, {}, "name two models or more"),
        ({"together": ["a", "a"]}, {}, "twice"),
        ({"together": "a"}, {}, "expected a list"),
        ({"together": [["a", "b"], "c"]}, {}, "expected a list"),
        ({"together": [["a", "b"], ["b", "c"]]}, {}, "'b' is in two groups"),
        ({"together": ["a", "b"], "apart": ["a", "b", "c"]}, {}, "are together too"),
        ({"together": ["a", "b"]}, {"hosts": "fast"}, "different hosts"),
        ({"together": ["a", "b"]}, {"replicas": 2}, "different replicas"),
        ({"apart": ["a", "b", "c"], "hosts": 2}, {}, "need 3 hosts"),
        ({"apart": ["a", "b"], "hosts": 3, "replicas": 2}, {}, "need 4 hosts"),
        ({}, {"hosts": [""]}, "hosts: is empty"),
        ({}, {"hosts": ["!"]}, "no label"),
        ({}, {"hosts": 3}, "label"),
    ],
)
def test_what_cannot_be_kept_is_refused(cluster, of_model, says):
    """In one line that names the key."""
    with pytest.raises(ConfigError, match=says):
        pool(cluster, **of_model)
