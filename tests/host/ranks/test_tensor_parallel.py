# SPDX-License-Identifier: Apache-2.0
"""Two models on two ranks: law 1 against plain vLLM on two ranks, while weights and KV move; and a rank that dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.conftest import TinyModels
from tests.helpers.plain import Case, RequestSpec, Result, prompts_for, run_plain
from tests.helpers.server import TINY_ARGS, PoolServerProcess, child_pids, complete, is_running, poll
from tests.serve.client.test_failover import GREEDY, Call

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

KINDS = ("llama", "qwen2")
ARGS: dict[str, Any] = {**TINY_ARGS, "max_model_len": 192, "tensor_parallel_size": 2} | {
    "max_num_batched_tokens": 4096,
    "max_num_seqs": 64,
}
REQUESTS = [
    RequestSpec(f"r{i}", prompt, max_tokens=40, temperature=0.0 if i % 2 else 1.0, seed=i)
    for i, prompt in enumerate(prompts_for(5, 4, lengths=(7, 150, 60, 130)))
]


@pytest.fixture(scope="module")
def reference(tiny_models: TinyModels) -> dict[str, dict[str, Result]]:
    cases = [Case(kind, str(tiny_models.path(kind)), ARGS, REQUESTS) for kind in KINDS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")  # the workers need `plain_gemm` too
        return run_plain(cases, plain_gemm=True)


@pytest.fixture(scope="module")
def server(tiny_models: TinyModels) -> Iterator[PoolServerProcess]:
    """Room for the weights of one model and some KV, turns of one token: everything moves all the time."""
    pool = {
        "models": [{"name": kind, "model": str(tiny_models.path(kind)), "args": ARGS} for kind in KINDS],
        "device_memory": "1280KiB",
        "host_memory": "64MiB",
        "page_size": "64KiB",
        "weights": "movable",
        "scheduling": {"policy": "round_robin"},
        "host_timeout": 20,
        "admin_key": "test-admin-key-0123",
    }
    with PoolServerProcess(pool) as running:
        yield running


def test_tokens_equal_plain_vllm_on_two_ranks(
    server: PoolServerProcess, reference: dict[str, dict[str, Result]]
) -> None:
    asked = [(kind, request) for kind in KINDS for request in REQUESTS]
    with ThreadPoolExecutor(len(asked)) as threads:
        answers = list(threads.map(lambda pair: complete(server, *pair), asked))
    for (kind, request), (tokens, logprobs) in zip(asked, answers, strict=True):
        expected = reference[kind][request.request_id]
        assert tokens == expected.tokens, f"{kind} {request.request_id}"
        assert logprobs == expected.logprobs, f"{kind} {request.request_id}"
    host = server.state()["host"]
    assert host["switches"] > 10
    assert host["copied_bytes"]["weights_to_device"] > 20 * host["models"]["llama"]["weight_bytes"]
    assert host["copied_bytes"]["weights_to_host"] == 0
    assert server.admin("POST", "/check").status_code == 200


def test_a_rank_copies_at_the_speed_of_the_link() -> None:
    """What `cpu_link` says holds for the memory of a rank that follows, too."""
    from tokenpool.host.ranks.rank_models import RankModels

    assert 77 == RankModels(1, "file:///nowhere", 1 << 16, 77).mirror.device.link_bytes_per_s  # type: ignore[attr-defined]


def test_a_model_of_another_size_is_refused(server: PoolServerProcess, tiny_models: TinyModels) -> None:
    body = {"name": "alone", "model": str(tiny_models.path("llama")), "args": TINY_ARGS}
    answer = server.admin("POST", "/models", json=body)
    assert answer.status_code == 400
    assert "the same --tensor-parallel-size" in answer.text


def test_a_model_comes_and_goes_on_all_ranks(server: PoolServerProcess, tiny_models: TinyModels) -> None:
    body = {"name": "third", "model": str(tiny_models.path("llama")), "args": ARGS}
    assert server.admin("POST", "/models", json=body).status_code == 201
    first = complete(server, "third", REQUESTS[1])
    assert server.admin("DELETE", "/models/third").status_code == 200
    assert first == complete(server, "llama", REQUESTS[1])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("tokens_before", [1, 23])
def test_a_rank_that_dies_or_hangs_ends_the_host_and_streams_go_on(
    server: PoolServerProcess, how: signal.Signals, tokens_before: int
) -> None:
    """Wherever it was, also between two tokens: the host says why it ends, and comes back; clients notice nothing."""
    host = server.host_pid
    alone = _stream(server).result()
    running = [_stream(server) for _ in range(2)]
    follower = next(pid for pid in child_pids(host) if _is_follower(pid))
    poll(lambda: all(len(call.events) >= tokens_before for call in running))
    os.kill(follower, how)
    poll(lambda: not is_running(host), limit_s=120)
    poll(lambda: server.host_pid, until=lambda pid: pid not in (None, host), limit_s=120)
    assert [alone] * 2 == [call.result() for call in running]
    assert ("ended by SIGKILL" if how is signal.SIGKILL else "does not get on for") in server.log
    server.wait_until_ready(120)
    assert server.admin("POST", "/check").status_code == 200


def _stream(server: PoolServerProcess) -> Call:
    return Call(server, model="llama", max_tokens=150, **GREEDY)


def _is_follower(pid: int) -> bool:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return b"spawn_main" in file.read()
