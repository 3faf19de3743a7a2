# SPDX-License-Identifier: Apache-2.0
"""Hosts that come with requests and go without: Ray's own autoscaler, with nodes that are raylets of this machine.

The tests use one cluster and build on each other, in this order.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, cast

import httpx
import pytest

from bench.parts.ray_nodes import RayNodes
from tests.cluster.test_cluster_demand import states, waits_for_load_timeout
from tests.cluster.test_servers import BODY, Cluster, told
from tests.conftest import TinyModels
from tests.helpers.server import WAIT_LIMIT_S, PoolServerProcess, poll
from tokenpool.cluster import host_actors
from tokenpool.cluster.deciding.scaling import Scaling
from tokenpool.cluster.host_actors import HostActors
from tokenpool.cluster.host_keeper import HostKeeper
from tokenpool.cluster.pool_record import Kept, KeptWriter, PoolRecord
from tokenpool.cluster_config import ClusterConfig, HostRange
from tokenpool.host_kinds import ANY

pytestmark = pytest.mark.ray

COME_S = 4 * WAIT_LIMIT_S
"""For a node to come, and a host on it to import vLLM and load a model."""


def tokens(server: PoolServerProcess, model: str, **more: Any) -> list[int]:
    """An answer, however long its host takes to come."""
    answer = httpx.post(f"{server.base_url}/v1/completions", json=BODY | {"model": model} | more, timeout=COME_S)
    assert answer.status_code == 200, answer.text
    found: list[int] = answer.json()["choices"][0]["token_ids"]
    return found


def ask(server: PoolServerProcess, model: str) -> int:
    """The number of its tokens."""
    return len(tokens(server, model))


class Asker(threading.Thread):
    """Asks one request after the other while the block runs; all of them are to have the same answer."""

    def __init__(self, server: PoolServerProcess, model: str) -> None:
        super().__init__(daemon=True)
        self.answers: list[list[int]] = []
        self.problem: BaseException | None = None
        self._server, self._model = server, model
        self._over = threading.Event()

    def run(self) -> None:
        try:
            while not self._over.is_set():
                self.answers.append(tokens(self._server, self._model, max_tokens=400))
        except BaseException as error:
            self.problem = error

    def __enter__(self) -> Asker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join(2 * COME_S)


def host_count(server: PoolServerProcess) -> dict[str, Any]:
    """What the pool says of how many hosts there are to be."""
    found: dict[str, Any] = server.state()["cluster"]["host_count"]
    return found


def until_hosts(server: PoolServerProcess, names: Sequence[str]) -> None:
    """Wait until these hosts are there, and no other one is or is to be."""
    poll(
        lambda: [*server.state()["cluster"]["hosts"], *host_count(server)["pending"]],
        until=lambda hosts: hosts == [*names],
        limit_s=COME_S,
    )


@pytest.fixture(scope="module")
def cluster(tiny_models: TinyModels) -> Iterator[Cluster]:
    pytest.importorskip("ray")
    pool = {
        "models": [{"name": name, "model": str(tiny_models.path(name))} for name in ("llama", "qwen2")],
        "load": "on_demand",
        "device_memory": "32MiB",
        "host_memory": "128MiB",
        "page_size": "1MiB",
        "admin_key": "test-admin-key-0123",
        "cluster": {"hosts": {"min": 0, "max": 2}, "host_idle_after": "3s"},
    }
    with RayNodes(num_nodes=0, cpus_per_node=1, max_simulated=2) as nodes, ExitStack() as stack:
        yield Cluster(nodes, pool, stack)


@pytest.mark.slow
def test_without_a_node_requests_wait_for_load_timeout_and_the_pool_can_end(cluster: Cluster) -> None:
    """Nor does the autoscaler make one that would not do."""
    waits_for_load_timeout(cluster, num_nodes=1)


@pytest.mark.slow
def test_one_request_brings_a_host_which_goes_when_nobody_needs_it(cluster: Cluster) -> None:
    """From zero to one node by one held request; without requests the model is cold, the host and its node are gone."""
    server = cluster.serve()
    assert (states(server), cluster.nodes.count()) == ({"llama": "cold", "qwen2": "cold"}, 1)
    assert ask(server, "llama") == BODY["max_tokens"]
    assert cluster.nodes.count() == 2 and list(server.state()["cluster"]["hosts"]) == ["host-0"]
    poll(lambda: server.state()["cluster"]["hosts"], until=lambda hosts: hosts == {})
    poll(lambda: set(states(server).values()), until=lambda seen: seen == {"cold"})
    poll(cluster.nodes.count, until=lambda count: count == 1)
    assert server.request("GET", "/ready").status_code == 200
    assert "host_returned" in [d["action"] for d in server.admin("GET", "/decisions").json()["decisions"]]
    assert ask(server, "qwen2") == BODY["max_tokens"], "the next one is another host"
    assert list(server.state()["cluster"]["hosts"]) == ["host-1"]
    assert cluster.down() == "pool tokenpool has ended\n"


@pytest.mark.slow
def test_a_controller_dies_while_a_host_is_pending(cluster: Cluster) -> None:
    """The next one waits for the same host; the request that asked for it is answered, and no second host comes."""
    server = cluster.serve()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, server, "llama")
        poll(lambda: host_count(server)["pending"], until=lambda pending: pending == ["host-0"])
        before = told(server)
        os.kill(before["pid"], signal.SIGKILL)
        assert asked.result(COME_S) == BODY["max_tokens"]
    assert told(server)["epoch"] > before["epoch"] and before["hosts"] == {}
    assert list(server.state()["cluster"]["hosts"]) == ["host-0"] and cluster.nodes.count() == 2
    until_hosts(server, [])
    poll(cluster.nodes.count, until=lambda count: count == 1)
    assert cluster.down() == "pool tokenpool has ended\n"


@pytest.mark.slow
def test_a_controller_and_a_host_die_while_hosts_are_drained(cluster: Cluster) -> None:
    """Requests come all the time. Another host takes the place of each that is drained, whoever dies meanwhile; no name
    comes twice, all answers are the same, and in the end no host is left."""
    server = cluster.serve()
    expected = tokens(server, "llama", max_tokens=400)
    with Asker(server, "llama") as asker:
        assert server.admin("POST", "/hosts/host-0", {"draining": True}).status_code == 200
        poll(lambda: host_count(server)["pending"], until=lambda pending: pending == ["host-1"])
        before = told(server)
        os.kill(before["pid"], signal.SIGKILL)
        until_hosts(server, ["host-1"])
        after = told(server)
        assert after["epoch"] > before["epoch"]

        assert server.admin("POST", "/hosts/host-1", {"draining": True}).status_code == 200
        poll(lambda: host_count(server)["pending"], until=lambda pending: pending == ["host-2"])
        os.kill(after["hosts"]["host-1"]["pid"], signal.SIGKILL)
        until_hosts(server, ["host-2"])
    assert not asker.is_alive() and asker.problem is None and len(asker.answers) > 2
    assert asker.answers == [expected] * len(asker.answers)
    assert server.admin("POST", "/check").json() == {"ok": True}
    until_hosts(server, [])
    poll(cluster.nodes.count, until=lambda count: count == 1)
    assert cluster.down() == "pool tokenpool has ended\n"


class StandInActors:
    """What is asked of host actors."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.ended: list[str] = []

    def start_missing(self, names: Mapping[str, Any]) -> None:
        self.started += [name for name in names if name not in self.started]

    async def give_back(self, host: str, *, has_reported: bool) -> None:
        self.ended.append(host)

    def forget_host(self, host: str) -> None: ...


