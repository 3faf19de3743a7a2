# SPDX-License-Identifier: Apache-2.0
"""Nobody owns a pool on a Ray cluster: servers come, die and come back, and hosts keep their models.

The tests use one cluster and build on each other, in this order.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.parts.ray_nodes import ENV, RayNodes
from tests.conftest import TinyModels
from tests.helpers.server import ENV as SERVER_ENV
from tests.helpers.server import REPOSITORY, WAIT_LIMIT_S, PoolServerProcess, Stream, is_running, poll
from tokenpool.tenant_config import hash_key

pytestmark = pytest.mark.ray

KEY = "test-admin-key-0123"
BODY = {"prompt": [5] * 20, "max_tokens": 24, "ignore_eos": True, "temperature": 0, "return_token_ids": True}


class Cluster:
    """A Ray cluster with a pool file, and the servers that a test starts and kills."""

    def __init__(self, nodes: RayNodes, pool: dict[str, Any], stack: ExitStack) -> None:
        self.nodes, self.pool = nodes, pool
        self._stack = stack
        self.flags = ["--cluster", nodes.address]

    def serve(self, **changes: Any) -> PoolServerProcess:
        """One more server, once it is ready."""
        server = PoolServerProcess(self.pool | changes, env={**ENV, "TOKENPOOL_LOG_LEVEL": "INFO"}, flags=self.flags)
        server.__enter__()
        self._stack.callback(lambda: server.running and server.kill())
        return server

    def refused(self, **changes: Any) -> str:
        """What a server says that is not let in."""
        server = PoolServerProcess(self.pool | changes, env=ENV, flags=self.flags)
        with pytest.raises(AssertionError, match="the server ended with status 2"):
            server.__enter__()
        return server.log

    def down(self, *words: str) -> str:
        """What `tokenpool down` says."""
        command = [sys.executable, "-m", "tokenpool.cli.main", "down", *words, *self.flags]
        env = {**os.environ, **SERVER_ENV, **ENV}
        done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout


def kill(server: PoolServerProcess) -> None:
    """End a server, and nothing else, by SIGKILL; what belongs to it ends by itself."""
    assert server.process is not None
    server.process.kill()
    server.process.wait()


def complete(server: PoolServerProcess, model: str = "a") -> list[int]:
    answer = server.request("POST", "/v1/completions", json=BODY | {"model": model})
    assert answer.status_code == 200, answer.text
    tokens: list[int] = answer.json()["choices"][0]["token_ids"]
    return tokens


def long_stream(server: PoolServerProcess, model: str = "a") -> Stream:
    """A stream whose first token has come."""
    stream = Stream(server, BODY["prompt"], 400, model)
    poll(lambda: bool(stream.tokens or stream.problem))
    return stream


def told(server: PoolServerProcess) -> dict[str, Any]:
    """What the controller says of itself, once it is there."""
    found: dict[str, Any] = poll(lambda: server.state()["cluster"]["controller"], until=lambda seen: "epoch" in seen)
    return found


def host_pids(server: PoolServerProcess) -> dict[str, int]:
    return {name: host["pid"] for name, host in told(server)["hosts"].items()}


def builds(server: PoolServerProcess) -> int:
    """How many models hosts have built, by this controller's orders."""
    return [d["action"] for d in server.admin("GET", "/decisions").json()["decisions"]].count("model_added")


def servers(server: PoolServerProcess) -> list[int]:
    """Pids of the pool's servers, eldest first."""
    return [peer["pid"] for peer in server.state()["cluster"]["servers"]]


def pid_of(server: PoolServerProcess) -> int:
    assert server.process is not None
    return server.process.pid


@pytest.fixture(scope="module")
def temporary() -> Iterator[Path]:
    """The temporary folder of all that runs here, with a short path: it holds Unix sockets."""
    before = os.environ.get("TMPDIR")
    with tempfile.TemporaryDirectory(prefix="tp-", dir="/tmp") as folder:
        os.environ["TMPDIR"] = folder
        yield Path(folder)
        os.environ.pop("TMPDIR")
        if before is not None:
            os.environ["TMPDIR"] = before


@pytest.fixture(scope="module")
def cluster(temporary: Path, tiny_models: TinyModels) -> Iterator[Cluster]:
    pytest.importorskip("ray")
    pool = {
        "models": [{"name": "a", "model": str(tiny_models.path("llama"))}],
        "device_memory": "32MiB",
        "host_memory": "128MiB",
        "page_size": "1MiB",
        "admin_key": KEY,
        "cluster": {"hosts": 2, "replicas": 2, "capacity": "fixed", "frontend_timeout": "4s"},
    }
    with RayNodes(num_nodes=2, cpus_per_node=1) as nodes, ExitStack() as stack:
        yield Cluster(nodes, pool, stack)


