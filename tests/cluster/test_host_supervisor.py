# SPDX-License-Identifier: Apache-2.0
"""Which orders a host's supervisor carries out; the host process is a recording of its control calls."""

from __future__ import annotations

from typing import Any

import pytest

from tokenpool.cluster.host_supervisor import HostSupervisor
from tokenpool.cluster.values import Deployment, Endpoints, Order, StaleEpochError
from tokenpool.errors import HostError

pytestmark = pytest.mark.cpu

ENDPOINTS = Endpoints("ipc://in", "ipc://out")


class Recorded(HostSupervisor):
    """A supervisor whose host process is there, in the life `life`, and answers every call."""

    def __init__(self, life: str = "x") -> None:
        super().__init__("h0", {"device_memory": 64, "page_size": 1}, lambda report: None)
        self._life = life
        self.calls: list[tuple[Any, ...]] = []

    def call(self, method: str, *args: Any) -> Any:
        self.calls.append((method, *args))


def order(epoch: int, action: str = "add", *, controller: str = "c1", life: str = "x", version: int = 1) -> Order:
    return Order(epoch, controller, "h0", life, action, Deployment("a", version, payload=b"spec"), ENDPOINTS)


def test_orders_reach_the_host_once():
    """A model is added and removed; an order for what is so already does nothing and succeeds."""
    host = Recorded()
    counts = [host.order(order(1, action)) for action in ("add", "add", "remove", "remove")]

    assert [call[0] for call in host.calls] == ["add_packed", "remove_model"]
    assert counts == [1, 1, 2, 2]
    assert host.report().models == {}


def test_a_model_is_reported_with_its_endpoints():
    """What a new controller needs to take a model over is in the report."""
    host = Recorded()
    host.order(order(3))
    report = host.report()

    assert (report.epoch, report.controller, report.changes) == (3, "c1", 1)
    assert report.models["a"].endpoints == ENDPOINTS


@pytest.mark.parametrize("late", [order(1, "remove"), order(2, "remove", controller="c0")])
def test_orders_of_another_controller_are_refused(late):
    """An older epoch is refused, and another controller of the same epoch."""
    host = Recorded()
    host.order(order(2))

    with pytest.raises(StaleEpochError):
        host.order(late)
    assert [call[0] for call in host.calls] == ["add_packed"]


def test_an_order_for_an_earlier_process_is_refused():
    """What was meant for a process that died does not reach its successor."""
    host = Recorded(life="y")

    with pytest.raises(HostError, match="new process"):
        host.order(order(1, life="x"))
    assert host.calls == []