def test_no_host_is_started_or_ended_that_the_next_controller_would_not_know_of() -> None:
    """While Ray's head does not take what is kept, hosts neither come nor go; afterwards they do."""
    is_away = threading.Event()
    is_away.set()

    def write(kept: Kept) -> None:
        if is_away.is_set():
            raise ConnectionError("the head is away")

    async def main() -> None:
        actors = StandInActors()
        scaling = Scaling(HostRange(0, 3), 5.0, ("host-0", "host-1"), ("host-0",), 2)
        writer = KeptWriter(write, retry_s=0.001)
        either = cast(Any, actors)
        keeper = HostKeeper(either, either, scaling, set(), scaling.ended, writer)
        writer.put(Kept([], b"", []))
        assert not await writer.written(0.01), "from now on nobody waits for the head"
        running = asyncio.create_task(keeper.run(lambda: False))
        await asyncio.sleep(0.05)
        assert (actors.started, actors.ended) == ([], [])
        is_away.clear()
        while not await writer.written(1.0):
            await asyncio.sleep(0.001)
        keeper.tell()
        while scaling.ending:
            await asyncio.sleep(0.001)
        assert (actors.started, actors.ended, scaling.asked) == (["host-1"], ["host-0"], {"host-1"})
        running.cancel()

    asyncio.run(asyncio.wait_for(main(), WAIT_LIMIT_S))


