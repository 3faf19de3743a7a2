# SPDX-License-Identifier: Apache-2.0
"""Several frontends of a pool on a Ray cluster: any may die, and hosts may too. The tests build on each other."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import TinyModels
from tests.helpers.frontends import BODY, NUM_TOKENS, Stream, clients, complete, frontends
from tests.helpers.server import PoolServerProcess, child_pids, is_running, poll

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ENV = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "1"}


@pytest.fixture(scope="module")
def server(tiny_models: TinyModels) -> Iterator[PoolServerProcess]:
    pytest.importorskip("ray")
    pool = {
        "models": [{"name": "qwen2", "model": str(tiny_models.path("qwen2"))}],
        "device_memory": "32MiB",
        "host_memory": "128MiB",
        "page_size": "1MiB",
        "admin_key": "test-admin-key-0123",
        "frontends": 2,
        "cluster": {"hosts": 2, "replicas": 2, "capacity": "fixed", "transport": "tcp"},
    }
    with PoolServerProcess(pool, env=ENV, flags=["--cluster", "local"]) as process:
        yield process
        pids = [frontend["pid"] for frontend in process.state()["frontends"]]
        assert process.stop() == 0
    assert [pid for pid in pids if is_running(pid)] == []


def serving(server: PoolServerProcess, model: str = "qwen2") -> list[str]:
    return sorted(h for h, state in server.state()["models"][model]["hosts"].items() if state == "serving")


def both_serve(server: PoolServerProcess, model: str = "qwen2") -> None:
    poll(lambda: serving(server, model), until=lambda hosts: hosts == ["host-0", "host-1"])


def test_both_serve_from_both_hosts(server: PoolServerProcess, pool_server: PoolServerProcess) -> None:
    """The tokens are those of a single host and frontend, and what is told is the same at both."""
    single = pool_server.request("POST", "/v1/completions", json=BODY | {"return_token_ids": True})
    expected = single.json()["choices"][0]["token_ids"]
    both_serve(server)
    with clients(server) as both:
        assert [complete(client) for client in both for _ in range(2)] == [expected] * 4
        assert [client.get("/ready").status_code for client in both] == [200, 200]
        for path in ("/v1/pool/decisions", "/v1/pool/state", "/v1/pool/trace"):
            answers = [client.get(path, headers=server.headers(server.admin_key)) for client in both]
            assert [answer.status_code for answer in answers] == [200, 200], path
        assert both[0].post("/v1/pool/check", headers=server.headers(server.admin_key)).json() == {"ok": True}
        assert 'host="host-1"' in both[1].get("/metrics").text


def test_a_dead_frontend_takes_only_its_own_streams(server: PoolServerProcess) -> None:
    """The other one's stream and its new requests go on; both are there again, and hosts have forgotten the dead."""
    with clients(server) as (first, second), ExitStack() as stack:
        expected = Stream(second, stack).rest()
    dead = frontends(server)[0]
    with clients(server) as (first, second), ExitStack() as stack:
        lost, kept = Stream(first, stack), Stream(second, stack)
        os.kill(dead, signal.SIGKILL)
        with pytest.raises(httpx.HTTPError):
            lost.rest()
        assert kept.rest() == expected
        assert len(complete(second)) == NUM_TOKENS
    poll(lambda: [f["pid"] for f in server.state()["frontends"]], until=lambda p: len(p) == 2 and dead not in p)
    assert server.state()["frontend_restarts"] == 1
    both_serve(server)
    with clients(server) as both:
        assert [len(complete(client)) for client in both] == [NUM_TOKENS] * 2
    poll(lambda: _running(server), until=lambda count: count == 0)


def _running(server: PoolServerProcess) -> int:
    hosts: dict[str, Any] = server.state()["hosts"]
    return sum(host["models"]["qwen2"]["running"] + host["models"]["qwen2"]["waiting"] for host in hosts.values())


def test_streams_of_both_go_on_when_a_host_dies(server: PoolServerProcess) -> None:
    with clients(server) as both, ExitStack() as stack:
        expected = Stream(both[0], stack).rest()
    with clients(server) as both, ExitStack() as stack:
        streams = [Stream(client, stack) for client in both]
        controller = server.state()["cluster"]["controller"]
        os.kill(controller["hosts"]["host-0"]["pid"], signal.SIGKILL)
        assert [stream.rest() for stream in streams] == [expected] * 2
    both_serve(server)


def test_a_model_comes_and_goes_at_both(server: PoolServerProcess, tiny_models: TinyModels) -> None:
    added = {"name": "late", "model": str(tiny_models.path("llama")), "args": ["--max-model-len", "128"]}
    with clients(server) as both:
        answer = both[0].post("/v1/pool/models", json=added, headers=server.headers(server.admin_key), timeout=120)
        assert answer.status_code == 201, answer.text
        assert [len(complete(client, model="late")) for client in both] == [NUM_TOKENS] * 2
        answer = both[1].delete("/v1/pool/models/late", headers=server.headers(server.admin_key))
        assert answer.status_code == 200, answer.text
        statuses = [client.post("/v1/completions", json={"model": "late", "prompt": "x"}) for client in both]
        assert [status.status_code for status in statuses] == [404, 404]


def test_both_serve_on_without_rays_head(server: PoolServerProcess) -> None:
    """For longer than Ray lets its processes live: the Ray that a server starts is told so. Both say it."""
    assert server.process is not None
    children = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in child_pids(server.process.pid)}
    (head,) = (pid for pid, words in children.items() if "gcs_server" in words.split("\0")[0])
    assert server.state()["cluster"]["head"] == {"up": True, "away_s": 0.0}
    with clients(server) as both, ExitStack() as stack:
        expected = Stream(both[0], stack).rest()
        running = [Stream(client, stack) for client in both]
        os.kill(head, signal.SIGKILL)
        assert [stream.rest() for stream in running] == [expected] * 2
    poll(lambda: server.state()["cluster"]["head"]["away_s"], until=lambda away_s: away_s > 75, limit_s=180)
    with clients(server) as both:
        assert [len(complete(client)) for client in both] == [NUM_TOKENS] * 2
        for client in both:
            assert re.search(r"^tokenpool:cluster_head_up(?:{[^}]*})? 0.0$", client.get("/metrics").text, re.M)
    both_serve(server)
