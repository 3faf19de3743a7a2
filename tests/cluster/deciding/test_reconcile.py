# SPDX-License-Identifier: Apache-2.0
"""The controller's logic with hosts in memory: no Ray, no process, a clock that the test moves."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tokenpool.cluster.live_placement import LivePlacement
from tokenpool.cluster.placement import KeepReplicas, Placement
from tokenpool.cluster.reconcile import Reconciler
from tokenpool.cluster.values import (
    Deployment,
    HostedReport,
    HostReport,
    Order,
    Peer,
    SeatState,
    StaleEpochError,
)
from tokenpool.errors import CapacityError, HostError
from tokenpool.policy.capacity import Role
from tokenpool.policy.capacity_live import LiveCapacity

pytestmark = pytest.mark.cpu

MIB = 1 << 20
FRONT = Peer("front", 64, 1, "10.0.0.9", 7)


class MemoryHost:
    """A host that does what it is told at once, and remembers epochs as a supervisor does."""

    def __init__(self, name: str, pages: int = 64) -> None:
        self.name = name
        self.pages = pages
        self.num_lives = 0
        self.epoch, self.controller = 0, ""
        self.refuses: dict[str, Exception] = {}
        self.labels: frozenset[str] = frozenset()
        self.node = 0
        self.start()

    def start(self) -> None:
        self.num_lives += 1
        self.models: dict[str, HostedReport] = {}
        self.changes = 0

    @property
    def life(self) -> str:
        return f"{self.name}-{self.num_lives}"

    def report(self, number: float) -> HostReport:
        return HostReport(
            self.name, self.life, self.epoch, self.controller, self.changes, number, node="n", address="10.0.0.1",
            device_memory=self.pages * MIB, page_size=MIB, models=dict(self.models),
            labels=self.labels,
        )  # fmt: skip

    def order(self, order: Order) -> int:
        if order.epoch < self.epoch or (order.epoch == self.epoch and order.controller != self.controller):
            raise StaleEpochError("stale")
        self.epoch, self.controller = order.epoch, order.controller
        name = order.deployment.name
        if order.action == "add":
            if name in self.refuses:
                raise self.refuses[name]
            self.models[name] = HostedReport(order.deployment.version)
        else:
            del self.models[name]
        self.changes += 1
        return self.changes


class Rig:
    """A controller, its hosts, and a server that joins engines that serve and leaves them when asked."""

    def __init__(
        self,
        *hosts: MemoryHost,
        replicas: int = 1,
        snapshot: dict[str, Any] | None = None,
        placement: Placement | None = None,
        models: Sequence[Deployment] = (),
        max_loaded: int | None = None,
        period_s: float = math.inf,
    ) -> None:
        """`tick` is expected every `period_s`."""
        self.now_s = 100.0
        self.period_s = period_s
        self.placement = placement
        self.max_loaded = max_loaded
        self.hosts = {host.name: host for host in hosts}
        self.replicas = replicas
        self.control = self.controller(snapshot, "first", num_hosts=len(hosts), models=models)

    def controller(
        self, snapshot: dict[str, Any] | None, identity: str, num_hosts: int = 0, models: Sequence[Deployment] = ()
    ) -> Reconciler:
        return Reconciler(
            self.placement or KeepReplicas(self.replicas), host_timeout_s=5.0, now_s=self.now_s, snapshot=snapshot,
            identity=identity, num_hosts=num_hosts, models=models, wall_clock=lambda: self.now_s,
            max_loaded=self.max_loaded, period_s=self.period_s,
        )  # fmt: skip

    def replace_controller(self, snapshot: dict[str, Any] | None, identity: str = "second") -> Reconciler:
        """The next controller, which finds what was wanted, and the server that joins it; returns the one before."""
        old = self.control
        self.control = self.controller(snapshot, identity, models=old.models.kept)
        for peer in old.peers:
            self.control.join(peer, self.now_s)
        return old

    def want(self, models: Sequence[Deployment]) -> None:
        """A pool that begins with these, and a server of it."""
        self.control.models.update({model.name: model for model in models})
        self.control.models.revision = max((model.version for model in models), default=1)
        self.control.join(FRONT, self.now_s)

    def period(self, *, frontend: bool = True) -> None:
        """One period: reports, decisions, orders, and what the server does about the view."""
        self.now_s += 0.5
        for peer in self.control.peers:
            self.control.peers.beat(peer.name, self.now_s)
        for host in self.hosts.values():
            self.control.host_reported(host.report(self.now_s), self.now_s)
        for order in self.control.tick(self.now_s):
            self.carry_out(order)
        for (model, host), seat in list(self.control.seats.items()):
            if frontend and seat.state is SeatState.SERVING:
                self.control.seats.joined("front", model, host, seat.life)
            elif frontend and seat.state is SeatState.LEAVING:
                self.control.seats.left("front", model, host, seat.life)
        self.control.check()

    def carry_out(self, order: Order) -> None:
        try:
            changes, error = self.hosts[order.host].order(order), None
        except Exception as raised:
            changes, error = 0, raised
        self.control.order_done(order, error, self.now_s, changes)

    def settle(self, periods: int = 6) -> None:
        for _ in range(periods):
            self.period()

    def loaded(self) -> dict[str, list[str]]:
        return {name: sorted(host.models) for name, host in self.hosts.items()}

    def actions(self) -> list[str]:
        return [decision["action"] for decision in self.control.log.last()]


def deployment(name: str, mib: int = 4, version: int = 1) -> Deployment:
    return Deployment(name, version, weight_bytes=mib * MIB)


def attached(rig: Rig, *models: Deployment) -> Rig:
    rig.want(models)
    rig.settle()
    return rig


def test_models_are_spread_and_served():
    """Four equal models on two hosts: two each, all serving, and each step of it is in the log."""
    rig = attached(Rig(MemoryHost("h0"), MemoryHost("h1")), *(deployment(n) for n in "abcd"))

    assert {name: len(models) for name, models in rig.loaded().items()} == {"h0": 2, "h1": 2}
    assert {seat.state for seat in rig.control.seats.values()} == {SeatState.SERVING}
    assert rig.actions().count("add") == rig.actions().count("model_added") == 4


def test_a_new_pool_waits_for_its_hosts():
    """The first host to come does not get every model while another one is still starting."""
    rig = Rig(MemoryHost("h0"), MemoryHost("h1"))
    rig.want([deployment("a"), deployment("b")])
    late = rig.hosts.pop("h1")
    rig.settle()
    assert rig.loaded() == {"h0": []}

    rig.hosts["h1"] = late
    rig.settle()
    assert rig.loaded() == {"h0": ["a"], "h1": ["b"]}


def test_models_are_loaded_without_any_server():
    """Hosts need none for that: a pool whose servers all died loads what a dead host had."""
    rig = attached(Rig(MemoryHost("h0"), MemoryHost("h1")), deployment("a"), deployment("b"))
    rig.control.leave("front", rig.now_s)
    rig.hosts["h0"].start()
    rig.settle()

    assert sorted(name for models in rig.loaded().values() for name in models) == ["a", "b"]


def test_models_of_a_dead_host_go_to_others():
    """A lost host's models are placed on the hosts that are left, and its seats are gone at once."""
    rig = attached(Rig(MemoryHost("h0"), MemoryHost("h1")), deployment("a"), deployment("b"))
    dead = rig.hosts.pop("h0")
    rig.control.host_lost("h0", "killed")
    assert [host for _, host in rig.control.seats] == ["h1"]

    rig.settle()

    assert rig.loaded() == {"h1": ["a", "b"]}
    assert dead.name not in rig.control.view().hosts


