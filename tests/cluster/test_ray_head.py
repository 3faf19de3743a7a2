# SPDX-License-Identifier: Apache-2.0
"""Ray's head dies and comes back, with a real Redis that keeps what it knows: the pool serves on and stays whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import pytest

from tests.conftest import TinyModels
from tests.helpers.network.cluster import RayOnMachines, ServerOnMachine, Stream, builds, controller, decisions
from tests.helpers.network.machines import Machines
from tests.helpers.network.storage import redis_on
from tests.helpers.server import TINY_ARGS, poll

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROMPT, NUM_TOKENS = [21, 22, 23], 400


class Setup(NamedTuple):
    ray: RayOnMachines
    server: ServerOnMachine


def pool_of(models: TinyModels) -> dict[str, Any]:
    return {
        "models": [{"name": "a", "model": str(models.path("llama"))}],
        "device_memory": "32MiB",
        "host_memory": "128MiB",
        "page_size": "1MiB",
        "cluster": {"hosts": 2, "replicas": 2, "capacity": "fixed"},
    }


@pytest.fixture
def kept(tiny_models: TinyModels) -> Iterator[Setup]:
    """A head on the first machine whose storage outlives it; hosts on the two others, and a server beside one."""
    pytest.importorskip("ray")
    with Machines(3) as machines, redis_on(machines[0]) as env, ExitStack() as stack:
        ray = RayOnMachines(machines, env={**env, "RAY_gcs_rpc_server_reconnect_timeout_s": "600"})
        server = ServerOnMachine(machines[1], pool_of(tiny_models), ["--cluster", ray.address])
        stack.callback(lambda: server.running and server.kill())
        server.__enter__()
        poll(lambda: builds(server), until=lambda count: count == 2)
        yield Setup(ray, server)


def test_the_head_dies_and_comes_back(kept: Setup, tiny_models: TinyModels) -> None:
    """Streams go on and new requests are answered meanwhile; afterwards models can be added, and none was rebuilt."""
    ray, server = kept
    head = ray.machines[0]
    expected = Stream(server, PROMPT, NUM_TOKENS).rest()
    before = controller(server)
    running = Stream(server, PROMPT, NUM_TOKENS)
    poll(lambda: len(running.tokens) > 5)
    ray.kill(head)
    assert running.rest() == expected
    assert Stream(server, PROMPT, NUM_TOKENS).rest() == expected

    ray.start(head)
    after = poll(lambda: controller(server), until=lambda told: told["hosts"] == before["hosts"])
    added = {"name": "late", "model": str(tiny_models.path("qwen2")), "args": TINY_ARGS}
    answer = server.admin("POST", "/models", added)
    assert answer.status_code == 201, answer.text
    assert len(Stream(server, PROMPT, 20, "late").rest()) == 20
    assert server.admin("DELETE", "/models/late").status_code == 200
    assert Stream(server, PROMPT, NUM_TOKENS).rest() == expected
    assert controller(server)["hosts"] == before["hosts"]
    if after["epoch"] > before["epoch"]:  # it was on the head's machine: what it decided is all that there is
        assert [d for d in decisions(server) if (d["action"], d["model"]) == ("model_added", "a")] == []
