# SPDX-License-Identifier: Apache-2.0
"""Which orders a host's supervisor carries out, and what it does about a host that hangs.

The host process is a recording of its control calls, or a stand-in that can be stopped and wedged.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.helpers.server import REPOSITORY, poll
from tokenpool.cluster.host_supervisor import HostSupervisor
from tokenpool.cluster.values import Deployment, Order, StaleEpochError
from tokenpool.errors import HostError
from tokenpool.process.template import Template

pytestmark = pytest.mark.cpu

HOST = (sys.executable, "-m", "tests.helpers.pulsing_host")


class Recorded(HostSupervisor):
    """A supervisor whose host process is there, in the life `life`, and answers every call."""

    def __init__(self, life: str = "x") -> None:
        super().__init__("h0", {"device_memory": 64, "page_size": 1}, lambda report: None)
        self._life = life
        self.calls: list[tuple[Any, ...]] = []

    def call(self, method: str, *args: Any) -> Any:
        self.calls.append((method, *args))


def order(epoch: int, action: str = "add", *, controller: str = "c1", life: str = "x", version: int = 1) -> Order:
    return Order(epoch, controller, "h0", life, action, Deployment("a", version, payload=b"spec"))


def test_orders_reach_the_host_once():
    """A model is added and removed; an order for what is so already does nothing and succeeds."""
    host = Recorded()
    counts = [host.order(order(1, action)) for action in ("add", "add", "remove", "remove")]

    assert [call[0] for call in host.calls] == ["add_packed", "remove_model"]
    assert counts == [1, 1, 2, 2]
    assert host.report().models == {}


def test_a_model_is_reported_with_its_version():
    """What a new controller needs to take a model over is in the report."""
    host = Recorded()
    host.order(order(3, version=7))
    report = host.report()

    assert (report.epoch, report.controller, report.changes) == (3, "c1", 1)
    assert report.models["a"].version == 7
    assert host.calls == [("add_packed", b"spec", "", "", b"")], "no server is named to the host"


def test_what_a_host_is_loading_is_reported():
    """A new controller goes on with it instead of having it loaded elsewhere."""
    host, seen = Recorded(), []
    call = host.call
    host.call = lambda *args: (seen.append(host.report().building), call(*args))
    host.order(order(3, version=7))

    assert seen == [("a", 7)] and host.report().building is None


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


def test_reports_are_in_order_whatever_the_clock_of_the_node_says(monkeypatch: pytest.MonkeyPatch):
    """Of two reports of a node the later one has the larger number, also when the supervisor was started anew."""
    monkeypatch.setattr(time, "time", lambda: -time.monotonic())
    first = Recorded()
    numbers = [first.report().number, first.report().number, Recorded().report().number]
    assert sorted(set(numbers)) == numbers


class Guarded(HostSupervisor):
    """A supervisor of stand-in hosts, with a short limit."""

    def __init__(self, template: Template | None = None) -> None:
        config = {"device_memory": 64, "page_size": 1, "host_timeout_s": 3.0}
        env = {"PYTHONPATH": str(REPOSITORY)}
        super().__init__("h0", config, lambda report: None, period_s=0.05, env=env, template=template)

    def _command(self, control: str, key: bytes) -> list[str]:
        return [*HOST, control]


@pytest.fixture(params=[pytest.param("spawned", marks=pytest.mark.slow), "forked"])
def guarded(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Guarded]:
    """Its hosts are spawned, or forked from a template."""
    monkeypatch.chdir(REPOSITORY)
    template = Template(HOST) if request.param == "forked" else None
    made = Guarded(template)
    made.start()
    poll(lambda: made.report().life)
    assert template is None or "ready" == template.snapshot()["state"]
    yield made
    made.stop(0.0)


def stop(host: Guarded) -> None:
    os.kill(host.report().pid, signal.SIGSTOP)


def wedge(host: Guarded) -> None:
    host.call("wedge")


@pytest.mark.parametrize("hang", [stop, wedge])
def test_a_host_that_hangs_is_told_of_and_then_replaced(guarded: Guarded, hang: Callable[[Guarded], None]) -> None:
    """Reports say that it is overdue, then a new life begins; scrapes have the age of its pulse all the time."""
    before = guarded.report()
    assert ("a 1.0" in guarded.call("metrics"), before.overdue) == (True, "")
    hang(guarded)
    overdue = poll(guarded.report, until=lambda report: bool(report.overdue))
    assert overdue.life == before.life
    scraped = guarded.call("metrics")
    assert "tokenpool:host_pulse_age_seconds " in scraped and "a 1.0" not in scraped
    with pytest.raises(HostError, match=r"h0: (no pulse|in step of llama) for"):
        guarded.call("state")
    after = poll(guarded.report, until=lambda report: report.life not in ("", before.life))
    assert (after.pid != before.pid, after.overdue, after.models) == (True, "", {})


def test_an_order_ends_with_the_host_that_hangs(guarded: Guarded) -> None:
    """An order that a host never answers fails once the host was killed, and holds up none for the next life."""
    life, errors = guarded.report().life, []
    guarded.order(order(1, life=life))
    guarded.call("wedge")

    def remove() -> None:
        try:
            guarded.order(order(1, "remove", life=life))
        except HostError as error:
            errors.append(error)

    ordering = threading.Thread(target=remove, daemon=True)
    ordering.start()
    ordering.join(30)
    assert 1 == len(errors)
    after = poll(guarded.report, until=lambda report: report.life not in ("", life))
    assert 1 == guarded.order(order(1, life=after.life))
    assert {"a"} == set(guarded.report().models)