def test_a_host_that_says_nothing_is_lost():
    """Without a word for the timeout a host counts as lost."""
    rig = attached(Rig(MemoryHost("h0"), MemoryHost("h1")), deployment("a"), deployment("b"))
    rig.hosts.pop("h0")
    rig.settle(20)

    assert "host_lost" in rig.actions()
    assert rig.loaded() == {"h1": ["a", "b"]}


def test_a_restarted_host_process_is_a_new_life():
    """A host that comes back with a new process lost its models, even if nobody saw it die."""
    rig = attached(Rig(MemoryHost("h0")), deployment("a"))
    rig.hosts["h0"].start()
    rig.settle()

    assert rig.loaded() == {"h0": ["a"]}
    assert [seat.life for seat in rig.control.seats.values()] == ["h0-2"]


def test_a_new_controller_takes_over_what_hosts_have():
    """After a restart nothing is loaded twice, nothing moves, and the epoch is a new one."""
    rig = attached(Rig(MemoryHost("h0"), MemoryHost("h1")), deployment("a"), deployment("b"))
    before, old = rig.loaded(), rig.replace_controller(rig.control.snapshot())
    rig.settle()

    assert rig.loaded() == before
    assert rig.control.epoch == old.epoch + 1
    assert "add" not in rig.actions() and rig.actions().count("adopted") == 2


