# SPDX-License-Identifier: Apache-2.0
"""Two hosts of one pool on one node share host copies: each content is there once, whichever host is killed."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from bench.parts.ray_nodes import ENV, RayNodes
from tests.cluster.test_cluster import NUM_TOKENS, controller
from tests.conftest import TinyModels
from tests.helpers.server import PoolServerProcess, Stream, poll
from tests.node_store.asking import book, kill_keeper
from tokenpool.node_store.place import folder_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STORE = f"test-ray-{os.getpid()}"
PROMPTS = [[11, 12, 13], [21, 22, 23, 24], [31, 32], [41, 42, 43]]


@pytest.fixture(scope="module")
def server(tiny_models: TinyModels) -> Iterator[PoolServerProcess]:
    pytest.importorskip("ray")
    pool = {
        "models": [{"name": "a", "model": str(tiny_models.path("qwen2")), "replicas": 2}],
        "device_memory": "24MiB",
        "host_memory": "64MiB",
        "host_store": STORE,
        "weights": "movable",
        "page_size": "1MiB",
        "admin_key": "test-admin-key-0123",
        "cluster": {"hosts": 2},
    }
    with (
        RayNodes(num_nodes=1, cpus_per_node=2) as nodes,
        PoolServerProcess(
            pool, env=ENV | {"TOKENPOOL_LOG_LEVEL": "INFO"}, flags=["--cluster", nodes.address]
        ) as started,
    ):
        yield started
    assert 0 == poll(lambda: book(folder_of(STORE))["hosts"], until=lambda hosts: hosts == 0)
    kill_keeper(folder_of(STORE))
    shutil.rmtree(folder_of(STORE), ignore_errors=True)


def both_serve(server: PoolServerProcess) -> dict[str, Any]:
    """Wait until both hosts serve the model; returns the node's book."""
    poll(lambda: sorted(server.state()["models"]["a"]["hosts"].values()), until=lambda seen: seen == ["serving"] * 2)
    return poll(lambda: book(folder_of(STORE)), until=lambda found: found["hosts"] == 2)


def begin(server: PoolServerProcess) -> list[Stream]:
    return [Stream(server, prompt, NUM_TOKENS) for prompt in PROMPTS]


def tokens(streams: list[Stream]) -> list[list[int]]:
    for stream in streams:
        stream.join(180)
    assert [None] * len(streams) == [stream.problem for stream in streams]
    return [stream.tokens for stream in streams]


def test_a_killed_host_of_a_pool_is_followed_by_one_that_maps(server: PoolServerProcess) -> None:
    """Its streams go on; the copy is the same one all the time, and both hosts hold it."""
    found = both_serve(server)
    assert [2] == [copy["hosts"] for copy in found["copies"].values()]
    undisturbed = tokens(begin(server))
    streams = begin(server)
    poll(lambda: min(len(stream.tokens) for stream in streams), until=lambda least: least >= 5)
    victim = next(iter(controller(server)["hosts"].values()))["pid"]
    os.kill(victim, signal.SIGKILL)
    assert undisturbed == tokens(streams)
    poll(lambda: victim not in [host["pid"] for host in controller(server)["hosts"].values()])
    after = both_serve(server)
    assert (found["pid"], found["copies"]) == (after["pid"], after["copies"])
    assert server.admin("POST", "/check").json() == {"ok": True}
