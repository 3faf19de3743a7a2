# SPDX-License-Identifier: Apache-2.0
"""A Ray cluster with a node on each machine of a network, and servers of a pool on them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx

from bench.parts.ray_nodes import ENV
from tests.helpers.network.machines import Machine
from tests.helpers.server import WAIT_LIMIT_S, PoolServerProcess, is_running, poll

_PORT = 6379
_START_LIMIT_S = 120.0
KEY = "test-admin-key-0123"


class RayOnMachines:
    """The first machine has the head; each has room for one host, the first `num_bare` aside. It ends with them."""

    def __init__(self, machines: Sequence[Machine], *, env: Mapping[str, str] | None = None, num_bare: int = 1) -> None:
        """`env` is that of all of Ray's processes."""
        self.machines, self._bare = machines, machines[:num_bare]
        self.address = f"{machines[0].address}:{_PORT}"
        self._env = {**os.environ, **ENV, **(env or {})}
        self.start(machines[0])
        with ThreadPoolExecutor(len(machines)) as threads:
            list(threads.map(self.start, machines[1:]))

    def start(self, machine: Machine) -> None:
        """Start the node of a machine; returns once it has joined."""
        is_head = machine is self.machines[0]
        words = ["--head", f"--port={_PORT}", "--include-dashboard=false"] if is_head else [f"--address={self.address}"]
        words += [f"--num-cpus={0 if machine in self._bare else 1}", f"--node-ip-address={machine.address}"]
        command = [*machine.enter, str(Path(sys.executable).with_name("ray")), "start", *words]
        command += [f"--object-store-memory={80 << 20}", "--disable-usage-stats"]
        done = subprocess.run(command, env=self._env, capture_output=True, text=True, timeout=_START_LIMIT_S)
        assert done.returncode == 0, f"no Ray node on {machine.name}: {done.stdout[-2000:]}{done.stderr[-2000:]}"

    def kill(self, machine: Machine, *names: str) -> None:
        """End Ray's own processes of that name on a machine, all of them without a name, by SIGKILL."""
        pids = [pid for pid in machine.pids() if (name := _ray_name(pid)) and (not names or name in names)]
        assert pids, f"no {' or '.join(names) or 'Ray'} on {machine.name}"
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        poll(lambda: [pid for pid in pids if is_running(pid)], until=lambda left: left == [])
        # With it, and the processes of the other machines in sight, Ray takes the head for running.
        (machine.folder / "ray" / "ray_current_cluster").unlink(missing_ok=True)


def _ray_name(pid: int) -> str:
    """What a process is in Ray: `gcs_server`, `raylet`, `worker`, another part of it; empty for none of these."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    first = words[0].decode()
    if first.startswith("ray::"):
        return "worker"
    if "/ray/" in first:
        return Path(first).name
    return next((Path(word.decode()).stem for word in words[1:4] if b"/ray/" in word), "")


class ServerOnMachine(PoolServerProcess):
    """A server of the pool there; requests to it come from its own machine, whose cable they need not."""

    def __init__(
        self, machine: Machine, pool: Mapping[str, Any], flags: Sequence[str], env: Mapping[str, str] | None = None
    ) -> None:
        self.machine = machine
        given = {**ENV, "TOKENPOOL_LOG_LEVEL": "INFO", **(env or {})}
        super().__init__({"admin_key": KEY, **pool}, env=given, flags=flags, enter=machine.enter)

    def inside(self) -> AbstractContextManager[object]:
        """See PoolServerProcess."""
        return self.machine.inside()

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """See PoolServerProcess."""
        with self.inside():
            return super().request(method, path, **options)

    def admin(self, method: str, path: str, json: Any = None) -> httpx.Response:
        """See PoolServerProcess."""
        with self.inside():
            return super().admin(method, path, json)

    def wait_until_ready(self, limit_s: float = WAIT_LIMIT_S) -> None:
        """See PoolServerProcess."""
        with self.inside():
            super().wait_until_ready(limit_s)

    def end(self) -> None:
        """End the server, and nothing else, by SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()


def controller(server: PoolServerProcess) -> dict[str, Any]:
    """What the controller says of itself, once it is there."""
    told: dict[str, Any] = poll(lambda: server.state()["cluster"]["controller"], until=lambda seen: "epoch" in seen)
    return told


def decisions(server: PoolServerProcess) -> list[dict[str, Any]]:
    """What the controller has decided, once it is there."""
    answer = poll(lambda: server.admin("GET", "/decisions"), until=lambda answer: answer.status_code == 200)
    found: list[dict[str, Any]] = answer.json()["decisions"]
    return found


def builds(server: PoolServerProcess) -> int:
    """How many models hosts have built, by this controller's orders."""
    return [decision["action"] for decision in decisions(server)].count("model_added")