@pytest.fixture(scope="module")
def starter(cluster: Cluster) -> PoolServerProcess:
    """The server that started the pool."""
    started = cluster.serve()
    poll(lambda: builds(started), until=lambda count: count == 2)
    return started


@pytest.fixture(scope="module")
def second(cluster: Cluster, starter: PoolServerProcess) -> PoolServerProcess:
    """A server that joined it."""
    return cluster.serve()


def test_two_servers_are_equal(starter: PoolServerProcess, second: PoolServerProcess) -> None:
    """The second one serves the engines that are there: nothing is built for it, and tokens are equal."""
    assert complete(second) == complete(starter)
    assert servers(starter) == servers(second) == [pid_of(starter), pid_of(second)]
    assert (builds(second), len(host_pids(second))) == (2, 2)
    assert second.admin("POST", "/check").json() == {"ok": True}


@pytest.mark.slow
def test_what_one_server_changes_reaches_the_other(
    starter: PoolServerProcess, second: PoolServerProcess, tiny_models: TinyModels
) -> None:
    """Whoever adds a model is answered once both serve it; removed by the other one, it is gone at both."""
    added = {"name": "late", "model": str(tiny_models.path("qwen2")), "args": starter.pool["models"][0]["args"]}
    assert second.admin("POST", "/models", added).status_code == 201
    assert complete(starter, "late") == complete(second, "late")
    assert second.admin("POST", "/models", added).status_code == 400, "the name is taken"
    stream = long_stream(second, "late")
    assert starter.admin("DELETE", "/models/late?drain=30s").status_code == 200
    assert len(stream.rest()) == 400, "a removal through one server lets the other one's requests finish"
    for server in (starter, second):
        poll(lambda server=server: sorted(server.state()["models"]), until=lambda names: names == ["a"])


def test_the_server_that_started_the_pool_is_killed(
    cluster: Cluster, starter: PoolServerProcess, second: PoolServerProcess
) -> None:
    """The other one's stream goes on; hosts keep their processes, build nothing and forget the dead one's requests."""
    before, pids, expected = builds(second), host_pids(second), long_stream(second).rest()
    kept, lost = long_stream(second), long_stream(starter)  # the last is at its beginning when it is cut
    kill(starter)
    assert kept.rest() == expected
    lost.join(WAIT_LIMIT_S)
    assert lost.problem is not None
    assert (host_pids(second), builds(second)) == (pids, before)
    poll(lambda: servers(second), until=lambda pids: pids == [pid_of(second)])
    poll(lambda: _unfinished(second), until=lambda count: count == 0)
    assert complete(second) == expected[: BODY["max_tokens"]]


def _unfinished(server: PoolServerProcess) -> int:
    hosts = server.state()["hosts"].values()
    return sum(host["models"]["a"]["running"] + host["models"]["a"]["waiting"] for host in hosts)


@pytest.mark.slow
def test_a_pool_without_any_server_lives_on(cluster: Cluster, second: PoolServerProcess) -> None:
    """All servers are killed, then the controller: the next server finds the same processes, and nothing is built."""
    pids, before = host_pids(second), told(second)
    kill(second)
    os.kill(before["pid"], signal.SIGKILL)
    third = cluster.serve()
    assert host_pids(third) == pids
    assert (builds(third), told(third)["epoch"] > before["epoch"]) == (0, True)
    assert len(complete(third)) == BODY["max_tokens"]
    assert third.stop() == 0
    assert [pid for pid in pids.values() if not is_running(pid)] == [], "a server that stops leaves the pool"


@pytest.mark.slow
def test_a_server_with_other_settings_or_another_file_is_refused(cluster: Cluster, tiny_models: TinyModels) -> None:
    """In one line that names what differs; the pool does not notice."""
    server = cluster.serve()
    assert "with other settings: device_memory;" in cluster.refused(device_memory="33MiB")
    other = {"name": "b", "model": str(tiny_models.path("qwen2"))}
    assert "another pool file: b;" in cluster.refused(models=[*cluster.pool["models"], other])
    assert servers(server) == [pid_of(server)]
    kill(server)


