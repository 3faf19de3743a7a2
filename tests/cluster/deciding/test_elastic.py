# SPDX-License-Identifier: Apache-2.0
"""A pool whose hosts come and go: the controller's logic, servers, hosts and a Ray that has nodes or not, in memory."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cluster.deciding.lives_world import Host, World, model
from tokenpool.cluster.deciding.elastic import elastic_of
from tokenpool.cluster.deciding.scaling import MADE_WAY, HostsKept
from tokenpool.cluster.live_placement import placement_of
from tokenpool.cluster.placement import Loads
from tokenpool.cluster.reconcile import Reconciler
from tokenpool.cluster.values import Deployment
from tokenpool.cluster_config import ClusterConfig, HostRange
from tokenpool.errors import ConfigError
from tokenpool.group_config import may_be_on
from tokenpool.host_kinds import Kind

pytestmark = pytest.mark.cpu

IDLE_S = 4.0
_numbers = itertools.count(1000)


class ElasticWorld(World):
    """Hosts are there some periods after they were asked for, if there is a node, and gone once they are given back.

    What a controller has decided and not written yet is lost with it; while Ray's head is away nothing is written, no
    actor comes or goes, and no controller follows another one.
    """

    def __init__(self, models: list[Deployment], most: int = 3, least: int = 0, come_periods: int = 2, **more: Any):
        self.config = ClusterConfig(hosts=HostRange(least, most), host_idle_after_s=IDLE_S)
        self.num_nodes = most
        self.nodes = more.pop("nodes", [frozenset()] * most)
        """Labels of the nodes that Ray can have, of which it has the first `num_nodes`."""
        self.come_periods = come_periods
        self.pages = more.pop("pages", 64)
        self.load_periods = more.pop("load_periods", 1)
        self.kept = HostsKept()
        self.is_head_up = True
        self.end_periods = more.pop("end_periods", 0)
        self.coming: dict[str, int] = {}
        self.going: dict[str, int] = {}
        self.loads: Loads | None = None
        self.was_given_back: list[str] = []
        self.makes_way: set[str] = set()
        """Hosts that go because another kind is needed, or went."""
        super().__init__(models, num_hosts=0, **more)

    def _controller(self, snapshot: dict[str, Any] | None, models: list[Deployment]) -> Reconciler:
        placement = placement_of(self.config)
        measured = placement.loads
        placement.loads = lambda situation: self.loads or measured(situation)  # type: ignore[method-assign]
        return Reconciler(
            placement, host_timeout_s=2.0, now_s=self.now_s, snapshot=snapshot, identity=f"c{next(_numbers)}",
            elastic=elastic_of(self.config, placement, self.max_loaded, self.kept), models=models,
            servers=list(self.control.peers) if snapshot is not None else (), server_timeout_s=2.0,
            max_loaded=self.max_loaded,
        )  # fmt: skip

    @property
    def scaling(self):
        return self.control.scaling

    def replace_controller(self, *, with_snapshot: bool = True) -> None:
        if self.is_head_up:
            super().replace_controller(with_snapshot=with_snapshot)

    def period(self) -> None:
        self._ray()
        super().period()
        bounds = self.config.host_range
        assert len(self.scaling.asked) <= bounds.most and len(self.coming.keys() | self.hosts.keys()) <= bounds.most
        for host in self.hosts.values():
            for name in host.models.keys() & self.control.models.keys():
                assert may_be_on(self.control.models[name].hosts, host.labels), f"{name} is on {host.name}"
        self._look_who_makes_way()
        if self.control.is_settled and not self.control.draining:
            going = self.scaling.leaving | self.scaling.ending
            least = min(bounds.least, bounds.most - len(self.scaling.ending))  # these count until they are gone
            assert len(self.scaling.asked - going) >= least - len(going & self.makes_way)

    def _look_who_makes_way(self) -> None:
        for decision in self.control.log.last(50):
            if MADE_WAY in decision["reason"]:
                self.makes_way.add(decision["host"])
            elif decision["action"] in ("host_leaving", "host_stays"):
                self.makes_way.discard(decision["host"])

    def _ray(self) -> None:
        if not self.is_head_up:
            return
        self.kept = HostsKept(*json.loads(json.dumps(self.scaling.kept)))
        for name in self.scaling.wanted:
            is_lost = name in self.hosts and not self.hosts[name].is_there and name not in self.control.hosts
            if (name not in self.hosts or is_lost) and name not in self.coming:
                assert name not in self.was_given_back, "its name was used before"
                self.coming[name] = self.come_periods
        for name in list(self.coming):
            self.coming[name] -= 1
            free = self._free_nodes(self.scaling.kind(name))
            if self.coming[name] < 0 and free:
                del self.coming[name]
                host = self.hosts.setdefault(name, Host(name, self.pages, self.load_periods))
                host.die()
                host.is_there, host.node, host.labels = True, free[0], self.nodes[free[0]]
        for name in sorted(self.scaling.ending):
            host = self.hosts.get(name)
            assert host is None or not host.is_there or not (host.models or host.orders), "it has models"
            self.coming.pop(name, None)
            if host is not None:
                host.is_there = False
            self.going[name] = self.going.get(name, self.end_periods) - 1
            if self.going[name] < 0:
                del self.going[name]
                self.hosts.pop(name, None)
                self.was_given_back.append(name)
                self.control.host_ended(name)

    def _free_nodes(self, kind: Kind) -> list[int]:
        taken = {host.node for host in self.hosts.values() if host.is_there}
        return [i for i in range(self.num_nodes) if i not in taken and may_be_on(kind, self.nodes[i])]

    def lose_node(self, name: str) -> None:
        """A host is gone with its node, or the node on which it was about to be; Ray starts it anew on another one."""
        if name in self.coming:
            self.coming[name] = self.come_periods
        if name in self.hosts:
            self.hosts[name].is_there = False

    def at(self, stage: str) -> list[str]:
        """Hosts that are asked for and not there, are emptied, or are given back."""
        stages = {"pending": self.scaling.pending(self.control.hosts), "leaving": self.scaling.leaving}
        return sorted(stages.get(stage, self.scaling.ending))


def test_from_zero_to_one_host_by_one_request_and_back():
    w = ElasticWorld([model("a"), model("b")])
    w.settle(20)
    assert (w.hosts, w.scaling.asked) == ({}, set()) and w.control.is_settled
    assert w.control.view().host_count == (0, 3, (), ())
    asked = w.ask("one", "a")
    w.settle(2)
    assert w.control.view().host_count.pending == ("host-0",) and not asked.end
    w.run(20)
    assert (w.ends(), list(w.hosts)) == (["answered"], ["host-0"])
    w.settle(30)
    assert (w.hosts, w.loaded(), w.scaling.asked, w.was_given_back) == ({}, set(), set(), ["host-0"])
    assert all(seen.is_cold for seen in w.control.view().models.values())
    w.ask("two", "b")
    w.run(20)
    assert list(w.hosts) == ["host-1"]


def test_what_is_always_loaded_keeps_its_host():
    w = ElasticWorld([model("a", at_start=True), model("b", 50)])
    w.settle(10)
    assert (list(w.hosts), w.loaded()) == (["host-0"], {"a"})
    w.ask("one", "b")
    w.run(20)
    w.settle(40)
    assert len(w.hosts) == 1 and "a" in w.loaded()


def test_more_hosts_come_for_models_that_do_not_fit_and_go_again():
    w = ElasticWorld([model(name, 40) for name in "abcd"])
    for name in "abcd":
        w.ask("one", name, steps=12)
    w.run(80)
    assert w.actions("load_failed", "not_placed") == [] and "host-2" in {*w.hosts, *w.was_given_back}
    w.settle(60)
    assert w.hosts == {}


def test_models_in_use_move_together_and_no_request_is_lost():
    """Two hosts, because two models did not have room beside a third one; then it is idle, and one host is enough."""
    w = ElasticWorld([model("big", 40), model("a", 30), model("b", 10)])
    w.ask("two", "big", steps=16)
    w.settle(8)
    long = [w.ask("one", name, steps=120) for name in "ba"]
    w.settle(12)
    assert [sorted(host.models) for host in w.hosts.values()] == [["b", "big"], ["a"]]
    w.settle(40)
    assert list(w.hosts) == ["host-1"] and w.loaded() == {"a", "b"} and not any(request.end for request in long)
    w.run()
    assert set(w.ends()) == {"answered"}


def test_an_idle_model_does_not_keep_a_host_of_its_own():
    w = ElasticWorld([model("a", 40), model("b", 40)])
    long = w.ask("one", "a", steps=150)
    w.settle(8)
    w.ask("two", "b")
    w.settle(40)
    assert (len(w.hosts), w.loaded(), long.end) == (1, {"a"}, "") and w.control.view().models["b"].is_cold


@pytest.mark.parametrize(("rule", "count"), [({}, 2), ({"unload_after_s": 3.0}, 1)])
def test_idle_models_take_room_until_they_are_unloaded(rule, count):
    """Two hosts, each with a used and an idle model: the used ones would fit on one of them."""
    w = ElasticWorld([model("a", 30), model("x", 30, **rule), model("b", 30), model("y", 30, **rule)], pages=64)
    asked = []
    for name in "axby":
        asked.append(w.ask("two", name, steps=200 if name in "ab" else 24))
        w.settle(6)
    long = asked[::2]
    assert len(w.hosts) == 2 and w.loaded() == {"a", "b", "x", "y"}
    w.settle(60)
    assert (len(w.hosts), [request.end for request in long]) == (count, ["", ""])


def test_a_request_while_a_host_is_emptied_keeps_it():
    w = ElasticWorld([model("a", 40), model("k", 40, keep="host")])
    for name in "ak":
        w.ask("one", name)
    w.run(40)
    for _ in range(40):
        w.settle(1)
        if w.scaling.leaving:
            break
    assert len(w.scaling.leaving) == 1
    w.ask("two", "a")
    w.run(40)
    assert w.ends()[-1] == "answered"


def test_hosts_come_for_load_and_go_when_it_is_over():
    w = ElasticWorld([model("a", at_start=True), model("b", at_start=True)])
    w.settle(10)
    w.loads = Loads({"host-0": 1.6}, is_over=True)
    w.settle(10)
    assert len(w.hosts) == 2
    w.loads = Loads({"host-0": 0.2, "host-1": 0.1})
    w.settle(40)
    assert len(w.hosts) == 1 and w.loaded() == {"a", "b"}


def test_without_a_node_requests_wait_and_nothing_is_refused():
    """How long is for the servers to say; when one of them lets its request go, the host is given back."""
    w = ElasticWorld([model("a")])
    w.num_nodes = 0
    asked = w.ask("one", "a")
    w.settle(200)
    assert (asked.end, w.scaling.wanted, w.control.view().models["a"].error) == ("", ["host-0"], None)
    w.servers["one"].held.clear()
    asked.end = "timed out"
    w.settle(20)
    assert (w.scaling.asked, w.coming) == (set(), {})


def test_what_no_host_can_hold_is_refused_once_one_is_known():
    w = ElasticWorld([model("a", 100), model("b")])
    w.ask("one", "a")
    w.run(30)
    assert "no host has room" in w.ends()[0]
    w.settle(60)
    assert w.hosts == {}


H100, A100 = frozenset({"gpu=h100"}), frozenset({"gpu=a100"})


def labelled(name: str, *hosts: str, mib: int = 4, **rule: Any) -> Deployment:
    return replace(model(name, mib, **rule), hosts=hosts)


def test_a_model_brings_a_host_with_its_labels():
    """Of two kinds of nodes, each model gets the one that it may be on, and the one that has no label is nobody's."""
    w = ElasticWorld(
        [labelled("a", "gpu=h100"), labelled("b", "gpu=a100", "zone=n"), labelled("c", "!gpu=a100")],
        nodes=[frozenset(), A100, H100],
    )
    w.ask("one", "a")
    w.run(20)
    assert [host.labels for host in w.hosts.values()] == [H100]
    w.ask("one", "b")
    w.ask("two", "c")
    w.run(30)
    assert sorted(sorted(host.labels) for host in w.hosts.values()) == [["gpu=a100"], ["gpu=h100"]]
    w.settle(60)
    assert w.hosts == {} and set(w.ends()) == {"answered"}


