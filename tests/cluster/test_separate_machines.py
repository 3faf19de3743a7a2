# SPDX-License-Identifier: Apache-2.0
"""A pool on three machines that share nothing but a network: the Ray head on the first, hosts on the other two.

The tests use one cluster and build on each other, in this order.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from tests.conftest import TinyModels
from tests.helpers.network.cluster import RayOnMachines, ServerOnMachine, builds, controller, decisions
from tests.helpers.network.machines import Machine, Machines
from tests.helpers.network.tcp import LISTEN, tcp_sockets
from tests.helpers.plain import Case, RequestSpec, run_plain
from tests.helpers.server import TINY_ARGS, Stream, poll

pytestmark = pytest.mark.ray

NUM_TOKENS = 400
ARGS = {"max_model_len": 2048}
SLO = {"ttft": "100s", "tpot": "100s"}
"""No token is late, unless a clock of another machine is taken for one's own."""
PROMPTS = [[11 + i, 12, 13 + i, 14] for i in range(4)]


@pytest.fixture(scope="module")
def machines() -> Iterator[Sequence[Machine]]:
    with Machines(3) as made:
        yield made


@pytest.fixture(scope="module")
def ray_nodes(machines: Sequence[Machine]) -> RayOnMachines:
    pytest.importorskip("ray")
    return RayOnMachines(machines)


@pytest.fixture(scope="module")
def pool(tiny_models: TinyModels) -> dict[str, Any]:
    return {
        "models": [
            {"name": "a", "model": str(tiny_models.path("llama")), "args": ARGS},
            {"name": "due", "model": str(tiny_models.path("llama")), "args": ARGS, "slo": SLO},
        ],
        "device_memory": "48MiB",
        "host_memory": "128MiB",
        "page_size": "1MiB",
        "cluster": {
            "hosts": 2, "replicas": 2, "capacity": "fixed", "host_timeout": "4s", "frontend_timeout": "4s",
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def serve(ray_nodes: RayOnMachines, pool: dict[str, Any]) -> Iterator[Callable[[int], ServerOnMachine]]:
    with ExitStack() as stack:

        def start(index: int) -> ServerOnMachine:
            server = ServerOnMachine(ray_nodes.machines[index], pool, ["--cluster", ray_nodes.address])
            stack.callback(lambda: server.running and server.kill())
            return server.__enter__()

        yield start


@pytest.fixture(scope="module")
def near(serve: Callable[[int], ServerOnMachine]) -> ServerOnMachine:
    """The server beside the head."""
    server = serve(0)
    poll(lambda: builds(server), until=lambda count: count == 4)
    return server


@pytest.fixture(scope="module")
def plain(tiny_models: TinyModels) -> list[list[int]]:
    """What plain vLLM answers to each prompt."""
    requests = [RequestSpec(str(i), prompt, NUM_TOKENS) for i, prompt in enumerate(PROMPTS)]
    case = Case("a", str(tiny_models.path("llama")), TINY_ARGS | ARGS, requests)
    return [result.tokens for result in run_plain([case])["a"].values()]


def streams(server: ServerOnMachine) -> list[Stream]:
    """A stream for each prompt, once all of them have tokens."""
    begun = [Stream(server, prompt, NUM_TOKENS) for prompt in PROMPTS]
    poll(lambda: min(len(stream.tokens) for stream in begun), until=lambda least: least >= 5)
    return begun


def greeting(machine: Machine, address: tuple[str, int]) -> bytes:
    """What a ZMQ socket says first, its security mechanism among it; empty for what is none."""
    ours = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)
    with machine.inside(), socket.create_connection(address, timeout=10) as sock:
        sock.sendall(ours)
        said = b""
        with suppress(ConnectionResetError):
            while len(said) < 32 and (more := sock.recv(64)):
                said += more
    return said if said[:1] == b"\xff" else b""


def away(server: ServerOnMachine, machines: Sequence[Machine]) -> int:
    """The index of a machine with a host and without the controller."""
    pid = controller(server)["pid"]
    return next(index for index in (1, 2) if pid not in machines[index].pids())


def unfinished(server: ServerOnMachine) -> int:
    """Requests at the hosts that a server knows."""
    models = [host["models"]["a"] for host in server.state()["hosts"].values() if "models" in host]
    return sum(model["running"] + model["waiting"] for model in models)


def test_a_pool_serves_across_machines(near: ServerOnMachine, plain: list[list[int]]) -> None:
    """Streams are those of plain vLLM; what reaches another machine is bound to the node's address, and is CURVE."""
    assert [stream.rest() for stream in streams(near)] == plain
    assert [server["address"] for server in near.state()["cluster"]["servers"]] == [near.machine.address]
    assert near.process is not None
    open_now = tcp_sockets(near.process.pid)
    sockets = [at for at, _, state in open_now if state == LISTEN and at[0] == near.machine.address]
    mechanisms = [greeting(near.machine, at)[12:32].rstrip(b"\0") for at in sockets]
    assert sorted(filter(None, mechanisms)) == [b"CURVE"] * 8, "two sockets for each model on each host"
    assert near.admin("POST", "/check").json() == {"ok": True}


def test_clocks_may_differ_by_minutes(near: ServerOnMachine) -> None:
    """A token is late by its own age only."""
    Stream(near, PROMPTS[0], 20, "due").rest()
    models = [host["models"]["due"] for host in near.state()["hosts"].values()]
    assert sum(model["tokens"] for model in models) == sum(model["tokens_on_time"] for model in models) == 20


def test_streams_of_a_host_that_is_cut_off_go_on_elsewhere(
    near: ServerOnMachine, machines: Sequence[Machine], plain: list[list[int]]
) -> None:
    """Without a token lost or twice. The host rejoins as what it was, nothing is built, and it serves again."""
    before, built, cut = controller(near)["hosts"], builds(near), machines[away(near, machines)]
    begun = streams(near)
    cut.unplug()
    assert [stream.rest() for stream in begun] == plain
    lost = poll(lambda: [d for d in decisions(near) if d["action"] == "host_lost"])
    assert [decision["reason"].startswith("no word for ") for decision in lost] == [True]
    cut.plug()
    poll(lambda: controller(near)["hosts"], until=lambda hosts: hosts == before)
    poll(lambda: sorted(near.state()["models"]["a"]["hosts"].values()), until=lambda seats: seats == ["serving"] * 2)
    assert builds(near) == built
    assert [stream.rest() for stream in streams(near)] == plain
    assert near.admin("POST", "/check").json() == {"ok": True}


@pytest.mark.slow
def test_requests_of_a_server_that_is_cut_off_are_dropped(
    near: ServerOnMachine, serve: Callable[[int], ServerOnMachine], machines: Sequence[Machine]
) -> None:
    """After `frontend_timeout`; its clients wait, and have all their tokens once it is back."""
    far = serve(away(near, machines))
    prompt, num_tokens = [31, 32, 33], 1900
    expected = Stream(near, prompt, num_tokens).rest()
    begun = [Stream(far, prompt, num_tokens) for _ in range(2)]
    poll(lambda: min(len(stream.tokens) for stream in begun), until=lambda least: least >= 5)
    far.machine.unplug()
    poll(lambda: len(near.state()["cluster"]["servers"]), until=lambda count: count == 1)
    poll(lambda: unfinished(near), until=lambda count: count == 0)
    assert min(len(stream.tokens) for stream in begun) < num_tokens, "they ended too soon to be dropped"
    far.machine.plug()
    assert [stream.rest() for stream in begun] == [expected] * 2
    poll(lambda: len(near.state()["cluster"]["servers"]), until=lambda count: count == 2)
