# SPDX-License-Identifier: Apache-2.0
"""Hosts of a real cluster are emptied and replaced one by one under load: no stream and no token is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from bench.parts.ray_nodes import ENV, RayNodes
from tests.cluster.test_cluster import NUM_TOKENS, controller, streams
from tests.conftest import TinyModels
from tests.helpers.server import WAIT_LIMIT_S, PoolServerProcess, poll

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def server(tiny_models: TinyModels) -> Iterator[PoolServerProcess]:
    pytest.importorskip("ray")
    pool = {
        "models": [
            {"name": "a", "model": str(tiny_models.path("llama"))},
            {"name": "b", "model": str(tiny_models.path("qwen2"))},
        ],
        "device_memory": "24MiB",
        "host_memory": "128MiB",
        "page_size": "1MiB",
        "admin_key": "test-admin-key-0123",
        "cluster": {"hosts": 2},
    }
    with RayNodes(num_nodes=2, cpus_per_node=1) as nodes:
        flags = ["--cluster", nodes.address]
        with PoolServerProcess(pool, env=ENV, flags=flags) as started:
            yield started


def drain(server: PoolServerProcess, host: str, *, is_wanted: bool) -> list[str]:
    """The models that are still there."""
    answer = server.admin("POST", f"/hosts/{host}", {"draining": is_wanted})
    assert answer.status_code == 200, answer.text
    models: list[str] = answer.json()["models"]
    return models


def replace(server: PoolServerProcess, host: str) -> None:
    """Empty a host, kill its actor with all that it has, and use the one that comes in its place."""
    before = controller(server)["hosts"][host]
    poll(lambda: drain(server, host, is_wanted=True), until=lambda models: not models, limit_s=3 * WAIT_LIMIT_S)
    assert server.state()["cluster"]["draining"] == [host]
    os.kill(before["actor_pid"], signal.SIGKILL)
    poll(
        lambda: controller(server)["hosts"].get(host, before)["pid"],
        until=lambda pid: pid != before["pid"],
        limit_s=3 * WAIT_LIMIT_S,
    )
    assert drain(server, host, is_wanted=True) == [], "nothing comes to it before it is used again"
    drain(server, host, is_wanted=False)


def check_whole(tokens: list[int], undisturbed: list[int]) -> None:
    """No token was left out or told twice where a stream first differs; what was computed anew may round otherwise."""
    first = next((i for i, pair in enumerate(zip(tokens, undisturbed, strict=True)) if pair[0] != pair[1]), None)
    if first is None:
        return
    print(f"differs from token {first} on: {tokens[first : first + 8]}, undisturbed {undisturbed[first : first + 8]}")
    assert first >= 5, "what was delivered before the host was emptied is the same"
    assert tokens[first : first + 20] != undisturbed[first + 1 : first + 21], "a token was lost"
    assert tokens[first + 1 : first + 21] != undisturbed[first : first + 20], "a token was told twice"


def test_hosts_are_replaced_one_by_one(server: PoolServerProcess) -> None:
    """Each while streams of both models run, which are answered in full."""
    undisturbed = streams(server)
    hosts = sorted(controller(server)["hosts"])
    assert len(hosts) == 2
    for host in hosts:
        disturbed = streams(server, lambda host=host: replace(server, host))
        for key, tokens in disturbed.items():
            assert len(tokens) == NUM_TOKENS
            check_whole(tokens, undisturbed[key])
    actions = [decision["action"] for decision in server.admin("GET", "/decisions").json()["decisions"]]
    assert (actions.count("drain"), actions.count("undrain")) == (2, 2)
    assert server.admin("POST", "/check").json() == {"ok": True}


def test_a_model_is_not_put_where_it_may_not_be(server: PoolServerProcess, tiny_models: TinyModels) -> None:
    """By the name of a host, which is one of its labels; and refused where no host is meant."""
    first, second = sorted(controller(server)["hosts"])
    entry = {"name": "c", "model": str(tiny_models.path("gemma3")), "args": server.pool["models"][0]["args"]}
    answer = server.admin("POST", "/models", entry | {"hosts": ["nowhere"]})
    assert answer.status_code == 507 and "may take it" in answer.text, answer.text
    assert server.admin("POST", "/models", entry | {"hosts": [f"!{first}"]}).status_code == 201
    assert set(server.state()["models"]["c"]["hosts"]) == {second}
    assert server.admin("DELETE", "/models/c?drain=0s").status_code == 200


def test_an_unknown_host_is_refused(server: PoolServerProcess) -> None:
    answer = server.admin("POST", "/hosts/h9", {"draining": True})
    assert answer.status_code == 400 and "there is no host 'h9'" in answer.text


def test_lines_of_the_hosts_are_told(server: PoolServerProcess) -> None:
    """With the name of the host; all that is logged here is warnings, of which a killed one is the cause of some."""
    answer = server.admin("GET", "/logs?lines=2000")
    assert answer.status_code == 200 and '"process": "server"' in answer.text
