# SPDX-License-Identifier: Apache-2.0
"""A pool split into a host that prefills and one that decodes, end to end over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from bench.parts.ray_nodes import ENV, RayNodes
from tests.conftest import TinyModels
from tests.helpers.server import TINY_ARGS, PoolServerProcess, poll

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_TOKENS = 40
PROMPTS = [[3 + (step * i) % 500 for i in range(200)] for step in (7, 11)]
NUM_BLOCKS = sum(len(prompt) // TINY_ARGS["block_size"] for prompt in PROMPTS)


@pytest.fixture(scope="module")
def split_pool(tiny_models: TinyModels) -> Iterator[PoolServerProcess]:
    pytest.importorskip("ray")
    pool = {
        "models": [{"name": "qwen2", "model": str(tiny_models.path("qwen2"))}],
        "device_memory": "24MiB",
        "host_memory": "64MiB",
        "page_size": "1MiB",
        "admin_key": "test-admin-key-0123",
        "cluster": {"hosts": 2, "prefill_hosts": 1},
    }
    with (
        RayNodes(num_nodes=1, cpus_per_node=2) as nodes,
        PoolServerProcess(pool, env=ENV, flags=["--cluster", nodes.address]) as server,
    ):
        poll(
            lambda: list(server.state()["models"]["qwen2"]["hosts"].values()),
            until=lambda seen: seen == ["serving"] * 2,
        )
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


def test_requests_begin_on_one_host_and_go_on_on_the_other(split_pool, pool_server):
    """Their tokens are those of a pool of one host, and no full block of their prompts is computed again."""
    tokens = [_tokens(split_pool, prompt) for prompt in PROMPTS]

    assert tokens == [_tokens(pool_server, prompt) for prompt in PROMPTS]
    assert {len(ids) for ids in tokens} == {NUM_TOKENS}
    assert split_pool.state()["models"]["qwen2"]["handed_over"] == len(PROMPTS)
    assert _exchanged(split_pool) == {
        "prefill": {"exported_blocks": NUM_BLOCKS, "imported_blocks": 0},
        "decode": {"exported_blocks": 0, "imported_blocks": NUM_BLOCKS},
    }
