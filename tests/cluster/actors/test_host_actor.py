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
