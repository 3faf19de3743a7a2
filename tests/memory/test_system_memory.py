# SPDX-License-Identifier: Apache-2.0
"""What the machine's memory and the limits of nested cgroups leave, read from trees of files like the kernel's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tokenpool.memory import system_memory as module
from tokenpool.memory.system_memory import SystemMemory, system_memory

pytestmark = pytest.mark.cpu

GIB = 1 << 30
MACHINE = SystemMemory(64 * GIB, 40 * GIB, False)
NO_LIMIT_V1 = 9223372036854771712
"""What version 1 writes where there is none."""


class Tree:
    """A folder as /sys/fs/cgroup, and a file as /proc/self/cgroup."""

    def __init__(self, folder: Path, memberships: str) -> None:
        self.root = folder / "cgroup"
        self.own = folder / "own"
        self.own.write_text(memberships)

    def write(self, path: str = "", **files: object) -> None:
        """Write files of one cgroup; `max` is memory.max."""
        place = self.root / path
        place.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (place / f"memory.{name}").write_text(f"{content}\n")

    def read(self) -> SystemMemory:
        return system_memory(self.root, self.own)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total=MACHINE.total_bytes, available=MACHINE.available_bytes)
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: memory)


def test_a_container_has_what_its_limit_leaves(tmp_path):
    """Version 2 as a pod sees it: its own cgroup is the root. File caches that can be dropped are not used memory."""
    tree = Tree(tmp_path, "0::/\n")
    tree.write(max=4 * GIB, high="max", current=3 * GIB)
    assert tree.read() == (4 * GIB, GIB, True)

    tree.write(stat=f"anon {GIB}\ninactive_file {2 * GIB}")
    assert tree.read() == (4 * GIB, 3 * GIB, True)


@pytest.mark.parametrize("limits", [{"max": "max", "high": 2 * GIB}, {"max": 2 * GIB, "high": 3 * GIB}])
def test_the_smaller_of_max_and_high_counts(tmp_path, limits):
    """Above `high` the kernel slows a cgroup down until it is of no use."""
    tree = Tree(tmp_path, "0::/\n")
    tree.write(**limits, current=GIB)

    assert tree.read() == (2 * GIB, GIB, True)


@pytest.mark.parametrize("tight", ["", "kube", "kube/pod", "kube/pod/box"])
def test_the_level_that_leaves_least_counts(tmp_path, tight):
    """A limit holds for all cgroups below it, with what all of them use."""
    tree = Tree(tmp_path, "0::/kube/pod/box\n")
    for path in ("", "kube", "kube/pod", "kube/pod/box"):
        tree.write(path, max=8 * GIB, current=(7 if path == tight else 1) * GIB)

    assert tree.read() == (8 * GIB, GIB, True)


def test_the_smallest_limit_and_the_least_left_may_be_of_two_levels(tmp_path):
    """The total is of the one, what is available of the other."""
    tree = Tree(tmp_path, "0::/pod/box\n")
    tree.write("pod", max=16 * GIB, current=15 * GIB)
    tree.write("pod/box", max=8 * GIB, current=2 * GIB)

    assert tree.read() == (8 * GIB, GIB, True)


def test_version_1_with_a_path_that_is_not_mounted(tmp_path):
    """A container may see the path of the host, but its own cgroup as the root."""
    tree = Tree(tmp_path, "9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/\n")
    tree.write("memory", limit_in_bytes=4 * GIB, usage_in_bytes=2 * GIB, stat=f"total_inactive_file {GIB}")

    assert tree.read() == (4 * GIB, 3 * GIB, True)


def test_version_1_tells_of_limits_above_that_cannot_be_seen(tmp_path):
    """memory.stat has the smallest limit of the whole way up."""
    tree = Tree(tmp_path, "4:memory:/box\n")
    stat = f"hierarchical_memory_limit {2 * GIB}"
    tree.write("memory/box", limit_in_bytes=NO_LIMIT_V1, usage_in_bytes=GIB, stat=stat)

    assert tree.read() == (2 * GIB, GIB, True)


@pytest.mark.parametrize("memberships", ["", "0::/\n", "4:memory:/a/b\n3:cpu:/\n", "0::/../..\n", "no such line"])
def test_without_a_limit_the_machine_counts(tmp_path, memberships):
    """Nothing mounted, or `max`, or the number that version 1 writes, or more than the machine has."""
    tree = Tree(tmp_path, memberships)
    assert tree.read() == MACHINE

    tree.write(max="max", high=f"{100 * GIB}", current=GIB)
    tree.write("memory", limit_in_bytes=NO_LIMIT_V1, usage_in_bytes=50 * GIB)
    assert tree.read() == MACHINE


def test_a_machine_that_has_less_than_the_limit_counts(tmp_path):
    """Other processes of the machine may hold what the cgroup would allow."""
    tree = Tree(tmp_path, "0::/\n")
    tree.write(max=60 * GIB, current=GIB)

    assert tree.read() == (60 * GIB, 40 * GIB, True)


def test_more_in_use_than_allowed_leaves_nothing(tmp_path):
    """`high` may be exceeded for a while."""
    tree = Tree(tmp_path, "0::/\n")
    tree.write(high=GIB, current=2 * GIB)

    assert tree.read() == (GIB, 0, True)


def test_no_proc_is_no_limit(tmp_path):
    """As on systems other than Linux."""
    assert system_memory(tmp_path / "cgroup", tmp_path / "none") == MACHINE
