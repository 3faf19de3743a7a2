# SPDX-License-Identifier: Apache-2.0
"""How much host memory this process may still take: what the machine has, or what its cgroups leave of it.

A container's limit is the limit of a cgroup. A process lies in nested cgroups, and each of them may have a limit: the
one that leaves least counts. Both versions of cgroups are read, because both are in use and machines may mount both.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


class SystemMemory(NamedTuple):
    """Host memory at one moment, in bytes."""

    total_bytes: int
    """What all processes that share the smallest limit may hold together."""
    available_bytes: int
    """What could be taken now without swapping or reaching a limit; file caches that can be dropped count as free."""
    is_limited: bool
    """Whether a cgroup says so, and not the machine."""


class _Layout(NamedTuple):
    """Names of one version of cgroups."""

    limits: tuple[str, ...]
    usage: str
    droppable: str
    """Key of `memory.stat`: bytes of file caches that count as used and can be dropped."""
    whole_limit: str
    """Key of `memory.stat`: the smallest limit of all cgroups above, also of those that cannot be seen from here."""


_V2 = _Layout(("memory.max", "memory.high"), "memory.current", "inactive_file", "")
_V1 = _Layout(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file", "hierarchical_memory_limit")


def system_memory(cgroups: Path = CGROUPS, own_cgroups: Path = OWN_CGROUPS) -> SystemMemory:
    """Read the machine's memory and the limits of this process' cgroups; O(depth of the cgroups)."""
    machine = psutil.virtual_memory()
    memory = SystemMemory(machine.total, machine.available, False)
    for folder, layout in _folders(cgroups, own_cgroups):
        stat = _read_stat(folder)
        limits = [_read_number(folder / name) for name in layout.limits] + [stat.get(layout.whole_limit)]
        limit = min((limit for limit in limits if limit is not None), default=None)
        if limit is None or limit >= machine.total:  # version 1 writes a number near 2**63 for no limit
            continue
        used = (_read_number(folder / layout.usage) or 0) - stat.get(layout.droppable, 0)
        left = max(0, limit - max(0, used))
        memory = SystemMemory(min(memory.total_bytes, limit), min(memory.available_bytes, left), True)
    return memory


def _folders(cgroups: Path, own_cgroups: Path) -> Iterator[tuple[Path, _Layout]]:
    """The cgroups that this process lies in, from the inmost out, as far as they are mounted."""
    for controllers, path in _memberships(own_cgroups):
        is_v2 = not controllers
        if not is_v2 and "memory" not in controllers:
            continue
        root, layout = (cgroups, _V2) if is_v2 else (cgroups / "memory", _V1)
        # In a container the root of the mount may be the container's own cgroup although the path is the host's.
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        for depth in range(len(parts), -1, -1):
            yield root.joinpath(*parts[:depth]), layout


def _memberships(own_cgroups: Path) -> Iterator[tuple[list[str], str]]:
    """(controllers, path) of each hierarchy; version 2 has no controllers there."""
    try:
        lines = own_cgroups.read_text().splitlines()
    except OSError:  # no Linux, or no /proc
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        yield [name for name in controllers.split(",") if name], path


def _read_number(path: Path) -> int | None:
    """The number in a file; None for a file that is not there and for `max`."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _read_stat(folder: Path) -> dict[str, int]:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
