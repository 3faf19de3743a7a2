# SPDX-License-Identifier: Apache-2.0
"""A pool split into a host that prefills and one that decodes, end to end over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from bench.parts.ray_nodes import ENV, RayNodes
from tests.conftest import TinyModels
from tests.helpers.network.cluster import RayOnMachines, ServerOnMachine, controller
from tests.helpers.network.machines import Machines
from tests.helpers.server import TINY_ARGS, PoolServerProcess, poll

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_TOKENS = 40
PROMPTS = [[3 + (step * i) % 500 for i in range(200)] for step in (7, 11)]
NUM_BLOCKS = sum(len(prompt) // TINY_ARGS["block_size"] for prompt in PROMPTS)


def _pool(models: TinyModels) -> dict[str, Any]:
    return {
        "models": [{"name": "qwen2", "model": str(models.path("qwen2"))}],
        "device_memory": "24MiB",
        "host_memory": "64MiB",
        "page_size": "1MiB",
        "admin_key": "test-admin-key-0123",
        "cluster": {"hosts": 2, "prefill_hosts": 1},
    }


def _until_served(server: PoolServerProcess) -> None:
    """Wait until both hosts serve the model."""
    poll(lambda: list(server.state()["models"]["qwen2"]["hosts"].values()), until=lambda seen: seen == ["serving"] * 2)


@pytest.fixture(scope="module")
def split_pool(tiny_models: TinyModels) -> Iterator[PoolServerProcess]:
    pytest.importorskip("ray")
    with (
        RayNodes(num_nodes=1, cpus_per_node=2) as nodes,
        PoolServerProcess(_pool(tiny_models), env=ENV, flags=["--cluster", nodes.address]) as server,
    ):
        _until_served(server)
        yield server


def _tokens(server: PoolServerProcess, prompt: list[int]) -> list[int]:
    body = {"model": "qwen2", "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    answer = server.request("POST", "/v1/completions", json=body | {"return_token_ids": True})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]


def _exchanged(server: PoolServerProcess) -> dict[str, dict[str, Any]]:
    """What each host gave and took, by what it does."""
    state = server.state()
    return {state["cluster"]["roles"][name]: host["kv_exchange"] for name, host in state["hosts"].items()}


def test_requests_begin_on_one_host_and_go_on_on_the_other(
    split_pool: PoolServerProcess, pool_server: PoolServerProcess
) -> None:
    """Their tokens are those of a pool of one host, and no full block of their prompts is computed again."""
    _assert_that_kv_goes_along(split_pool, pool_server)


def test_kv_goes_to_a_host_on_another_machine(tiny_models: TinyModels, pool_server: PoolServerProcess) -> None:
    """Each host has a machine of its own, and no file or socket in common with the other one."""
    pytest.importorskip("ray")
    with Machines(3) as machines, ExitStack() as stack:
        ray = RayOnMachines(machines)
        server = ServerOnMachine(machines[0], _pool(tiny_models), ["--cluster", ray.address])
        stack.callback(lambda: server.running and server.kill())
        server.__enter__()
        _until_served(server)
        pids = {host["pid"] for host in controller(server)["hosts"].values()}
        assert [len(pids & set(machine.pids())) for machine in machines] == [0, 1, 1]
        _assert_that_kv_goes_along(server, pool_server)


def _assert_that_kv_goes_along(server: PoolServerProcess, one_host: PoolServerProcess) -> None:
    tokens = [_tokens(server, prompt) for prompt in PROMPTS]

    assert tokens == [_tokens(one_host, prompt) for prompt in PROMPTS]
    assert {len(ids) for ids in tokens} == {NUM_TOKENS}
    assert server.state()["models"]["qwen2"]["handed_over"] == len(PROMPTS)
    assert _exchanged(server) == {
        "prefill": {"exported_blocks": NUM_BLOCKS, "imported_blocks": 0},
        "decode": {"exported_blocks": 0, "imported_blocks": NUM_BLOCKS},
    }