def test_a_label_that_no_node_has_is_waited_for_and_is_in_nobodys_way():
    """Ray may have a node one day; for how long requests wait is for the servers to say."""
    w = ElasticWorld([labelled("a", "gpu=h100"), model("b")])
    asked = w.ask("one", "a")
    w.settle(10)
    w.ask("one", "b")
    w.settle(30)
    assert w.ends() == ["", "answered"] and w.control.view().models["a"].error is None
    w.servers["one"].held.clear()
    asked.end = "timed out"
    w.settle(40)
    assert w.scaling.asked == set()


def test_at_the_most_hosts_an_idle_host_makes_way_for_one_with_the_label():
    w = ElasticWorld([labelled("a", "gpu=h100"), labelled("b", "gpu=a100")], most=1, nodes=[H100, A100])
    w.num_nodes = 2
    w.ask("one", "a")
    w.run(20)
    for name in "bab":
        w.ask("two", name)
        w.run(40)
    assert set(w.ends()) == {"answered"} and w.actions("load_failed", "not_placed") == []


def test_at_the_most_hosts_a_host_in_use_stays_and_the_other_kind_is_told():
    w = ElasticWorld([labelled("a", "gpu=h100", at_start=True), labelled("b", "gpu=a100")], most=1, nodes=[H100, A100])
    w.num_nodes = 2
    w.settle(10)
    asked = w.ask("one", "b")
    w.settle(20)
    assert "may take it" in asked.end and w.loaded() == {"a"}


