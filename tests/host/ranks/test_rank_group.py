# SPDX-License-Identifier: Apache-2.0
"""A tensor parallel group outlives failures that rank 0 has heard of, and no others; then it says which rank failed."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.helpers.server import REPOSITORY

pytestmark = pytest.mark.cpu


def run(how: str) -> tuple[int, str, str]:
    words = [sys.executable, "-m", "tests.helpers.failing_rank", how]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=180)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        pytest.param("answered", "ValueError", marks=pytest.mark.slow),
        ("left", "ValueError"),
        pytest.param("unreadable", "RuntimeError", marks=pytest.mark.slow),
    ],
)
def test_a_failure_that_was_answered_ends_nothing(how: str, kind: str) -> None:
    """However many there were, an idle host lives on for longer than the limit."""
    assert (0, f"{{'{kind}': 200}}\nalive\n") == run(how)[:2]


def test_all_ranks_have_the_link_of_the_pool() -> None:
    """A pool that tries policies with the copy times of another machine has them on every rank."""
    assert (0, "{'[77]': 200}\nalive\n") == run("link")[:2]


def test_a_rank_that_failed_alone_ends_the_host() -> None:
    """Nobody took the answer: rank 0 may wait for that rank in a kernel, for ever."""
    code, out, told = run("alone")
    assert (70, "{}\n") == (code, out)
    assert "rank 1 failed while rank 0 is in a kernel" in told


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        pytest.param("hangs", "a call does not get on", marks=pytest.mark.slow),
        ("stops", "a call does not get on"),
        ("full", "fill of memory, for which the other ranks take no message, does not get on"),
        ("dies", "rank 1 ended by SIGKILL, the host ends too: it was in a call"),
    ],
)
def test_a_rank_that_comes_to_a_stand_ends_the_host(how: str, reason: str) -> None:
    """It hangs, is stopped, takes no message or is gone: rank 0 waits no longer than the limit."""
    code, out, told = run(how)
    assert (70, "") == (code, out)
    assert reason in told


def test_the_stacks_of_a_rank_that_hangs_are_told() -> None:
    """An operator sees where it hangs."""
    stacks = run("hangs")[2].partition("does not get on")[2]
    assert re.search(r"failing_rank.py\", line \d+ in call$", stacks, re.M)
