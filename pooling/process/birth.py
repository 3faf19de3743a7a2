# SPDX-License-Identifier: Apache-2.0
"""What a child process has from its parent, beside what it is given: a child of a template must have the same."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_STATUS = (
    "Umask", "Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb",
    "Cpus_allowed", "Mems_allowed", "SigBlk", "SigIgn", "THP_enabled",
)  # fmt: skip
"""Lines of /proc/PID/status that a child has too."""
_OF_HOSTS = sum(1 << number - 1 for number in (signal.SIGINT, signal.SIGTERM))
"""Each host sets what these do, and so does a server: one that a shell has told to ignore SIGINT handles it later."""


@dataclass(frozen=True, slots=True)
class Birth:
    """What a process that is started now would have for life; two that are equal make equal children.

    Resource limits and the OOM score are not in it: a child of a template is given those of its owner.
    """

    env: Mapping[str, str]
    """Its environment, but for what only this one child gets."""
    traits: Mapping[str, str]
    """What it inherits, by name."""

    @classmethod
    def now(cls, env: Mapping[str, str]) -> Birth:
        """That of a child of this process with this environment; raises OSError where /proc does not tell."""
        here, process = Path("/proc/self"), os.getpid()
        status = dict(line.split(":", 1) for line in (here / "status").read_text().splitlines() if ":" in line)
        traits = {name: status[name].strip() for name in _STATUS if name in status}
        if "SigIgn" in traits:
            traits["SigIgn"] = f"{int(traits['SigIgn'], 16) & ~_OF_HOSTS:x}"
        traits |= {f"namespace {link.name}": os.readlink(link) for link in (here / "ns").iterdir()}
        traits["cgroup"] = (here / "cgroup").read_text()
        traits["folder"], traits["root"] = os.getcwd(), os.readlink(here / "root")
        traits["priority"] = f"{os.getpriority(os.PRIO_PROCESS, process)} {os.sched_getscheduler(process)}"
        traits["interpreter"] = sys.executable
        return cls(dict(env), traits)

    def difference(self, other: Birth) -> str:
        """The names in which they differ; values of variables may be secret. Empty for equal ones."""
        pairs = ((self.env, other.env), (self.traits, other.traits))
        return ", ".join(sorted(n for ours, theirs in pairs for n in {*ours, *theirs} if ours.get(n) != theirs.get(n)))
