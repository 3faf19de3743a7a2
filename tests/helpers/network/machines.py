# SPDX-License-Identifier: Apache-2.0
"""Machines of their own on one network, made of Linux namespaces: own addresses, own clocks, cables to pull.

    with Machines(3) as (first, second, third):
        server = subprocess.Popen([*first.enter, "python", "-m", "http.server"])
        with second.inside():                      # this thread's new sockets are second's
            httpx.get(f"http://{first.address}:8000")
        second.unplug()                            # nobody is told: packets to and from it are lost
        second.plug()

The namespaces belong to child processes. Nothing of them has a name outside, and no link leads out: whatever ends this
process ends them, once what runs in them has ended. The end of the `with` block kills that too.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
_NEW_NETWORK = 0x40000000
_KINDS = ("net", "mount", "time")
_UPTIME_S = 100_000
"""By how much each machine has been up for longer than the one before: monotonic clocks have nothing in common."""
_AHEAD_S = 300
"""By how much the wall clock of each machine's Python processes is ahead of that of the machine before."""
_OWN = Path(__file__).with_name("own")
_TOOLS = ("unshare", "nsenter", "ip", "bridge", "mount")
_GATEWAY = "10.0.0.254"
_NOBODY = "02:00:00:00:00:fe"
"""A hardware address that no machine has."""
_STEP_LIMIT_S = 30.0


class Namespaces:
    """Namespaces that live as long as a child process, which ends with this one."""

    def __init__(self, *kinds: str, uptime_s: int = 0) -> None:
        """With the kind `time` their monotonic clock is this far ahead."""
        words = ["unshare", *(f"--{kind}" for kind in kinds)]
        words += [f"--monotonic={uptime_s}", f"--boottime={uptime_s}"] if "time" in kinds else []
        words += ["sh", "-c", "echo; exec cat"]
        self._child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pid = self._child.pid
        assert self._child.stdout is not None
        if not self._child.stdout.readline():  # it has entered them once it says a line
            self.close()
            raise OSError(f"unshare ended with status {self._child.returncode}")
        self.enter = ["nsenter", f"--target={self.pid}", *(f"--{kind}" for kind in kinds), "--"]

    def do(self, line: str) -> None:
        """Run a command in them; raises AssertionError with what it says if it fails."""
        done = subprocess.run([*self.enter, *line.split()], capture_output=True, text=True, timeout=_STEP_LIMIT_S)
        assert done.returncode == 0, f"{line}: {done.stderr}"

    def close(self) -> None:
        """End all that runs there, then the namespaces."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            pipe.close()
        self._child.wait()

    def pids(self) -> list[int]:
        """The processes on that network, the one that holds it aside."""
        try:
            own = os.stat(f"/proc/{self.pid}/ns/net").st_ino
        except OSError:
            return []
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (entry / "ns/net").stat().st_ino == own and int(entry.name) != self.pid:
                    found.append(int(entry.name))
        return found


class Machine:
    """One of them; made by Machines."""

    def __init__(self, number: int, switch: Namespaces, folder: Path) -> None:
        self.name, self.address = f"machine{number}", f"10.0.0.{number}"
        self.folder = folder / self.name
        self.temporary = folder / "tmp"
        """Their temporary folder, as processes of this machine find it: `folder`."""
        self._switch, self._port = switch, f"port{number}"
        self._spaces = Namespaces(*_KINDS, uptime_s=number * _UPTIME_S)
        self.enter = [*self._spaces.enter, "env", f"--chdir={REPOSITORY}", f"TMPDIR={self.temporary}"]
        self.enter += [f"PYTHONPATH={_OWN}", f"TEST_CLOCK_AHEAD_S={(number - 1) * _AHEAD_S}"]
        """Words before a command that is to run there; its process has the same pid as without them."""
        self.folder.mkdir(mode=0o700)
        self.do(f"mount --bind {self.folder} {self.temporary}")
        self.do(f"ip link add eth0 type veth peer name {self._port} netns {switch.pid}")
        for line in (f"address add {self.address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            self.do(f"ip {line}")
        self.do(f"ip route add default via {_GATEWAY}")
        switch.do(f"ip link set {self._port} master bridge0 up")

    def do(self, line: str) -> None:
        """Run a command there; raises AssertionError with what it says if it fails."""
        self._spaces.do(line)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Sockets that this thread makes in the block are on that machine; so are threads and processes it starts."""
        with open("/proc/thread-self/ns/net") as before, open(f"/proc/{self._spaces.pid}/ns/net") as there:
            _enter_network(there.fileno())
            try:
                yield
            finally:
                _enter_network(before.fileno())

    def unplug(self) -> None:
        """Pull the cable: packets to and from it are lost, and no process is told."""
        self._switch.do(f"bridge link set dev {self._port} state 0")

    def plug(self) -> None:
        """Put the cable back."""
        self._switch.do(f"bridge link set dev {self._port} state 3")

    def part_from(self, other: Machine) -> None:
        """Lose the packets between two machines, which reach all others."""
        for one, two in ((self, other), (other, self)):
            one.do(f"ip neighbour replace {two.address} lladdr {_NOBODY} dev eth0 nud permanent")

    def join_with(self, other: Machine) -> None:
        """Let the packets between two machines through again."""
        for one, two in ((self, other), (other, self)):
            one.do(f"ip neighbour del {two.address} dev eth0")

    def pids(self) -> list[int]:
        """The processes that run there."""
        return self._spaces.pids()

    def close(self) -> None:
        """End all that runs there, then the machine."""
        self._spaces.close()


class Machines:
    """So many machines on one switch; a test that makes them is skipped where that cannot be."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __enter__(self) -> Sequence[Machine]:
        if (reason := cannot_be()) is not None:
            pytest.skip(reason)
        with contextlib.ExitStack() as stack:
            folder = tempfile.mkdtemp(prefix="tp-net-", dir="/tmp")  # short: it holds Unix sockets
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            Path(folder, "tmp").mkdir(mode=0o700)
            switch = Namespaces("net")
            stack.callback(switch.close)
            for line in (
                "link add bridge0 type bridge",
                f"address add {_GATEWAY}/24 dev bridge0",
                "link set bridge0 up",
            ):
                switch.do(f"ip {line}")
            machines = []
            for index in range(self._number):
                machines.append(Machine(index + 1, switch, Path(folder)))
                stack.callback(machines[-1].close)
            self._stack = stack.pop_all()
        return machines

    def __exit__(self, *_: object) -> None:
        self._stack.close()


@functools.cache
def cannot_be() -> str | None:
    """Why this process can make no machines; None if it can."""
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"separate machines need {', '.join(missing)} (Debian: iproute2, util-linux)"
    try:
        spaces = Namespaces(*_KINDS)
    except OSError as error:
        return f"separate machines need network, mount and time namespaces, which only root may make: {error}"
    try:
        spaces.do("ip link add veth0 type veth peer name veth1")
        spaces.do("ip link add bridge0 type bridge")
    except AssertionError as error:
        return f"separate machines need veth links and bridges: {error}"
    finally:
        spaces.close()
    return None


def _enter_network(namespace: int) -> None:
    """Move this thread to a network; the others of the process stay where they are."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _NEW_NETWORK) != 0:
        raise OSError(ctypes.get_errno(), "setns")
