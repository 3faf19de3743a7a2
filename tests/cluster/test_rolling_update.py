# SPDX-License-Identifier: Apache-2.0
"""Hosts of a real cluster are emptied and replaced one by one under load: no stream and no token is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from bench.parts.ray_nodes import ENV, RayNodes
from tests.cluster.test_cluster import NUM_TOKENS, actions, controller, host_of, streams
from tests.conftest import TinyModels
from tests.helpers.server import WAIT_LIMIT_S, PoolServerProcess, poll

pytestmark = [pytest.mark.ray, pytest.mark.slow]

EXACT = {"dtype": "float32"}
"""On CPUs with AMX vLLM multiplies small bfloat16 matrices with another kernel from five rows on, which rounds
otherwise: the last block of a request that moves, computed in one step, would not be that of the request that stays."""


@pytest.fixture(scope="module")
def server(tiny_models: TinyModels) -> Iterator[PoolServerProcess]:
    pytest.importorskip("ray")
    pool = {
        "models": [
            {"name": "a", "model": str(tiny_models.path("llama")), "args": EXACT},
            {"name": "b", "model": str(tiny_models.path("qwen2")), "args": EXACT},
        ],
        "device_memory": "24MiB",
        "host_memory": "128MiB",
        "page_size": "1MiB",
        "admin_key": "test-admin-key-0123",
        "cluster": {"hosts": 2},
    }
    with RayNodes(num_nodes=2, cpus_per_node=1) as nodes:
        flags = ["--cluster", nodes.address]
        with PoolServerProcess(pool, env={**ENV, "TOKENPOOL_LOG_LEVEL": "INFO"}, flags=flags) as started:
            yield started


@pytest.fixture(scope="module")
def undisturbed(server: PoolServerProcess) -> dict[tuple[str, int], list[int]]:
    tokens = streams(server)
    assert {len(ids) for ids in tokens.values()} == {NUM_TOKENS}
    return tokens


def drain(server: PoolServerProcess, host: str, *, is_wanted: bool) -> list[str]:
    """The models that are still there."""
    answer = server.admin("POST", f"/hosts/{host}", {"draining": is_wanted})
    assert answer.status_code == 200, answer.text
    models: list[str] = answer.json()["models"]
    return models


def empty(server: PoolServerProcess, host: str) -> None:
    """Drain a host until nothing is left there."""
    poll(lambda: drain(server, host, is_wanted=True), until=lambda models: not models, limit_s=3 * WAIT_LIMIT_S)


def replace(server: PoolServerProcess, host: str) -> None:
    """Empty a host, kill its actor with all that it has, and use the one that comes in its place."""
    before = controller(server)["hosts"][host]
    empty(server, host)
    assert server.state()["cluster"]["draining"] == [host]
    os.kill(before["actor_pid"], signal.SIGKILL)
    poll(
        lambda: controller(server)["hosts"].get(host, before)["pid"],
        until=lambda pid: pid != before["pid"],
        limit_s=3 * WAIT_LIMIT_S,
    )
    assert drain(server, host, is_wanted=True) == [], "nothing comes to it before it is used again"
    drain(server, host, is_wanted=False)


def test_streams_go_on_while_a_host_is_emptied(
    server: PoolServerProcess, undisturbed: dict[tuple[str, int], list[int]]
) -> None:
    """Its model goes to the other host, and its streams with it: their tokens are equal."""
    host, other = host_of(server, "b"), host_of(server, "a")
    assert host != other
    assert streams(server, lambda: empty(server, host)) == undisturbed
    assert server.state()["cluster"]["draining"] == [host]
    assert host_of(server, "a") == host_of(server, "b") == other
    assert drain(server, host, is_wanted=False) == []
    poll(lambda: server.state()["cluster"]["draining"], until=lambda draining: draining == [])
    assert (actions(server).count("drain"), actions(server).count("undrain")) == (1, 1)
    assert server.admin("POST", "/check").json() == {"ok": True}


def test_hosts_are_replaced_one_by_one(
    server: PoolServerProcess, undisturbed: dict[tuple[str, int], list[int]]
) -> None:
    """Each while streams of both models run, all of which go on with equal tokens."""
    before = [actions(server).count(action) for action in ("drain", "undrain")]
    hosts = sorted(controller(server)["hosts"])
    assert len(hosts) == 2
    for host in hosts:
        assert streams(server, lambda host=host: replace(server, host)) == undisturbed
    after = [actions(server).count(action) for action in ("drain", "undrain")]
    assert after == [count + 2 for count in before]
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
    """With the name of the host, beside those of the server."""
    answer = server.admin("GET", "/logs?lines=2000")
    assert answer.status_code == 200, answer.text
    for process in ("server", *controller(server)["hosts"]):
        assert f'"process": "{process}"' in answer.text
