# SPDX-License-Identifier: Apache-2.0
"""A process ends with another one that is not its parent."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

pytestmark = pytest.mark.cpu

LIMIT_S = 60
FOLLOWER = "import sys, time; from tokenpool.process.parent_death import end_with; end_with(int(sys.argv[1]))\n"


def follower_of(pid: int) -> subprocess.Popen[str]:
    code = FOLLOWER + "print('follows', flush=True); time.sleep(600)"
    return subprocess.Popen([sys.executable, "-c", code, str(pid)], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("end", [subprocess.Popen.kill, subprocess.Popen.terminate], ids=["killed", "terminated"])
def test_it_ends_when_the_other_does(end: Callable[[subprocess.Popen[bytes]], None]) -> None:
    """And not before."""
    other = subprocess.Popen(["sleep", "600"])
    with follower_of(other.pid) as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline() == "follows\n"
        assert follower.poll() is None
        end(other)
        other.wait()
        assert follower.wait(LIMIT_S) == -signal.SIGKILL


def test_it_ends_at_once_when_the_other_is_gone() -> None:
    """As if it had been there until then."""
    other = subprocess.Popen(["true"])
    other.wait()
    with follower_of(other.pid) as follower:
        assert follower.wait(LIMIT_S) == -signal.SIGKILL
