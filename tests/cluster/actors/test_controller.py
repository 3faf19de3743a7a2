# SPDX-License-Identifier: Apache-2.0
"""Actors of a pool where Ray's head is away at a bad moment, or the next controller is on another node. Without Ray."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.server import WAIT_LIMIT_S, poll
from tokenpool.cluster import controller, host_actor, host_actors, raylet
from tokenpool.cluster.controller import Controller
from tokenpool.cluster.host_actor import End, HostActor
from tokenpool.cluster.host_actors import HostActors
from tokenpool.cluster.pool_record import PoolRecord, PoolStore
from tokenpool.cluster.values import HostReport
from tokenpool.cluster_config import ClusterConfig
from tokenpool.errors import PoolError

pytestmark = pytest.mark.cpu


class Ended(BaseException):
    """The process has ended."""


class StandInContext:
    """What Ray says of an actor."""

    gcs_address, namespace = "10.0.0.1:6379", "pool"

    def __init__(self, is_restarted: bool = False) -> None:
        self.was_current_actor_reconstructed = is_restarted

    def get_node_id(self) -> str:
        return "node"

    def get_node_labels(self) -> dict[str, str]:
        return {}


RECORD = PoolRecord("pool-1", ClusterConfig(hosts=1), {"device_memory": 64, "page_size": 1})
OTHER = replace(RECORD, identity="pool-2")
"""Of a pool that was started later, with the same name."""


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Controller]:
    """Starts a controller on a node; all of them have one store."""
    kept: dict[str, Any] = {f"record-{record.identity}": record for record in (RECORD, OTHER)}
    monkeypatch.setattr(PoolStore, "_get", lambda self, name: kept.get(name))
    monkeypatch.setattr(PoolStore, "_put", lambda self, name, value: kept.update({name: value}))
    for module in (controller, host_actor):
        monkeypatch.setattr(module, "log_to_stderr", lambda: None)
        monkeypatch.setattr(module, "end_with_raylet", lambda: None)

    def started(node: str = "a", is_restarted: bool = False, record: PoolRecord = RECORD) -> Controller:
        context = StandInContext(is_restarted)
        monkeypatch.setattr(controller, "ray", SimpleNamespace(get_runtime_context=lambda: context))
        monkeypatch.setattr(controller, "snapshot_path", lambda *_: tmp_path / node / "snapshot.json")
        return Controller(record.identity, "pool")

    return started


def test_a_host_is_drained_for_the_next_controller_on_whatever_node(start: Callable[..., Controller]) -> None:
    """Also on one that has the snapshot of an earlier controller, of a time at which the host was drained."""
    report = HostReport("host-0", "life", 0, device_memory=64)

    async def main() -> list[set[str]]:
        found = []
        for node, is_wanted in (("a", True), ("b", False), ("a", True)):
            control = start(node, is_restarted=bool(found))
            found.append(set(control.reconciler.draining))
            control.reconciler.host_reported(report, 1.0)
            await control.drain("host-0", is_wanted)
        return found

    assert asyncio.run(asyncio.wait_for(main(), WAIT_LIMIT_S)) == [set(), {"host-0"}, set()]


@pytest.mark.parametrize("is_kept", [True, False], ids=["kept by Ray", "a file of the node"])
def test_a_controller_takes_nothing_from_an_earlier_pool_of_its_name(
    is_kept: bool, start: Callable[..., Controller], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose controller was killed, or was on another node when it ended: what it had says nothing of this one."""
    if not is_kept:
        monkeypatch.setattr(PoolStore, "write", lambda *_: None)

    async def main() -> list[Controller]:
        first = start()
        first.reconciler.host_reported(HostReport("host-0", "life", 0, device_memory=64), 1.0)
        await first.drain("host-0", True)
        return [start(is_restarted=True), start(is_restarted=True, record=OTHER)]

    own, other = asyncio.run(asyncio.wait_for(main(), WAIT_LIMIT_S))
    assert (own.reconciler.draining, own.reconciler.epoch) == ({"host-0"}, 2)
    assert (other.reconciler.draining, other.reconciler.epoch) == (set(), 1)


@pytest.fixture
def is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of this process is an exception, at once."""

    def end(status: int) -> None:
        raise Ended

    monkeypatch.setattr(raylet.os, "_exit", end)
    monkeypatch.setattr(raylet, "_AGAIN_S", 0.0)


@pytest.mark.usefixtures("is_ended")
@pytest.mark.parametrize("kind", [Controller, HostActor])
def test_an_actor_that_cannot_begin_is_started_again(
    kind: type, start: Callable[..., Controller], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process ends: to Ray an actor whose start raises is dead for good."""

    def get(self: PoolStore, name: str) -> None:
        raise ConnectionError("the head is away")

    monkeypatch.setattr(PoolStore, "_get", get)
    fake = SimpleNamespace(
        get_runtime_context=StandInContext, util=SimpleNamespace(get_node_ip_address=lambda: "10.0.0.2")
    )
    monkeypatch.setattr(host_actor, "ray", fake)
    with pytest.raises(Ended):
        start() if kind is Controller else HostActor("host-0", RECORD.host_config, None, 1.0, {}, False, False)


@pytest.mark.usefixtures("is_ended")
def test_a_controller_without_a_record_is_not_started_again(
    start: Callable[..., Controller], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool has ended meanwhile: another start would find no more."""
    monkeypatch.setattr(PoolStore, "_get", lambda self, name: None)
    with pytest.raises(PoolError, match="tokenpool down"):
        start(is_restarted=True)


def test_a_controller_whose_pool_has_ended_ends_once_rays_head_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would be there for ever, and neither end by `tokenpool down` nor let another pool of its name begin."""
    answers = iter([TimeoutError("the head is away")] * 3)

    def get_actor(name: str, namespace: str) -> str:
        if (error := next(answers, None)) is not None:
            raise error
        return f"{namespace}/{name}"

    def kill(actor: str, no_restart: bool) -> None:
        assert (actor, no_restart) == ("pool/controller", True)
        raise Ended

    monkeypatch.setattr(host_actors, "ray", SimpleNamespace(get_actor=get_actor, kill=kill))
    monkeypatch.setattr(host_actors, "_RETRY_S", 0.0)
    with pytest.raises(Ended):
        HostActors(RECORD, "pool").end_controller()
    assert next(answers, None) is None


def test_only_the_last_one_waits_for_the_end_of_an_actor() -> None:
    """A hundred controllers, one after the other, leave no thread behind; the last one learns that the actor stops."""
    end, told = End(), list[bool]()
    waiting = [threading.Thread(target=lambda: told.append(end.wait()), daemon=True) for _ in range(100)]
    for count, thread in enumerate(waiting):
        thread.start()
        poll(lambda: len(told), until=lambda number: number == count)  # noqa: B023
    end.come()
    for thread in waiting:
        thread.join(WAIT_LIMIT_S)
    assert told == [False] * 99 + [True]
    assert end.wait(), "it has come"
