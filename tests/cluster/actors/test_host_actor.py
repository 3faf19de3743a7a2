# SPDX-License-Identifier: Apache-2.0
"""What the actor around a host answers while other calls of it wait, for a host or for the actor's end."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import pytest

from bench.parts.ray_nodes import ENV
from tests.helpers.server import REPOSITORY, WAIT_LIMIT_S
from tokenpool.cluster.host_actor import End, HostActor

pytestmark = pytest.mark.ray


class StandInSupervisor:
    """Carries out one order, and no further one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def order(self, order: Any) -> int:
        with self._lock:
            threading.Event().wait()
        return 1

    def call(self, method: str, *args: Any) -> str:
        return f"{method} is answered"

    def stop(self, limit_s: float) -> None: ...


class StandInHost(HostActor):
    """Has a stand-in for its supervisor."""

    def __init__(self, *_: Any) -> None:
        self._supervisor, self._end = StandInSupervisor(), End()  # type: ignore[assignment]


_BUSY = """
import ray
from tests.cluster.actors.test_host_actor import StandInHost
from tokenpool.cluster import host_actors
from tokenpool.cluster.pool_record import PoolRecord
from tokenpool.cluster_config import ClusterConfig

ray.init(address="local", namespace="pool", num_cpus=1, object_store_memory=80 << 20, include_dashboard=False)
host_actors.HostActor = StandInHost
host = host_actors.HostActors(PoolRecord("p", ClusterConfig(hosts=1), {}), "pool")._make("host-0", (), None)
orders, holds = zip(*[(host.order.remote(None), host.hold.remote()) for _ in range(100)])
print(ray.get(host.call.remote("attach_at"), timeout=60))
ended, waiting = ray.wait(list(holds), num_returns=99, timeout=60)
ray.get(host.stop.remote(0.0), timeout=60)
print(ray.get(ended).count(True), ray.get(waiting), "have seen the end")
"""


def test_a_host_with_many_orders_and_former_controllers_answers() -> None:
    """A hundred models that it is to load one after the other, which takes for ever, and as many controllers."""
    pytest.importorskip("ray")
    done = subprocess.run(
        [sys.executable, "-c", _BUSY], cwd=REPOSITORY, env={**os.environ, **ENV, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=4 * WAIT_LIMIT_S,
    )  # fmt: skip
    assert done.stdout.splitlines()[-2:] == ["attach_at is answered", "0 [True] have seen the end"], done.stderr[-2000:]


_KILLED = """
import asyncio, ray
from tests.cluster.actors.test_host_actor import StandInHost
from tokenpool.cluster import host_actors
from tokenpool.cluster.pool_record import CONTROLLER, PoolRecord
from tokenpool.cluster.session import Session
from tokenpool.cluster_config import ClusterConfig
from tokenpool.host_kinds import ANY
from tokenpool.serve.clustered.host_questions import HostQuestions

ray.init(address="local", namespace="tokenpool-a", num_cpus=2, object_store_memory=80 << 20, include_dashboard=False)
host_actors.HostActor = StandInHost
made = ray.remote(concurrency_groups=host_actors.THREADS)(StandInHost)
controller = made.options(name=CONTROLLER, num_cpus=0).remote()
hosts = host_actors.HostActors(PoolRecord("p", ClusterConfig(hosts=3), {}), "tokenpool-a")
wanted = {"host-0": ANY, "host-1": ANY, "host-2": ("gpu=none",)}
hosts.start_missing(wanted)
first = dict(hosts._made)
calls = {host.call.remote("attach_at"): name for name, host in first.items()}
running = [calls[answer] for answer in ray.wait(list(calls), num_returns=2, timeout=60)[0]]
print(len(running), "of", len(first), "have a node")

async def ask(times):
    for _ in range(times):
        print((await asyncio.gather(asking.ask_one(running[0], "attach_at"), return_exceptions=True))[0])

asking, loop = HostQuestions(Session(ClusterConfig(name="a"), owns_ray=True)), asyncio.new_event_loop()
loop.run_until_complete(ask(1))
ray.kill(first[running[0]], no_restart=True)
while running[0] in [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]:
    pass
hosts.start_missing(wanted)
print([name for name, host in hosts._made.items() if host is not first[name]] == running[:1])
loop.run_until_complete(ask(2))
"""


def test_a_host_that_was_killed_for_good_is_made_anew() -> None:
    """Ray restarts it no more, so the pool would have one host less for ever; one that Ray has no room for stays.

    A server that has asked the first one finds the other one.
    """
    pytest.importorskip("ray")
    done = subprocess.run(
        [sys.executable, "-c", _KILLED], cwd=REPOSITORY, env={**os.environ, **ENV, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=4 * WAIT_LIMIT_S,
    )  # fmt: skip
    told = done.stdout.splitlines()
    assert told[:3] == ["2 of 3 have a node", "attach_at is answered", "True"], done.stderr[-2000:]
    assert told[3].endswith("does not answer attach_at: ActorDiedError") and told[4] == told[1]
