# SPDX-License-Identifier: Apache-2.0
"""Models on demand on a real Ray cluster with two hosts and two servers, one of which has two frontends.

The tests use one cluster and build on each other, in this order.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from bench.parts.ray_nodes import RayNodes
from tests.cluster.test_servers import BODY, Cluster, builds, complete, host_pids, kill, told
from tests.conftest import TinyModels
from tests.helpers.server import PoolServerProcess, poll

pytestmark = pytest.mark.ray

NAMES = ("llama", "qwen2", "gemma3")


@pytest.fixture(scope="module")
def cluster(tiny_models: TinyModels) -> Iterator[Cluster]:
    pytest.importorskip("ray")
    pool = {
        "models": [{"name": name, "model": str(tiny_models.path(name))} for name in NAMES],
        "load": "on_demand",
        "max_loaded": 1,
        "unload_after": "3s",
        "device_memory": "32MiB",
        "host_memory": "128MiB",
        "page_size": "1MiB",
        "admin_key": "test-admin-key-0123",
        "cluster": {"hosts": 2, "frontend_timeout": "4s"},
    }
    with RayNodes(num_nodes=2, cpus_per_node=1) as nodes, ExitStack() as stack:
        yield Cluster(nodes, pool, stack)


@pytest.fixture(scope="module")
def one(cluster: Cluster) -> PoolServerProcess:
    return cluster.serve()


@pytest.fixture(scope="module")
def two(cluster: Cluster, one: PoolServerProcess) -> PoolServerProcess:
    return cluster.serve(frontends=2)


def states(server: PoolServerProcess) -> dict[str, str]:
    cards = server.request("GET", "/v1/models").json()["data"]
    return {card["id"]: card["pool"]["state"] for card in cards}


def actions(server: PoolServerProcess, action: str) -> list[str]:
    """Models of which the controller has decided that, in that order."""
    decisions: list[dict[str, Any]] = server.admin("GET", "/decisions").json()["decisions"]
    return [decision["model"] for decision in decisions if decision["action"] == action]


def until_cold(*servers: PoolServerProcess) -> None:
    for server in servers:
        poll(lambda server=server: set(states(server).values()), until=lambda seen: seen == {"cold"})


def waits_for_load_timeout(cluster: Cluster, *, num_nodes: int) -> None:
    """No node has so many CPUs: the host stays pending, the request is told, and the pool ends with that host."""
    section = {"hosts": {"min": 0, "max": 2}, "num_cpus_per_host": 64, "host_idle_after": "60s"}
    server = cluster.serve(cluster=section, load_timeout="3s")
    assert server.request("GET", "/ready").status_code == 200
    answer = server.request("POST", "/v1/completions", json=BODY | {"model": "llama"})
    assert answer.status_code == 503 and "not loaded within 3 s" in answer.text
    assert server.state()["cluster"]["host_count"] == {"min": 0, "max": 2, "pending": ["host-0"], "leaving": []}
    assert server.state()["cluster"]["hosts"] == {} and cluster.nodes.count() == num_nodes
    assert server.request("GET", "/ready").status_code == 200
    assert cluster.down() == "pool tokenpool has ended\n"


def test_without_a_node_requests_wait_for_load_timeout_and_the_pool_can_end(cluster: Cluster) -> None:
    """Nodes that are too small are none."""
    waits_for_load_timeout(cluster, num_nodes=3)


def test_a_request_at_one_server_loads_a_model_once_for_all(one: PoolServerProcess, two: PoolServerProcess) -> None:
    """Requests at both wait for one build; then the model is served at both, and cold again when it is idle."""
    assert states(one) == states(two) == dict.fromkeys(NAMES, "cold") and builds(one) == 0
    assert [server.request("GET", "/ready").status_code for server in (one, two)] == [200, 200]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda server: complete(server, "llama"), (one, two, one, two)))
    assert answers == [answers[0]] * 4 and len(answers[0]) == BODY["max_tokens"]
    assert actions(two, "model_added") == ["llama"]
    until_cold(one, two)
    assert actions(one, "model_removed") == ["llama"]
    assert complete(two, "llama") == answers[0]


def test_models_make_room_for_each_other(one: PoolServerProcess, two: PoolServerProcess) -> None:
    """One is loaded at a time; requests to all three at both servers are answered, and hosts' books are in order."""
    wanted = [(server, name) for name in NAMES for server in (one, two)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda each: complete(*each), wanted))
    assert answers[::2] == answers[1::2]
    assert one.admin("POST", "/check").json() == {"ok": True}
    until_cold(one, two)
    text = one.request("GET", "/metrics").text
    assert "tokenpool:demand_loads_total" in text and "tokenpool:unloads_total" in text


@pytest.mark.slow
def test_a_host_that_is_killed_while_it_loads_keeps_nobody_waiting(
    one: PoolServerProcess, two: PoolServerProcess
) -> None:
    before = host_pids(one)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(complete, server, "qwen2") for server in (one, two)]
        hosts = poll(lambda: one.state()["models"]["qwen2"]["hosts"], until=lambda hosts: hosts != {})
        os.kill(before[next(iter(hosts))], signal.SIGKILL)
        assert asked[0].result() == asked[1].result()
    until_cold(one, two)


@pytest.mark.slow
def test_a_controller_that_is_killed_while_a_model_loads(one: PoolServerProcess, two: PoolServerProcess) -> None:
    """The next one hears of the requests that wait, and of what hosts have."""
    before = told(one)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(complete, server, "gemma3") for server in (one, two)]
        poll(lambda: states(two)["gemma3"], until=lambda state: state != "cold")
        os.kill(before["pid"], signal.SIGKILL)
        assert asked[0].result() == asked[1].result()
    poll(lambda: told(one)["epoch"], until=lambda epoch: epoch > before["epoch"])
    until_cold(one, two)


@pytest.mark.slow
def test_a_model_on_demand_comes_and_goes_at_run_time(
    one: PoolServerProcess, two: PoolServerProcess, tiny_models: TinyModels
) -> None:
    added = {"name": "late", "model": str(tiny_models.path("llama")), "args": one.pool["models"][0]["args"]}
    assert two.admin("POST", "/models", added).status_code == 201
    poll(lambda: states(one).get("late"), until=lambda state: state == "cold")
    assert complete(one, "late") == complete(two, "late") == complete(one, "llama")
    assert one.admin("DELETE", "/models/late?drain=30s").status_code == 200
    for server in (one, two):
        poll(lambda server=server: sorted(states(server)), until=lambda names: names == sorted(NAMES))


@pytest.mark.slow
def test_a_server_that_dies_takes_its_wishes_along(
    cluster: Cluster, one: PoolServerProcess, two: PoolServerProcess
) -> None:
    """What waited at it is wanted no more; the other one is answered, also by a model that waits for that room."""
    kill(one)
    assert len(complete(two, "qwen2")) == BODY["max_tokens"]
    until_cold(two)
    assert cluster.down() == "pool tokenpool has ended\n"
