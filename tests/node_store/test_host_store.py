# SPDX-License-Identifier: Apache-2.0
"""Two real servers of one machine share host copies: the second reads nothing, nor does a killed host's successor."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.cases import greedy, make_cases
from tests.helpers.plain import Case, RequestSpec, Result, run_plain
from tests.helpers.server import PoolServerProcess, is_running, poll
from tests.node_store.asking import book, keeper_pid, kill_keeper
from tests.serve.client.test_failover import Call
from tokenpool.node_store.place import folder_of

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

KINDS = ("qwen3", "gemma3")
STORE = f"test-served-{os.getpid()}"
MAPPED = "weights are mapped, not read"


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return make_cases(tmp_path_factory.mktemp("models"), KINDS, greedy(2, 300), max_model_len=1024)


@pytest.fixture(scope="module")
def reference(cases: dict[str, Case]) -> dict[str, dict[str, Result]]:
    """Every model alone in plain vLLM, with the kernel that movable weights need."""
    return run_plain(list(cases.values()), plain_gemm=True)


@pytest.fixture(scope="module")
def pool(cases: dict[str, Case]) -> Iterator[dict[str, Any]]:
    yield {
        "models": [
            {"name": name, "model": case.model, "args": {"max_model_len": 1024}} for name, case in cases.items()
        ],
        "device_memory": "8MiB",
        "page_size": "256KiB",
        "host_memory": "64MiB",
        "weights": "movable",
        "host_store": STORE,
        "admin_key": "test-admin-key-0123",
    }
    kill_keeper(folder_of(STORE))
    shutil.rmtree(folder_of(STORE), ignore_errors=True)


@pytest.fixture(scope="module")
def servers(pool: dict[str, Any]) -> Iterator[list[PoolServerProcess]]:
    """The first is ready before the second starts."""
    env = {"TOKENPOOL_LOG_LEVEL": "INFO"}
    with PoolServerProcess(pool, env=env) as one, PoolServerProcess(pool, env=env) as two:
        yield [one, two]


def mapped(server: PoolServerProcess) -> list[str]:
    """The models whose weights its hosts have mapped, in order."""
    return [line.split("model=")[1].split()[0] for line in server.log.splitlines() if MAPPED in line]


def ask(server: PoolServerProcess, name: str, request: RequestSpec) -> Call:
    return Call(
        server, model=name, prompt=request.prompt_token_ids, max_tokens=request.max_tokens, temperature=0,
        return_token_ids=True,
    )  # fmt: skip


def tokens_of(call: Call) -> list[int]:
    call.result()
    choices = [choice for event in call.events for choice in event.get("choices", ())]
    return [token for choice in choices for token in choice["token_ids"] or ()]


class Streams:
    """All requests on all servers, begun."""

    def __init__(self, servers: list[PoolServerProcess], cases: dict[str, Case]) -> None:
        self.calls = [(request.request_id, name, ask(server, name, request)) for server in servers
                      for name, case in cases.items() for request in case.requests]  # fmt: skip
        for _, _, call in self.calls:
            call.wait_until_begun()

    def assert_equal(self, reference: dict[str, dict[str, Result]]) -> None:
        for request_id, name, call in self.calls:
            assert reference[name][request_id].tokens == tokens_of(call), f"{request_id}: tokens differ"


def assert_shared(servers: list[PoolServerProcess]) -> None:
    """Each copy is there once and held by the host of each server, whose books are in order."""
    hosts = len(servers)
    found = poll(lambda: book(folder_of(STORE)), until=lambda found: found["hosts"] == hosts)
    assert [hosts] * len(KINDS) == [copy["hosts"] for copy in found["copies"].values()]
    for server in servers:
        memory = server.wait_until_idle()["host"]["host_memory"]
        weights = sum(memory["held_bytes"]["weights"].values())
        assert weights >= found["copies_bytes"] == found["held_copies_bytes"]


def test_the_second_server_reads_nothing(servers, cases, reference) -> None:
    """Both give the tokens of plain vLLM at the same time, from one copy of each model."""
    assert ([], list(KINDS)) == (mapped(servers[0]), sorted(mapped(servers[1]), key=KINDS.index))
    Streams(servers, cases).assert_equal(reference)
    assert_shared(servers)


def test_a_killed_host_leaves_its_copies_to_the_next(servers, cases, reference) -> None:
    """It had filled them; its streams go on, and those of the other server know nothing of it."""
    one, two = servers
    pid, streams = one.host_pid, Streams(servers, cases)
    os.kill(pid, signal.SIGKILL)
    streams.assert_equal(reference)
    assert (sorted(KINDS), len(KINDS)) == (sorted(mapped(one)), len(mapped(two)))
    one.wait_until_ready()
    assert pid != one.host_pid
    assert_shared(servers)


def test_a_host_and_the_keeper_are_killed_at_once(servers, cases, reference) -> None:
    """The next host waits for what the other one offers the next keeper."""
    two = servers[1]
    before, streams = len(mapped(two)), Streams(servers, cases)
    os.kill(keeper_pid(folder_of(STORE)), signal.SIGKILL)
    os.kill(two.host_pid, signal.SIGKILL)
    streams.assert_equal(reference)
    assert len(KINDS) == len(mapped(two)) - before
    two.wait_until_ready()
    assert_shared(servers)


def test_nobody_waits_for_a_keeper_that_is_stopped(servers, cases, reference) -> None:
    """All streams end while it is; afterwards it has its hosts back."""
    pid = keeper_pid(folder_of(STORE))
    os.kill(pid, signal.SIGSTOP)
    try:
        Streams(servers, cases).assert_equal(reference)
    finally:
        os.kill(pid, signal.SIGCONT)
    for server in servers:
        poll(lambda server=server: server.state()["host"]["host_memory"]["node"].get("hosts"), until=lambda n: n == 2)
    assert_shared(servers)


def test_copies_outlive_the_servers(servers, pool, cases, reference) -> None:
    """Last, for both end: one that starts within a minute reads nothing. Then only the keeper is left, for a minute."""
    for server in servers:
        assert 0 == server.stop()
    assert 0 == poll(lambda: book(folder_of(STORE)), until=lambda found: found["hosts"] == 0)["own_bytes"]
    with PoolServerProcess(pool, env={"TOKENPOOL_LOG_LEVEL": "INFO"}) as third:
        assert sorted(KINDS) == sorted(mapped(third))
        Streams([third], cases).assert_equal(reference)
        assert_shared([third])
        host = third.host_pid
    assert not is_running(host)