@pytest.mark.parametrize("mib", [20, 40], ids=["beside an idle model", "at all"])
def test_a_host_does_not_make_way_whose_kept_model_has_no_room_elsewhere(mib):
    """Not even where it would fit beside what is kept: then an idle model is in its place. The other kind is told."""
    kept = [labelled("a", "gpu=h100", mib=30, at_start=True), model("k", mib, keep="host")]
    w = ElasticWorld(
        [*kept, labelled("idle", "gpu=h100", mib=30), labelled("b", "gpu=a100")], most=2, least=2,
        nodes=[H100, frozenset(), A100],
    )  # fmt: skip
    w.num_nodes = 3
    w.settle(10)
    for name in ("k", "idle"):
        w.ask("one", name)
        w.run(60)
    assert [sorted(host.models) for host in w.hosts.values()] == [["a", "idle"], ["k"]]
    w.ask("two", "b")
    w.run(60)
    assert "may take it" in w.ends()[-1]


def test_models_that_take_turns_each_get_a_host_of_their_kind():
    """One is loaded at a time; the host of the other one has to be there before it can be its turn."""
    w = ElasticWorld(
        [labelled("a", "gpu=h100", at_start=True), labelled("b", "gpu=a100")], most=2, max_loaded=1, nodes=[H100, A100]
    )
    w.settle(10)
    for name in "bab":
        w.ask("one", name)
        w.run(60)
    assert set(w.ends()) == {"answered"}


