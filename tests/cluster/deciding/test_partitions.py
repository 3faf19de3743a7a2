# SPDX-License-Identifier: Apache-2.0
"""Hosts whose nodes are cut off, in memory: Ray starts them anew elsewhere while the first ones still run.

What is tried on real networks is in test_separate_machines.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cluster.deciding.test_reconcile import MemoryHost, Rig, deployment
from tokenpool.cluster.values import HostReport, Order

pytestmark = pytest.mark.cpu

NAMES = ("h0", "h1", "h2")


class NodeHost(MemoryHost):
    """A host on a node of its own, with a supervisor of its own."""

    num_made = 0

    def __init__(self, name: str) -> None:
        NodeHost.num_made += 1
        self.generation = NodeHost.num_made
        super().__init__(name)

    @property
    def life(self) -> str:
        return f"{self.generation}-{self.num_lives}"

    def report(self, number: float) -> HostReport:
        return replace(super().report(number), node=f"n{self.generation}", generation=self.generation)


class PartedRig(Rig):
    """Nothing reaches hosts that are cut off, and nothing comes from them; of their former selves a report may come."""

    def __init__(self, replicas: int) -> None:
        self.cut: set[str] = set()
        self.former: list[NodeHost] = []
        super().__init__(*map(NodeHost, NAMES), replicas=replicas)

    def period(self, **options: Any) -> None:
        hosts = self.hosts
        self.hosts = {name: host for name, host in hosts.items() if name not in self.cut}
        super().period(**options)
        heard = {name: host.life for name, host in self.hosts.items()}
        self.hosts = hosts
        lives = self.control.view().hosts
        assert {name: lives.get(name) for name in heard} == heard, "who reports is not who is shown"

    def carry_out(self, order: Order) -> None:
        if order.host in self.hosts:
            super().carry_out(order)

    def elsewhere(self, name: str) -> None:
        """Ray takes the node of a host that is cut off for dead."""
        if name in self.cut:
            self.former.append(self.hosts[name])  # type: ignore[arg-type]
            self.hosts[name] = NodeHost(name)
            self.cut.discard(name)

    def speak(self, index: int) -> None:
        """A former host has its network back and reports, before it ends."""
        if self.former:
            host = self.former[index % len(self.former)]
            self.control.host_reported(host.report(self.now_s + 1e6), self.now_s)


EVENTS = st.one_of(
    st.tuples(st.sampled_from(["cut", "heal", "elsewhere", "restart"]), st.sampled_from(NAMES)),
    st.tuples(st.sampled_from(["speak", "wait"]), st.integers(1, 14)),
    st.tuples(st.just("replace"), st.booleans()),
)


def test_only_a_host_that_fell_silent_is_shown_as_that() -> None:
    """Servers suspect the requests of one whose process ended, and of no other."""
    rig = PartedRig(1)
    rig.want([deployment("a")])
    rig.settle()
    rig.cut = {"h0"}
    rig.hosts["h1"].start()
    rig.settle(14)
    view = rig.control.view()
    assert (view.models["a"].silent, "h0" in view.hosts) == ({"h0"}, False)
    rig.cut = set()
    rig.settle()
    assert rig.control.view().models["a"].silent == frozenset()


@settings(max_examples=150)
@given(st.integers(1, 2), st.lists(EVENTS, max_size=30))
def test_no_seat_has_two_owners(replicas: int, events: list[tuple[str, Any]]) -> None:
    """However nodes are cut off, replaced and healed: who is shown is who reports, and in the end all models serve."""
    rig = PartedRig(replicas)
    rig.want([deployment(name) for name in "ab"])
    rig.settle()
    for number, (event, what) in enumerate(events):
        if event == "cut":
            rig.cut.add(what)
        elif event == "heal":
            rig.cut.discard(what)
        elif event == "elsewhere":
            rig.elsewhere(what)
        elif event == "restart":
            rig.hosts[what].start()
        elif event == "replace":
            rig.replace_controller(rig.control.snapshot() if what else {}, f"c{number}")
        else:
            for _ in range(what):
                rig.speak(what) if event == "speak" else rig.period()
        rig.period()
    rig.cut, rig.former = set(), []
    rig.settle(60)
    seats = {pair: seat.life for pair, seat in rig.control.seats.items()}
    loaded = {(model, name): host.life for name, host in rig.hosts.items() for model in host.models}
    assert seats == loaded
    served = Counter(model for model, _ in seats)
    assert min(served["a"], served["b"]) >= replicas, "hosts that come back may bring more"
