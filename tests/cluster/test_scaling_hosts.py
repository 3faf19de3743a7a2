# SPDX-License-Identifier: Apache-2.0
"""Hosts that come with requests and go without: Ray's own autoscaler, with nodes that are raylets of this machine.

The tests use one cluster and build on each other, in this order.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from bench.parts.ray_nodes import RayNodes
from tests.cluster.test_cluster_demand import states
from tests.cluster.test_servers import BODY, Cluster
from tests.conftest import TinyModels
from tests.helpers.server import WAIT_LIMIT_S, PoolServerProcess, poll

pytestmark = pytest.mark.ray

COME_S = 4 * WAIT_LIMIT_S
"""For a node to come, and a host on it to import vLLM and load a model."""


def ask(server: PoolServerProcess, model: str) -> int:
    """The tokens of an answer, however long its host takes to come."""
    answer = httpx.post(f"{server.base_url}/v1/completions", json=BODY | {"model": model}, timeout=COME_S)
    assert answer.status_code == 200, answer.text
    return len(answer.json()["choices"][0]["token_ids"])


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


def test_without_a_node_requests_wait_for_load_timeout_and_the_pool_can_end(cluster: Cluster) -> None:
    """No node has so many CPUs: the host stays pending, the request is told, and the pool ends with that host."""
    section = cluster.pool["cluster"] | {"num_cpus_per_host": 64, "host_idle_after": "60s"}
    server = cluster.serve(cluster=section, load_timeout="3s")
    assert server.request("GET", "/ready").status_code == 200
    answer = server.request("POST", "/v1/completions", json=BODY | {"model": "llama"})
    assert answer.status_code == 503 and "not loaded within 3 s" in answer.text
    assert server.state()["cluster"]["host_count"] == {"min": 0, "max": 2, "pending": ["host-0"], "leaving": []}
    assert server.state()["cluster"]["hosts"] == {} and cluster.nodes.count() == 1
    assert server.request("GET", "/ready").status_code == 200
    assert cluster.down() == "pool tokenpool has ended\n"


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