@pytest.mark.parametrize("with_snapshot", [True, False])
def test_a_new_controller_waits_for_the_same_kind(with_snapshot):
    w = ElasticWorld([labelled("a", "gpu=h100")], come_periods=8, nodes=[frozenset(), H100, frozenset()])
    w.ask("one", "a")
    w.settle(3)
    w.replace_controller(with_snapshot=with_snapshot)
    w.run(60)
    assert [(name, host.labels) for name, host in w.hosts.items()] == [("host-0", H100)]


@pytest.mark.parametrize("with_snapshot", [True, False])
def test_the_controller_dies_while_a_host_is_pending(with_snapshot):
    """The next one waits for the same host, and asks for no second one."""
    w = ElasticWorld([model("a")], come_periods=8)
    w.ask("one", "a")
    w.settle(3)
    w.replace_controller(with_snapshot=with_snapshot)
    w.run(60)
    assert (w.ends(), list(w.hosts), w.scaling.next_index) == (["answered"], ["host-0"], 1)


@pytest.mark.parametrize("with_snapshot", [True, False])
def test_a_new_controller_keeps_hosts_and_streams(with_snapshot):
    w = ElasticWorld([model("a")])
    long = w.ask("one", "a", steps=60)
    w.settle(20)
    w.replace_controller(with_snapshot=with_snapshot)
    w.settle(20)
    assert (long.end, list(w.hosts), w.hosts["host-0"].built["a"]) == ("", ["host-0"], 1)
    w.run()
    w.settle(40)
    assert w.hosts == {}


def test_a_host_is_given_back_by_the_next_controller():
    w = ElasticWorld([model("a")])
    w.ask("one", "a")
    w.run(20)
    for _ in range(60):
        World.period(w)  # Ray does nothing
        if w.scaling.ending:
            break
    w.kept = w.scaling.kept
    w.replace_controller()
    assert w.scaling.ending == {"host-0"}
    w.settle(10)
    assert w.hosts == {} and w.scaling.asked == set()


def test_a_node_that_is_lost_while_its_host_is_emptied():
    w = ElasticWorld([model("a", 40), model("k", 40, at_start=True)])
    w.ask("one", "a")
    w.run(40)
    for _ in range(60):
        w.settle(1)
        if w.scaling.leaving:
            w.lose_node(next(iter(w.scaling.leaving)))
            break
    w.settle(20)
    assert len(w.hosts) == 1 and w.loaded() == {"k"} and not w.scaling.leaving


def test_without_any_server_hosts_go():
    w = ElasticWorld([model("a")], least=0)
    w.ask("one", "a", steps=400)
    w.settle(20)
    for name in ("one", "two"):
        w.kill_server(name)
    w.settle(60)
    assert w.hosts == {}


