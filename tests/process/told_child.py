# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the host process and for its template: writes what it is to a file and waits. Imports no vLLM.

    python -m tests.process.told_child FILE [WORD ...]

What the file TOLD_CHILD names is run as Python when the template has imported.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tokenpool.process.template_process import words_of_child


def prepare() -> None:
    """What a test wants a template to have done."""
    if path := os.environ.get("TOLD_CHILD"):
        exec(Path(path).read_text(), {})


def status_of(pid: int | str) -> dict[str, str]:
    """The lines of /proc/PID/status."""
    return dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)


def files_of(pid: int) -> dict[str, str]:
    """The open files of a process by their number."""
    return {link.name: os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}


def told() -> dict[str, Any]:
    """All that a child could have wrongly of its template."""
    status = status_of("self")
    kept = ("Umask", "Uid", "Gid", "SigBlk", "SigIgn", "SigCgt", "Seccomp", "CapEff", "Cpus_allowed", "Threads")
    number = signal.Signals
    return {
        "status": {name: status[name].strip() for name in kept if name in status},
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "words": sys.argv[1:],
        "command": [*sys.orig_argv],
        "parent": os.getppid(),
        "leads": [os.getpid() == os.getsid(0), os.getpid() == os.getpgid(0)],
        "limits": {n: resource.getrlimit(getattr(resource, n)) for n in dir(resource) if n.startswith("RLIMIT_")},
        "oom_score": Path("/proc/self/oom_score_adj").read_text(),
        "cgroup": Path("/proc/self/cgroup").read_text(),
        "main": sys.modules["__main__"].__spec__.name,  # type: ignore[union-attr]
        "threads": [thread.name for thread in threading.enumerate()],
        "handlers": {each.name: repr(signal.getsignal(each)) for each in number},
        "path": sys.path,
        "chance": [random.random(), multiprocessing.current_process().authkey.hex()],
    }


def main(path: str, *words: str) -> None:
    """Write, and wait to be killed."""
    if words[:1] == ("fail",):
        raise RuntimeError("it has to fail")
    if words[:1] == ("exit",):
        sys.exit(int(words[1]))
    fresh = Path(f"{path}~")
    fresh.write_text(json.dumps(told()))
    fresh.rename(path)
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main(*words_of_child(prepare))
