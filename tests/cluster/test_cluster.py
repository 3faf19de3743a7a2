# SPDX-License-Identifier: Apache-2.0
"""A pool on a Ray cluster of two nodes: real engines, killed processes, streams that go on.

The tests use one cluster and build on each other, in this order. Tokens travel over TCP here.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench.parts.ray_nodes import ENV, RayNodes
from tests.conftest import TinyModels
from tests.helpers.server import PoolServerProcess, Stream, is_running, poll

pytestmark = pytest.mark.ray

NUM_TOKENS = 400
PROMPTS = [[11, 12, 13], [21, 22, 23, 24]]


def streams(server: PoolServerProcess, disturb: Callable[[], None] | None = None) -> dict[tuple[str, int], list[int]]:
    """The tokens of streams of both models, all of which run when `disturb` is called."""
    begun = {(m, i): Stream(server, prompt, NUM_TOKENS, m) for m in ("a", "b") for i, prompt in enumerate(PROMPTS)}
    if disturb is not None:
        poll(lambda: min(len(stream.tokens) for stream in begun.values()), until=lambda least: least >= 5)
        assert all(len(stream.tokens) < NUM_TOKENS for stream in begun.values()), "they ended too soon to be disturbed"
        disturb()
    return {key: stream.rest() for key, stream in begun.items()}


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    pytest.importorskip("ray")
    with RayNodes(num_nodes=2, cpus_per_node=1) as started:
        yield started


@pytest.fixture(scope="module")
def server(nodes: RayNodes, tiny_models: TinyModels) -> Iterator[PoolServerProcess]:
    pool = {
        "models": [
            {"name": "a", "model": str(tiny_models.path("llama"))},
            {"name": "b", "model": str(tiny_models.path("qwen2"))},
        ],
        "device_memory": "24MiB",
        "host_memory": "128MiB",
        "page_size": "1MiB",
        "admin_key": "test-admin-key-0123",
        "cluster": {"hosts": 2, "transport": "tcp"},
    }
    with PoolServerProcess(pool, env=ENV, flags=["--cluster", nodes.address]) as started:
        yield started
        pids = [host["pid"] for host in controller(started)["hosts"].values()]
        assert started.stop() == 0
        assert [pid for pid in pids if not is_running(pid)] == [], "the pool is nobody's"


@pytest.fixture(scope="module")
def undisturbed(server: PoolServerProcess) -> dict[tuple[str, int], list[int]]:
    tokens = streams(server)
    assert {len(ids) for ids in tokens.values()} == {NUM_TOKENS}
    return tokens


def controller(server: PoolServerProcess) -> dict[str, Any]:
    """Pid, epoch and hosts, as the controller tells them; waits while it is away."""
    found = poll(lambda: server.state()["cluster"]["controller"], until=lambda told: "epoch" in told)
    assert isinstance(found, dict)
    return found


def host_of(server: PoolServerProcess, model: str) -> str:
    return next(h for h, state in server.state()["models"][model]["hosts"].items() if state == "serving")


def actions(server: PoolServerProcess) -> list[str]:
    return [decision["action"] for decision in server.admin("GET", "/decisions").json()["decisions"]]


def test_each_host_serves_a_model(server, undisturbed):
    """Two models on two nodes: one each, with the reasons in the log of decisions."""
    assert host_of(server, "a") != host_of(server, "b")
    assert actions(server).count("model_added") == 2
    assert server.admin("POST", "/check").json() == {"ok": True}


def test_a_scrape_holds_the_metrics_of_each_host(server, undisturbed):
    """What one host exports beside its frontend is there for each, with its name; the tokens are those put out."""

    def families() -> dict[str, list[Any]]:
        text = server.request("GET", "/metrics").text
        return {family.name: family.samples for family in text_string_to_metric_families(text)}

    def put_out(seen: dict[str, list[Any]]) -> dict[tuple[str, str], float]:
        samples = seen.get("tokenpool:tokens", [])
        return {(s.labels["model_name"], s.labels["host"]): s.value for s in samples if s.value}

    wanted = {(model, host_of(server, model)): float(len(PROMPTS) * NUM_TOKENS) for model in ("a", "b")}
    seen = poll(families, until=lambda seen: put_out(seen) == wanted)
    hosts = set(controller(server)["hosts"])
    for name in ("ledger_ok", "page_size_bytes", "pages", "steps", "switches"):
        assert {sample.labels.get("host") for sample in seen[f"tokenpool:{name}"]} == hosts
    assert [sample.labels for sample in seen["tokenpool:models"] if sample.value] == [{"state": "ready"}]


def test_streams_go_on_when_a_host_process_is_killed(server, undisturbed):
    """The other host loads the model, and its streams go on with equal tokens."""
    victim = host_of(server, "a")
    pid = controller(server)["hosts"][victim]["pid"]

    disturbed = streams(server, lambda: os.kill(pid, signal.SIGKILL))

    assert disturbed == undisturbed
    assert host_of(server, "a") != victim


def test_streams_do_not_notice_that_the_controller_is_killed(server, undisturbed):
    """Tokens do not pass the controller; a new one takes over with a new epoch and moves nothing."""
    before, placed = controller(server), {m: host_of(server, m) for m in ("a", "b")}

    disturbed = streams(server, lambda: os.kill(before["pid"], signal.SIGKILL))

    after = poll(lambda: controller(server), until=lambda told: told["epoch"] > before["epoch"])
    poll(lambda: actions(server), until=lambda seen: seen.count("adopted") == 2)
    assert disturbed == undisturbed
    assert after["pid"] != before["pid"]
    assert {m: host_of(server, m) for m in ("a", "b")} == placed
    assert "add" not in actions(server)


def test_the_new_controller_takes_orders(server, tiny_models):
    """A model comes through the admin API and goes again; a wrong one is refused and leaves no trace."""
    entry = {"name": "c", "model": str(tiny_models.path("llama")), "args": server.pool["models"][0]["args"]}
    added = server.admin("POST", "/models", json=entry)
    assert added.status_code == 201, added.text
    answer = server.request("POST", "/v1/completions", json={"model": "c", "prompt": [1, 2], "max_tokens": 3})
    assert answer.json()["usage"]["completion_tokens"] == 3

    assert server.admin("DELETE", "/models/c").json() == {"name": "c", "removed": True}
    wrong = {**entry, "name": "d", "args": {"max_model_len": 1 << 20}}
    assert server.admin("POST", "/models", json=wrong).status_code == 400
    assert sorted(server.state()["models"]) == ["a", "b"]


def test_models_of_a_lost_node_go_to_the_other(server, nodes, undisturbed):
    """A node whose raylet is killed is lost with its host; everything runs on the one that is left."""
    poll(lambda: len(controller(server)["hosts"]), until=lambda count: count == 2)
    victim = host_of(server, "a")
    lost = controller(server)["hosts"][victim]
    index = [is_descendant(lost["actor_pid"], raylet) for raylet in nodes.raylets].index(True)

    disturbed = streams(server, lambda: nodes.kill(index))

    assert disturbed == undisturbed
    poll(lambda: is_running(lost["pid"]), until=lambda running: not running)
    assert host_of(server, "a") != victim


def is_descendant(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        with open(f"/proc/{pid}/stat") as stat:
            pid = int(stat.read().rpartition(")")[2].split()[1])
    return False