STAGES = ("pending", "leaving", "ending")
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            ["ask"] * 8
            + ["long", "host dies", "node", "server dies", "controller", "nodes", "refuse", "load", "head", "drain"]
            + [f"{what} {stage}" for what in ("node", "host dies", "controller") for stage in STAGES]
        ),
        st.integers(0, 5),
        st.integers(0, 30),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(
    events=EVENTS,
    bounds=st.tuples(st.integers(0, 2), st.integers(1, 4)),
    max_loaded=st.sampled_from([None, 1, 2]),
    sizes=st.lists(st.sampled_from([4, 20, 40]), min_size=2, max_size=5),
    rules=st.lists(
        st.sampled_from([{}, {}, {"keep": "host"}, {"at_start": True}, {"unload_after_s": 2.0}]), min_size=5
    ),
    come_periods=st.integers(0, 6),
    periods=st.tuples(st.integers(0, 2), st.integers(0, 4)),
    labels=st.lists(st.sampled_from([(), (), ("gpu=h100",), ("gpu=a100",), ("!gpu=a100",)]), min_size=5, max_size=5),
)
def test_every_request_is_answered_or_refused_while_hosts_come_and_go(
    events, bounds, max_loaded, sizes, rules, come_periods, periods, labels
):
    """Through deaths of all kinds, of hosts that are pending, emptied or given back too, a Ray without nodes and one
    without a head: the bounds hold, no host is started twice or ended with models, no model is on a host that it may
    not be on, in the end nobody waits, and hosts that nobody needs are gone."""
    models = [labelled(f"m{i}", *labels[i], mib=mib, **rules[i]) for i, mib in enumerate(sizes)]
    nodes = [frozenset(), H100, A100] * max(bounds)
    w = ElasticWorld(
        models, max(bounds), bounds[0], come_periods, max_loaded=max_loaded, load_periods=periods[0],
        end_periods=periods[1], nodes=nodes,
    )  # fmt: skip
    w.num_nodes = len(nodes)
    w.have_returned = True
    for event, which, steps in events:
        what, _, stage = event.rpartition(" ") if event.endswith(STAGES) else (event, "", "")
        if stage and not w.at(stage):
            continue
        name, server = models[which % len(models)].name, ["one", "two"][which % 2]
        hosts = w.at(stage) if stage else sorted(w.hosts)
        if what in ("ask", "long") and w.servers[server].is_there:
            w.ask(server, name, steps + 60 * (what == "long"), tenant="xy"[steps % 2])
        elif what == "host dies" and w.hosts.keys() & hosts:
            w.kill_host(sorted(w.hosts.keys() & hosts)[which % len(w.hosts.keys() & hosts)])
        elif what == "node" and hosts:
            w.lose_node(hosts[which % len(hosts)])
        elif what == "server dies" and server == "two":
            w.kill_server(server)
        elif what == "controller":
            w.replace_controller(with_snapshot=steps % 2 == 0)
        elif what == "head":
            w.is_head_up = not w.is_head_up
        elif what == "drain" and w.control.hosts:
            host = sorted(w.control.hosts)[which % len(w.control.hosts)]
            w.control.drain(host, is_wanted=host not in w.control.draining)
        elif what == "nodes":
            w.num_nodes = which % (len(nodes) + 1)
        elif what == "refuse" and hosts:
            refusing = w.hosts[hosts[which % len(hosts)]]
            refusing.refuses = {} if name in refusing.refuses else {name: ConfigError("no file")}
        elif what == "load":
            w.loads = Loads({host: steps / 10 for host in w.control.hosts}, is_over=steps > 9) if steps % 3 else None
        w.settle(1 + steps % 3)
    w.num_nodes, w.loads, w.is_head_up = len(nodes), None, True
    for host in w.control.draining & w.control.hosts.keys():
        w.control.drain(host, is_wanted=False)
    for host in w.hosts.values():
        host.refuses = {}
    w.run(2500)
    for request in w.requests:
        is_told = any(why in request.end for why in ("no file", "no host", "engine hosts ended", "max_loaded"))
        assert request.end in ("answered", "lost with its server") or is_told, request.end
    w.settle(120)
    if not w.control.lives.needed(w.now_s):
        assert len(w.scaling.wanted) == bounds[0], w.control.log.last()[-20:]
    before = (set(w.hosts), w.control.version)
    w.settle(60)
    assert before == (set(w.hosts), w.control.version), "it does not come to rest"