@pytest.mark.slow
def test_down_leaves_nothing(cluster: Cluster, temporary: Path) -> None:
    """Servers finish their streams and end with status 0; no process and no file is left, and it may be said twice."""
    first, server = cluster.serve(), cluster.serve(frontends=2)
    before = told(server)
    pids = [before["pid"], *(pid for host in before["hosts"].values() for pid in (host["pid"], host["actor_pid"]))]
    stream = long_stream(first)
    file = temporary / "pool.yaml"
    file.write_text(yaml.safe_dump(cluster.pool))

    assert cluster.down(str(file)) == "pool tokenpool has ended\n"
    assert len(stream.rest()) == 400
    for process in (first.process, server.process):
        assert process is not None and process.wait(WAIT_LIMIT_S) == 0
    poll(lambda: [pid for pid in pids if is_running(pid)], until=lambda left: left == [])
    left = [path.name for path in temporary.iterdir() if path.name.startswith("tokenpool-")]
    assert [name for name in left if not name.startswith(("tokenpool-test-", "tokenpool-state-"))] == []
    assert cluster.down() == "there is no pool tokenpool\n"


@pytest.mark.slow
def test_of_two_servers_that_start_at_once_one_starts_the_pool(cluster: Cluster) -> None:
    """Both serve, from one set of hosts, each model built once per host; `down` while a third one starts ends all."""
    made: list[PoolServerProcess] = []
    threads = [threading.Thread(target=lambda: made.append(cluster.serve())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * WAIT_LIMIT_S)
    assert sorted(servers(made[0])) == sorted(map(pid_of, made))
    poll(lambda: builds(made[0]), until=lambda count: count == 2)
    assert complete(made[0]) == complete(made[1])
    assert sum("joining pool" in server.log for server in made) == 1

    late = threading.Thread(target=lambda: _try(cluster.serve), daemon=True)
    late.start()
    assert cluster.down() == "pool tokenpool has ended\n"
    assert [server.process.wait(WAIT_LIMIT_S) for server in made if server.process is not None] == [0, 0]
    late.join(4 * WAIT_LIMIT_S)
    cluster.down()


def _try(serve: Callable[[], object]) -> None:
    with suppress(AssertionError):
        serve()


TENANT_KEY = "test-tenant-key-0123"


def ask_as_tenant(server: PoolServerProcess) -> int:
    body = BODY | {"model": "a", "max_tokens": 1}
    return server.request("POST", "/v1/completions", json=body, headers=server.headers(TENANT_KEY)).status_code


def of_tenant(server: PoolServerProcess) -> dict[str, Any]:
    tenant: dict[str, Any] = server.admin("GET", "/tenants").json()["tenants"]["t"]
    return tenant


@pytest.mark.slow
def test_a_limit_of_a_tenant_holds_at_all_servers_together(cluster: Cluster) -> None:
    """What is let in at two servers, one of which has two frontends, is what one would let in; then one takes all."""
    limits = {"requests_per_minute": 40, "max_concurrent": 3}
    tenants = [{"name": "t", "keys": hash_key(TENANT_KEY), **limits}]
    both = cluster.serve(tenants=tenants), cluster.serve(tenants=tenants, frontends=2)
    poll(lambda: [of_tenant(server)["share"] for server in both], until=lambda shares: 0.9 < sum(shares) <= 1.0)
    began_s = time.monotonic()
    statuses = [ask_as_tenant(server) for _ in range(40) for server in both]
    most = limits["requests_per_minute"] * (1 + (time.monotonic() - began_s) / 60) + len(both)
    assert set(statuses) == {200, 429}
    assert limits["requests_per_minute"] // 2 < statuses.count(200) <= most
    assert sum(of_tenant(server)["share"] for server in both) <= 1.0 + 1e-9

    kill(both[1])
    poll(lambda: of_tenant(both[0])["share"], until=lambda share: share > 0.99)
    assert cluster.down() == "pool tokenpool has ended\n"


@pytest.mark.slow
def test_a_pool_that_nobody_looks_at_ends(cluster: Cluster) -> None:
    """After `orphan_timeout` without a server, hosts and controller are gone."""
    server = cluster.serve(cluster={**cluster.pool["cluster"], "orphan_timeout": "3s"})
    before = told(server)
    pids = [before["pid"], *(host["pid"] for host in before["hosts"].values())]
    kill(server)
    poll(lambda: [pid for pid in pids if is_running(pid)], until=lambda left: left == [])
    assert cluster.down() == "there is no pool tokenpool\n"
