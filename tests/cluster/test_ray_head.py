# SPDX-License-Identifier: Apache-2.0
"""Ray's head dies: with a real Redis that keeps what it knows the pool stays whole, without one it serves on."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import httpx
import pytest

from tests.conftest import TinyModels
from tests.helpers.network.cluster import RayOnMachines, ServerOnMachine, builds, controller, decisions
from tests.helpers.network.machines import Machine, Machines
from tests.helpers.network.storage import redis_on
from tests.helpers.server import TINY_ARGS, WAIT_LIMIT_S, Stream, poll

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROMPT, NUM_TOKENS = [21, 22, 23], 400
RAY_ENDS_S = 60
"""When Ray would end a server whose head is away."""


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


@contextmanager
def pool_on(machines: Sequence[Machine], models: TinyModels, env: Mapping[str, str]) -> Iterator[Setup]:
    """A head on the first machine; hosts on the two others, and a server beside one. Ray's processes have `env`."""
    with ExitStack() as stack:
        ray = RayOnMachines(machines, env=env)
        server = ServerOnMachine(machines[1], pool_of(models), ["--cluster", ray.address])
        stack.callback(lambda: server.running and server.kill())
        server.__enter__()
        poll(lambda: builds(server), until=lambda count: count == 2)
        yield Setup(ray, server)


@pytest.fixture
def kept(tiny_models: TinyModels) -> Iterator[Setup]:
    """With a head whose storage outlives it."""
    pytest.importorskip("ray")
    with (
        Machines(3) as machines,
        redis_on(machines[0]) as env,
        pool_on(machines, tiny_models, {**env, "RAY_gcs_rpc_server_reconnect_timeout_s": "600"}) as setup,
    ):
        yield setup


@pytest.fixture
def forgetful(tiny_models: TinyModels) -> Iterator[Setup]:
    """With a head that keeps all in its own memory."""
    pytest.importorskip("ray")
    with (
        Machines(3) as machines,
        pool_on(machines, tiny_models, {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}) as setup,
    ):
        yield setup


def head(server: ServerOnMachine) -> dict[str, Any]:
    """What a server says of Ray's head."""
    told: dict[str, Any] = server.state()["cluster"]["head"]
    return told


def head_up(server: ServerOnMachine) -> float:
    """The same, as a metric."""
    found = re.search(r"^tokenpool:cluster_head_up(?:{[^}]*})? (\S+)$", server.request("GET", "/metrics").text, re.M)
    assert found is not None, "no such metric"
    return float(found[1])


def lines(server: ServerOnMachine, text: str) -> int:
    """Lines of its log with a text."""
    return sum(text in line for line in server.log.splitlines())


def test_the_head_dies_and_comes_back(kept: Setup, tiny_models: TinyModels) -> None:
    """Streams go on and new requests are answered meanwhile; afterwards models can be added, and none was rebuilt."""
    ray, server = kept
    first = ray.machines[0]
    assert head(server) == {"up": True, "away_s": 0.0} and head_up(server) == 1
    expected = Stream(server, PROMPT, NUM_TOKENS).rest()
    before = controller(server)
    running = Stream(server, PROMPT, NUM_TOKENS)
    poll(lambda: len(running.tokens) > 5)
    ray.kill(first)
    assert running.rest() == expected
    assert Stream(server, PROMPT, NUM_TOKENS).rest() == expected
    poll(lambda: head(server)["up"], until=lambda is_up: not is_up)
    assert head_up(server) == 0

    ray.start(first)
    poll(lambda: head(server)["up"])
    assert head_up(server) == 1
    assert [lines(server, "Ray's head has not answered"), lines(server, "Ray's head answers again")] == [1, 1]
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


def test_without_a_storage_the_pool_serves_on_and_says_so(forgetful: Setup, tiny_models: TinyModels) -> None:
    """For longer than Ray lets a process live without its head. A model can be added, a host die, and a server end."""
    ray, server = forgetful
    expected = Stream(server, PROMPT, NUM_TOKENS).rest()
    assert head(server)["up"] and head_up(server) == 1
    running = Stream(server, PROMPT, NUM_TOKENS)
    poll(lambda: len(running.tokens) > 5)
    ray.kill(ray.machines[0], "gcs_server")
    assert running.rest() == expected
    assert Stream(server, PROMPT, NUM_TOKENS).rest() == expected
    poll(lambda: head(server), until=lambda told: not told["up"] and told["away_s"] > 5)
    assert head_up(server) == 0

    added = {"name": "late", "model": str(tiny_models.path("qwen2")), "args": TINY_ARGS}
    answer = server.admin("POST", "/models", added)
    assert answer.status_code == 201, answer.text
    assert len(Stream(server, PROMPT, 20, "late").rest()) == 20

    running = Stream(server, PROMPT, NUM_TOKENS)
    poll(lambda: len(running.tokens) > 5)
    os.kill(controller(server)["hosts"]["host-0"]["pid"], signal.SIGKILL)
    assert running.rest() == expected
    poll(lambda: sorted(server.state()["models"]["a"]["hosts"].values()), until=lambda seats: seats == ["serving"] * 2)

    poll(lambda: head(server)["away_s"], until=lambda away_s: away_s > 1.5 * RAY_ENDS_S, limit_s=3 * RAY_ENDS_S)
    hosts = controller(server)["hosts"]
    assert sorted(hosts) == ["host-0", "host-1"], "a host was lost"
    assert Stream(server, PROMPT, NUM_TOKENS).rest() == expected
    assert [lines(server, "Ray's head has not answered"), lines(server, "Ray's head answers again")] == [1, 0]
    assert server.stop() == 0, server.log[-2000:]


def test_without_head_and_hosts_a_server_ends_as_a_failure(forgetful: Setup) -> None:
    """New requests get 503 soon, those that wait get an error, and the status has the server started anew."""
    ray, server = forgetful
    running = Stream(server, PROMPT, NUM_TOKENS)
    poll(lambda: len(running.tokens) > 5)
    told = controller(server)
    ray.kill(ray.machines[0], "gcs_server")
    poll(lambda: head(server)["up"], until=lambda is_up: not is_up)
    running.rest()
    waiting = Stream(server, PROMPT, NUM_TOKENS)
    poll(lambda: len(waiting.tokens) > 5)
    for pid in (told["pid"], *(host[which] for host in told["hosts"].values() for which in ("actor_pid", "pid"))):
        with suppress(ProcessLookupError):  # a host ends with its actor
            os.kill(pid, signal.SIGKILL)

    def ask() -> int:
        body = {"model": "a", "prompt": PROMPT, "max_tokens": 4}
        with suppress(httpx.TimeoutException), server.machine.inside():
            return httpx.post(f"{server.base_url}/v1/completions", json=body, timeout=2.0).status_code
        return 0

    poll(ask, until=lambda status: status == 503)
    assert server.request("GET", "/ready").status_code == 503
    assert waiting.is_alive(), "it may be this server that is cut off"
    waiting.join(3 * RAY_ENDS_S)
    assert not waiting.is_alive() and "no engine host has answered" in str(waiting.problem)
    assert server.process is not None and server.process.wait(WAIT_LIMIT_S) == 2
    assert "tokenpool: error: Ray's head is away, and no engine host has answered for" in server.log
