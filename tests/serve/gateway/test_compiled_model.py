# SPDX-License-Identifier: Apache-2.0
"""A compiled model is added to a server that has streams: they go on, and it answers as plain vLLM does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import TinyModels
from tests.helpers.plain import Case, RequestSpec, prompts_for, run_plain
from tests.helpers.server import PoolServerProcess, complete
from tests.serve.client.test_failover import GREEDY, Call

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

COMPILED: dict[str, Any] = {
    "enforce_eager": False,
    "max_model_len": 512,
    "max_num_batched_tokens": 4096,
    "max_num_seqs": 64,
}
REQUESTS = [
    RequestSpec(f"r{i}", prompt, max_tokens=40, temperature=float(i % 2), seed=i)
    for i, prompt in enumerate(prompts_for(3, 4, lengths=(7, 60, 33, 130)))
]
NUM_TOKENS = 1900


def stream(server: PoolServerProcess) -> Call:
    return Call(server, model="llama", max_tokens=NUM_TOKENS, **GREEDY)


def test_a_compiled_model_is_added_beside_streams(tiny_models: TinyModels, tmp_path: Path) -> None:
    """It is compiled in a process of its own: streams get tokens meanwhile, and those of an undisturbed run."""
    path = str(tiny_models.path("qwen2"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "plain"))
        expected = run_plain([Case("compiled", path, COMPILED, REQUESTS)], plain_gemm=True)["compiled"]
    pool = {
        "models": [{"name": "llama", "model": str(tiny_models.path("llama")), "args": {"max_model_len": 2048}}],
        "device_memory": "64MiB",
        "host_memory": "64MiB",
        "page_size": "1MiB",
        "weights": "movable",
        "admin_key": "test-admin-key-0123",
    }
    env = {"VLLM_CACHE_ROOT": str(tmp_path / "pool"), "TOKENPOOL_LOG_LEVEL": "INFO"}
    with PoolServerProcess(pool, env=env) as server:
        alone = stream(server).result()
        assert (200, []) == (alone["status"], alone["errors"])
        running = [stream(server)]
        running[0].wait_until_begun()
        before = len(running[0].events)
        added = add_beside(server, {"name": "compiled", "model": path, "args": COMPILED}, running)
        assert added.status_code == 201, added.text
        assert sum(len(call.events) for call in running) > before + 50, "no stream went on: the test shows nothing"
        for request in REQUESTS:
            plain = expected[request.request_id]
            assert (plain.tokens, plain.logprobs) == complete(server, "compiled", request), request.request_id
        assert [alone] * len(running) == [call.result() for call in running]
        assert "compiled aside model=compiled" in server.log
        assert server.admin("POST", "/check").status_code == 200


def add_beside(server: PoolServerProcess, body: dict[str, Any], running: list[Call]) -> Any:
    """Add a model; there is a stream at every moment until it is there."""

    def add() -> httpx.Response:  # compiling takes minutes on a machine that has other work
        url = f"{server.base_url}/v1/pool/models"
        return httpx.post(url, json=body, headers=server.headers(server.admin_key), timeout=900)

    with ThreadPoolExecutor(1) as side:
        adding = side.submit(add)
        while not wait([adding], 0.05).done:
            if not running[-1].running:
                running.append(stream(server))
                running[-1].wait_until_begun()
        return adding.result()