class StandInRay:
    """What host actors ask of Ray, which does not take hosts of some names."""

    def __init__(self) -> None:
        self.refused: set[str] = set()
        self.started: list[str] = []

    @property
    def util(self) -> StandInRay:
        return self

    def list_named_actors(self, all_namespaces: bool) -> list[dict[str, str]]:
        names = [*((name, "pool") for name in self.started), *((f"host-{i}", "other") for i in range(9))]
        return [{"name": name, "namespace": namespace} for name, namespace in names]

    def get_actor(self, name: str, namespace: str) -> object:
        return object()

    def remote(self, *args: Any, **options: Any) -> Any:
        return self

    __call__ = remote

    def options(self, *, name: str, **others: Any) -> StandInRay:
        if name in self.refused:
            raise ValueError(f"{name} has a label that is none")
        self.started.append(name)
        return self


@pytest.mark.parametrize("are_named", [True, False], ids=["hosts come and go", "a fixed number"])
def test_a_host_that_ray_does_not_take_holds_up_no_other_one(
    are_named: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And it is started once Ray takes it; each one once."""
    fake = StandInRay()
    monkeypatch.setattr(host_actors, "ray", fake)
    actors = HostActors(PoolRecord("p", ClusterConfig(hosts=4), {}), "pool")
    wanted = dict.fromkeys([f"host-{i}" for i in range(4)], ANY) if are_named else None
    fake.refused = {"host-0", "host-2"}
    for _ in range(2):
        actors.start_missing(wanted)
        assert fake.started == ["host-1", "host-3"]
    assert "host=host-2: host-2 has a label that is none" in caplog.text
    fake.refused = set()
    actors.start_missing(wanted)
    assert sorted(fake.started) == ["host-0", "host-1", "host-2", "host-3"]


@pytest.mark.slow
def test_a_model_gets_a_node_with_one_of_its_labels(tiny_models: TinyModels) -> None:
    """Ray keeps its host off the node that is there, whatever is free on it, until one with a label joins."""
    pool = {
        "models": [
            {"name": "llama", "model": str(tiny_models.path("llama")), "hosts": ["gpu=h100", "zone=n", "!gpu=a100"]}
        ],
        "load": "on_demand",
        "device_memory": "32MiB",
        "host_memory": "128MiB",
        "page_size": "1MiB",
        "admin_key": "test-admin-key-0123",
        "cluster": {"hosts": {"min": 0, "max": 2}},
    }
    with RayNodes(num_nodes=1, cpus_per_node=1) as nodes, ExitStack() as stack:
        pool_there = Cluster(nodes, pool, stack)
        server = pool_there.serve()
        answers: list[int] = []
        asking = threading.Thread(target=lambda: answers.append(ask(server, "llama")))
        asking.start()
        poll(lambda: server.state()["cluster"]["host_count"]["pending"], until=lambda hosts: hosts == ["host-0"])
        nodes.add("gpu=a100")
        poll(nodes.count, until=lambda count: count == 3)
        assert server.state()["cluster"]["hosts"] == {} and not answers
        nodes.add("zone=n")
        asking.join(COME_S)
        assert answers == [BODY["max_tokens"]]
        assert pool_there.down() == "pool tokenpool has ended\n"
