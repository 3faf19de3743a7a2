# SPDX-License-Identifier: Apache-2.0
"""A killed host is forked from the template, or started without one, and nobody can tell which."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TinyModels
from tests.helpers.server import PoolServerProcess, child_pids, is_running, poll
from tests.process.told_child import files_of, status_of
from tests.serve.client.test_failover import Call
from tests.serve.pool.test_hung_host import HOST_TIMEOUT_S, replaced_when_it_hangs

pytestmark = pytest.mark.vllm

LONG = {"model": "qwen2", "temperature": 0, "max_tokens": 900}
FORKED = "engine host forked from the template"
_SAME = ("Umask", "Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "CapEff", "Cpus_allowed")


@pytest.fixture(scope="module")
def server(tiny_models: TinyModels) -> Iterator[PoolServerProcess]:
    args = {"max_model_len": 2048}
    pool = {
        "models": [{"name": kind, "model": str(tiny_models.path(kind)), "args": args} for kind in ("llama", "qwen2")],
        "device_memory": "64MiB",
        "page_size": "1MiB",
        "host_timeout": HOST_TIMEOUT_S,
        "api_key": "test-api-key-0123",
        "admin_key": "test-admin-key-0123",
    }
    with PoolServerProcess(pool, env={"TOKENPOOL_LOG_LEVEL": "INFO"}) as made:
        yield made


def template_of(server: PoolServerProcess) -> int:
    """The pid of a template that is ready."""
    state = poll(server.state, until=lambda state: state["host_template"]["state"] == "ready")
    return state["host_template"]["pid"]


def appearance(pid: int) -> dict[str, Any]:
    """What an operator, the kernel or a child of the process could tell it by."""
    status, folder = status_of(pid), Path(f"/proc/{pid}")
    files = {target.partition(":")[0].replace(str(pid), "PID") for target in files_of(pid).values()}
    shown = dict(line.split("=", 1) for line in (folder / "environ").read_text().split("\0") if "=" in line)
    shown.pop("TOKENPOOL_CONTROL_KEY", None)
    command = (folder / "cmdline").read_text().rstrip("\0").split("\0")
    command[3] = os.path.basename(command[3])
    stat = (folder / "stat").read_text().rpartition(")")[2].split()
    return {
        "status": {name: status[name] for name in _SAME if name in status},
        "signals": int(status["SigCgt"], 16) & ~(1 << 32),  # one is glibc's
        "blocked": blocked_signals(pid),
        "ignored": int(status["SigIgn"], 16) & ~1,  # under nohup the template was made while SIGHUP was still ignored
        "files": files,
        "environment": shown,
        "command": command,
        "parent": stat[1],
        "leads": [stat[2] == str(pid), stat[3] == str(pid)],
        "limits": (folder / "limits").read_text(),
        "oom_score": (folder / "oom_score_adj").read_text(),
        "cgroup": (folder / "cgroup").read_text(),
        "name": (folder / "comm").read_text(),
    }


def blocked_signals(pid: int) -> int:
    """Those that stay blocked: glibc blocks all of them for the moment in which a thread makes another."""
    blocked = -1
    for _ in range(5):
        blocked &= int(status_of(pid)["SigBlk"], 16)
        time.sleep(0.01)
    return blocked


def killed_under_a_stream(server: PoolServerProcess) -> tuple[dict[str, Any], int]:
    """Kill the host while a stream runs; returns what its client got, and the new host."""
    before = server.wait_until_idle()["host_pid"]
    call = Call(server, **LONG)
    call.wait_until_begun()
    os.kill(before, signal.SIGKILL)
    result = call.result()
    server.wait_until_ready(120)
    after = server.wait_until_idle()["host_pid"]
    assert before != after
    return result, after


def test_whoever_kills_the_template_changes_nothing(server: PoolServerProcess) -> None:
    """The host lives on; one that is killed then is back with the next template, and no process is left over."""
    alone, template, host = Call(server, **LONG).result(), template_of(server), server.host_pid
    os.kill(template, signal.SIGKILL)
    assert alone == Call(server, **LONG).result()
    assert host == server.host_pid

    result, after = killed_under_a_stream(server)
    assert alone == result
    assert server.process is not None and template != template_of(server)
    assert {after, template_of(server)} <= child_pids(server.process.pid)
    zombies = [pid for pid in _children(server.process.pid) if not is_running(pid)]
    assert [] == zombies


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_hosts_from_a_template_and_without_one_are_alike(server: PoolServerProcess) -> None:
    """To their streams, and to whoever looks at the process; a template that is stopped holds no host up."""
    alone = Call(server, **LONG).result()
    for _ in range(5):  # a template that a busy machine holds up for two seconds is given up, rightly
        template, forks = template_of(server), server.log.count(FORKED)
        first, forked = killed_under_a_stream(server)
        by_fork = appearance(forked)
        assert alone == first
        if template == template_of(server) and server.log.count(FORKED) == forks + 1:
            break
    else:
        pytest.fail("no host was forked from the template")

    for _ in range(5):  # on a busy machine the next template may be there before the host is
        template, forks = template_of(server), server.log.count(FORKED)
        os.kill(template, signal.SIGSTOP)
        second, spawned = killed_under_a_stream(server)
        by_spawn = appearance(spawned)
        assert alone == second
        assert not is_running(template)
        if forks == server.log.count(FORKED):
            break
    else:
        pytest.fail("no host was started without a template")
    for what, seen in by_spawn.items():
        assert seen == by_fork[what], (what, seen, by_fork[what])


def test_a_stopped_host_is_overdue_then_replaced_and_loses_nothing(server: PoolServerProcess) -> None:
    """Whichever way it was started."""
    replaced_when_it_hangs(server, frontends=1)


def test_a_server_that_is_killed_takes_its_host_along(server: PoolServerProcess) -> None:
    """Also one that is forked; last, for the server is gone then."""
    _, host = killed_under_a_stream(server)
    assert server.process is not None
    server.process.kill()
    server.process.wait()
    poll(lambda: not is_running(host))