@pytest.mark.parametrize("snapshot", ["kept", "lost"])
def test_orders_of_a_replaced_controller_are_refused(snapshot):
    """Whoever was replaced cannot change anything, whether or not the new controller found the snapshot."""
    rig = attached(Rig(MemoryHost("h0")), deployment("a"))
    old = rig.replace_controller(rig.control.snapshot() if snapshot == "kept" else {})
    rig.control.deploy(deployment("b"))
    rig.settle()
    assert rig.loaded() == {"h0": ["a", "b"]}

    late = Order(old.epoch, old.identity, "h0", "h0-1", "remove", deployment("a"))
    with pytest.raises(StaleEpochError):
        rig.hosts["h0"].order(late)


def test_roles_reach_frontends_and_the_next_controller():
    """A decided role is logged with its reason, is in the view, and outlives the controller that decided it."""
    rig = Rig(MemoryHost("h0"), MemoryHost("h1"))
    rig.control._placement = LivePlacement(LiveCapacity(), 1, num_prefill=1)
    attached(rig, deployment("a"))
    roles = {"h0": Role.PREFILL, "h1": Role.DECODE}
    snapshot = json.loads(json.dumps(rig.control.snapshot()))

    assert rig.control.view().roles == roles
    assert rig.loaded() == {"h0": ["a"], "h1": ["a"]}
    logged = [decision for decision in rig.control.log.last() if decision["action"] == "role"]
    assert [decision["host"] for decision in logged] == ["h0", "h1"] and all(d["reason"] for d in logged)
    rig.replace_controller(snapshot)
    rig.settle()
    assert rig.control.view().roles == roles


def test_a_new_controller_decides_without_hosts_that_died_with_the_old_one():
    """It waits for the hosts that its predecessor knew, but not for ever."""
    rig = attached(Rig(MemoryHost("h0"), MemoryHost("h1")), deployment("a"), deployment("b"))
    rig.hosts.pop("h0")
    rig.replace_controller(rig.control.snapshot())
    rig.period()
    assert rig.loaded() == {"h1": ["b"]}

    rig.settle(12)
    assert rig.loaded() == {"h1": ["a", "b"]}


def test_a_model_that_is_not_wanted_is_left_then_unloaded():
    """A withdrawn model goes from its host only after the server has left it."""
    rig = attached(Rig(MemoryHost("h0")), deployment("a"), deployment("b"))
    rig.control.withdraw("a")
    rig.period(frontend=False)
    assert rig.loaded() == {"h0": ["a", "b"]}
    assert rig.control.seats["a", "h0"].state is SeatState.LEAVING

    rig.settle()
    assert rig.loaded() == {"h0": ["b"]}
    assert "a" not in rig.control.view().models


def test_another_version_replaces_a_model():
    """A name that is deployed again after it was withdrawn is another model: the old one is unloaded first."""
    rig = attached(Rig(MemoryHost("h0")), deployment("a"))
    rig.control.withdraw("a")
    version = rig.control.deploy(deployment("a"))
    rig.settle(10)

    assert rig.hosts["h0"].models["a"].version == version == 3
    assert rig.actions().count("model_removed") == 1


def test_a_refused_model_is_tried_elsewhere_and_not_at_once_again():
    """A host that cannot load a model is barred for it; another one gets it. The error is there for who asked."""
    rig = Rig(MemoryHost("h0"), MemoryHost("h1"))
    rig.hosts["h0"].refuses["a"] = CapacityError("no room")
    rig.want([deployment("a")])
    rig.period()
    assert str(rig.control.view().models["a"].error) == "no room"

    rig.settle()
    assert rig.loaded() == {"h0": [], "h1": ["a"]}
    assert rig.control.view().models["a"].error is None
    assert rig.actions().count("add_failed") == 1


def test_models_go_where_they_fit():
    """A model goes to a host whose budget holds it; one that fits nowhere waits."""
    hosts = MemoryHost("h0", pages=16), MemoryHost("h1", pages=60)
    rig = attached(Rig(*hosts), deployment("a", 40), deployment("b", 20))

    assert rig.loaded() == {"h0": [], "h1": ["a"]}
    assert "no host has room" in str(rig.control.view().models["b"].error)


def test_an_old_report_brings_nothing_back():
    """A report from before an order was done does not revive the model that the order removed."""
    rig = attached(Rig(MemoryHost("h0")), deployment("a"))
    old = rig.hosts["h0"].report(rig.now_s + 0.1)
    rig.control.withdraw("a")
    rig.settle()
    rig.control.host_reported(replace(old, number=rig.now_s + 0.2), rig.now_s + 0.2)

    assert rig.control.seats == {}


def removing(rig: Rig) -> list[Order]:
    """The orders of one look at a rig whose only model is not wanted any more and was left by the server."""
    rig.control.withdraw("a")
    rig.control.tick(rig.now_s)
    rig.control.seats.left("front", "a", "h0", "h0-1")
    return rig.control.tick(rig.now_s)


