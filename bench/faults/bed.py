# SPDX-License-Identifier: Apache-2.0
"""Where a pool runs whose parts die: Ray nodes on this machine, or machines of their own made of Linux namespaces.

On the second one networks are cut too, and Ray's head dies, which has a Redis. It needs root, and redis-server.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.parts.ray_nodes import RayNodes
from tests.helpers.network.cluster import RayOnMachines
from tests.helpers.network.machines import Machine, Machines, cannot_be
from tests.helpers.network.storage import redis_on, redis_server
from tests.helpers.network.tcp import tcp_sockets

NUM_HOSTS = 3
Hosts = Mapping[str, Mapping[str, Any]]
"""Of each host, what the controller says: its `pid` and `actor_pid` among it."""


class Bed(ABC):
    """A Ray cluster with room for NUM_HOSTS hosts."""

    address: str

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def place(self, server: int) -> dict[str, Any]:
        """Arguments of `common.Server` for the first server, or another one."""
        return {}

    @abstractmethod
    def kill_node(self, hosts: Hosts, rng: random.Random) -> str:
        """Kill the raylet of a host's node; returns whose."""

    def mend(self) -> None:
        """Replace what was killed, and join what was cut."""
        while self._undo:
            self._undo.pop()()


class OneMachine(Bed):
    """Needs no rights."""

    def __init__(self, stack: ExitStack) -> None:
        super().__init__()
        self._nodes = stack.enter_context(RayNodes(num_nodes=NUM_HOSTS, cpus_per_node=1))
        self.address = self._nodes.address

    def kill_node(self, hosts: Hosts, rng: random.Random) -> str:
        """See Bed."""
        parents = {_parent(host["actor_pid"]): name for name, host in hosts.items()}
        index = rng.choice([i for i, pid in enumerate(self._nodes.raylets) if pid in parents])
        self._nodes.kill(index)
        self._undo.append(self._nodes.add)
        return f"node of {parents[self._nodes.raylets[index]]}"


class Network(Bed):
    """Head, first server, and one machine for each host, the first of which has the second server too."""

    def __init__(self, stack: ExitStack) -> None:
        super().__init__()
        self._machines = stack.enter_context(Machines(2 + NUM_HOSTS))
        self._head, self._first, self._second = self._machines[:3]
        env = stack.enter_context(redis_on(self._head))
        env |= {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
        self._ray = RayOnMachines(self._machines, env=env, num_bare=2)
        self.address = self._ray.address

    @staticmethod
    def cannot_be() -> str | None:
        """Why it cannot be made here; None if it can."""
        return cannot_be() or (None if redis_server() else "Ray's head needs redis-server to come back")

    def place(self, server: int) -> dict[str, Any]:
        """See Bed."""
        machine = self._second if server else self._first
        return {"enter": machine.enter, "inside": machine.inside}

    def kill_node(self, hosts: Hosts, rng: random.Random) -> str:
        """See Bed; of one without a server."""
        name, machine = self._machine_of(hosts, rng)
        self._ray.kill(machine, "raylet")
        self._undo.append(lambda: self._ray.start(machine))
        return f"node of {name}"

    def kill_head(self) -> str:
        """Kill all of Ray on the head's machine, the controller too if it is there."""
        self._ray.kill(self._head)
        self._undo.append(lambda: self._ray.start(self._head))
        return "Ray's head"

    def cut_host(self, hosts: Hosts, rng: random.Random) -> str:
        """Cut the machine of a host off."""
        name, machine = self._machine_of(hosts, rng)
        machine.unplug()
        self._undo.append(machine.plug)
        return f"cable of {name}"

    def cut_server(self) -> str:
        """Cut the machine of the first server off."""
        self._first.unplug()
        self._undo.append(self._first.plug)
        return "cable of the first server"

    def part(self, hosts: Hosts, rng: random.Random) -> str:
        """Lose what the first server and a host send each other."""
        name, machine = self._machine_of(hosts, rng)
        self._first.part_from(machine)
        self._undo.append(lambda: self._first.join_with(machine))
        return f"way between the first server and {name}"

    def _machine_of(self, hosts: Hosts, rng: random.Random) -> tuple[str, Machine]:
        """A host whose machine has no server."""
        found = {}
        for machine in self._machines[3:]:
            pids = set(machine.pids())
            found |= {name: machine for name, host in hosts.items() if host["pid"] in pids}
        name = rng.choice(sorted(found))
        return name, found[name]


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def client_ports(pid: int) -> frozenset[int]:
    """The other ends of a process's TCP connections within its machine, over IPv4."""
    return frozenset(port for _, (address, port), _ in tcp_sockets(pid) if address == "127.0.0.1")
