# SPDX-License-Identifier: Apache-2.0
"""A tensor parallel group outlives failures that rank 0 has heard of, and no others."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.server import REPOSITORY

pytestmark = pytest.mark.cpu


def run(how: str) -> tuple[int, str]:
    words = [sys.executable, "-m", "tests.helpers.failing_rank", how]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout


@pytest.mark.parametrize(("how", "kind"), [("answered", "ValueError"), ("unreadable", "RuntimeError")])
def test_a_failure_that_was_answered_ends_nothing(how: str, kind: str) -> None:
    """However many there were, an idle host lives on for longer than the limit."""
    assert (0, f"{{'{kind}': 200}}\nalive\n") == run(how)


def test_all_ranks_have_the_link_of_the_pool() -> None:
    """A pool that tries policies with the copy times of another machine has them on every rank."""
    assert (0, "{'[77]': 200}\nalive\n") == run("link")


def test_a_rank_that_failed_alone_ends_the_host() -> None:
    """Nobody took the answer: rank 0 may wait for that rank in a kernel, for ever."""
    assert (70, "{}\n") == run("alone")