def test_a_remove_that_fails_is_ordered_again_after_longer_and_longer_waits():
    """However often it is looked at, a host gets one order per wait, and the log one line."""
    rig = attached(Rig(MemoryHost("h0")), deployment("a"))
    orders, times_s = removing(rig), []
    start_s = rig.now_s
    while rig.now_s < start_s + 100:
        for order in orders:
            times_s.append(rig.now_s - start_s)
            rig.control.order_done(order, HostError("model 'a' still has requests"), rig.now_s)
            orders = rig.control.tick(rig.now_s)
            assert [] == orders, "at once"
        rig.now_s += 0.5
        rig.control.host_reported(rig.hosts["h0"].report(rig.now_s), rig.now_s)
        orders = rig.control.tick(rig.now_s)
    assert [0.0, 2.0, 7.0, 22.0, 82.0] == times_s
    assert 5 == rig.actions().count("remove_failed")

    rig.now_s += 60
    rig.settle()
    assert rig.loaded() == {"h0": []}


@pytest.mark.parametrize("action", ["add", "remove"])
def test_an_order_without_an_answer_ends(action: str):
    """A seat does not wait for ever: it is given up, told again later, and taken as it is once the host has it."""
    rig = Rig(MemoryHost("h0"))
    rig.control._order_limit_s = 30.0
    orders: list[Order] = []
    if action == "add":
        rig.want([deployment("a")])
        rig.carry_out = orders.append  # type: ignore[method-assign]
    else:
        attached(rig, deployment("a"))
        rig.carry_out = orders.append  # type: ignore[method-assign]
        orders += removing(rig)
    rig.settle(2 * 29)
    assert [action] == [order.action for order in orders]
    assert [SeatState.LOADING if action == "add" else SeatState.REMOVING] == [
        seat.state for seat in rig.control.seats.values()
    ]
    rig.settle(2 * 5)
    assert [action, action] == [order.action for order in orders]
    assert "has not answered" in next(d["reason"] for d in rig.control.log.last() if d["action"] == f"{action}_failed")

    rig.hosts["h0"].order(orders[0])
    rig.control.order_done(orders[0], None, rig.now_s, 1)
    rig.settle()
    assert rig.loaded() == {"h0": ["a"] if action == "add" else []}
    states = [seat.state for seat in rig.control.seats.values()]
    assert ([SeatState.SERVING] if action == "add" else []) == states


def test_a_seat_that_serves_is_bound_by_no_order():
    """The limit is for answers: what was answered stays, however long."""
    rig = attached(Rig(MemoryHost("h0")), deployment("a"))
    rig.control._order_limit_s = 1.0
    rig.settle(10)
    assert [SeatState.SERVING] == [seat.state for seat in rig.control.seats.values()]
    assert "remove_failed" not in rig.actions() and "add_failed" not in rig.actions()


def test_a_host_that_is_overdue_is_told_of_until_it_is_not():
    """The view names hosts that nobody should count on; frontends get another view at each change, not in between."""
    rig = attached(Rig(MemoryHost("h0")), deployment("a"))
    report, versions = rig.hosts["h0"].report, []
    for overdue in ("no pulse for 6.0 s", "no pulse for 7.0 s", ""):
        rig.now_s += 0.5
        rig.control.host_reported(replace(report(rig.now_s), overdue=overdue), rig.now_s)
        versions.append((rig.control.version, set(rig.control.view().overdue)))
    assert [{"h0"}, {"h0"}, set()] == [hosts for _, hosts in versions]
    assert versions[0][0] == versions[1][0] < versions[2][0]
    assert ["host_overdue", "host_in_time"] == [a for a in rig.actions() if a in ("host_overdue", "host_in_time")]


def test_an_overtaken_report_is_ignored():
    """A report of an earlier life that arrives late does not end the present one."""
    rig = attached(Rig(MemoryHost("h0")), deployment("a"))
    old = rig.hosts["h0"].report(rig.now_s)
    rig.hosts["h0"].start()
    rig.settle()
    rig.control.host_reported(old, rig.now_s)

    assert rig.control.view().hosts == {"h0": "h0-2"}
    assert [seat.state for seat in rig.control.seats.values()] == [SeatState.SERVING]


def test_replicas_are_kept_and_restored():
    """Each model is on two hosts; when one of three dies, the third one takes over."""
    hosts = [MemoryHost(f"h{i}") for i in range(3)]
    rig = attached(Rig(*hosts, replicas=2), deployment("a"))
    assert sum(map(len, rig.loaded().values())) == 2

    name = next(name for name, models in rig.loaded().items() if models)
    rig.hosts.pop(name)
    rig.control.host_lost(name, "killed")
    rig.settle()
    assert sum(map(len, rig.loaded().values())) == 2
