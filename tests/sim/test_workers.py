# SPDX-License-Identifier: Apache-2.0
"""Calls in processes: who waits gets the right answer, and what only may be wanted is in nobody's way."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpool.sim.compared.workers import Call, Workers, is_unwanted

pytestmark = pytest.mark.cpu


class Subject:
    """What is called in the processes."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def times(self, value: int) -> int:
        return self.factor * value

    def note(self, path: str) -> int:
        with open(path, "a") as file:
            return file.write("called\n")

    def endless(self) -> None:
        while not is_unwanted():
            time.sleep(0.001)

    def raises(self) -> None:
        raise ValueError("not so")

    def dies(self) -> None:
        os._exit(3)


SUBJECTS = [Subject(2), Subject(3)]


def times(subject: int, value: int) -> Call:
    return Call((subject, value), subject, Subject.times, (value,))


def endless(name: str) -> Call:
    return Call(name, 0, Subject.endless)


def has_not_ended(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_may_be_wanted_ends_for_what_is_wanted():
    """Calls that never end by themselves are in all processes, and still everyone gets an answer."""
    with Workers(2, SUBJECTS) as workers:
        assert 2 == workers.begin(times(0, 1), "a", [endless("x"), endless("y"), endless("z")]).result()
        assert 6 == workers.begin(times(1, 2), "b", [endless("x")]).result()
        both = [workers.begin(times(0, value), line) for value, line in ((3, "a"), (4, "b"))]
        assert [6, 8] == [future.result() for future in both]
        assert 10 == workers.begin(times(0, 5), "a", [endless("last")]).result()


def test_what_was_foreseen_is_called_once(tmp_path: Path):
    """Its answer is there for who wants it later, also if other things were wanted meanwhile."""
    path = tmp_path / "calls"
    note = Call("note", 0, Subject.note, (str(path),))
    with Workers(2, SUBJECTS) as workers:
        assert 2 == workers.begin(times(0, 1), "a", [note]).result()
        while not path.exists():
            time.sleep(0.001)
        assert 4 == workers.begin(times(0, 2), "a", [note]).result()
        assert 7 == workers.begin(note, "a").result()
    assert "called\n" == path.read_text()


def test_random_lines_get_their_answers():
    """Whatever is foreseen, given up and wanted after all."""
    name = st.tuples(st.integers(0, 1), st.integers(0, 4))
    step = st.tuples(st.sampled_from("abc"), name, st.lists(name, max_size=4, unique=True), st.integers(0, 2))
    with Workers(2, SUBJECTS) as workers:

        @settings(max_examples=60, deadline=None)
        @given(st.lists(step, min_size=1, max_size=12))
        def run(steps: Sequence[tuple[str, tuple[int, int], list[tuple[int, int]], int]]) -> None:
            open_ones = []
            for line, wanted, maybe, num_endless in steps:
                others = [*(times(*each) for each in maybe if each != wanted), *map(endless, "xy"[:num_endless])]
                open_ones.append((wanted, workers.begin(times(*wanted), line, others)))
            for (subject, value), future in open_ones:
                assert SUBJECTS[subject].times(value) == future.result()

        run()


def test_errors_reach_who_waits():
    """One that is raised, and then the death of a process, after which nothing is begun."""
    with Workers(2, SUBJECTS) as workers:
        with pytest.raises(ValueError, match="not so"):
            workers.begin(Call("raises", 0, Subject.raises)).result()
        assert 2 == workers.begin(times(0, 1), "a", [endless("x")]).result()
        with pytest.raises(RuntimeError, match="died"):
            workers.begin(Call("dies", 0, Subject.dies)).result()
        with pytest.raises(RuntimeError, match="died"):
            workers.begin(times(0, 1))


def test_processes_end_with_the_one_that_began_them():
    """Also in the middle of calls, and though it was killed."""
    code = (
        "import time; from tests.sim.test_workers import SUBJECTS, Workers, endless, times\n"
        "with Workers(2, SUBJECTS) as workers:\n"
        "    workers.begin(times(0, 1), 'a', [endless('x'), endless('y')]).result()\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and "ready\n" == first.stdout.readline()
        others = psutil.Process(first.pid).children(recursive=True)
        assert len(others) >= 2
        first.kill()
    end_s = time.monotonic() + 60
    while any(has_not_ended(other) for other in others):
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_one_process_is_this_one():
    """Nothing is foreseen there, and errors come at once."""
    with Workers(1, SUBJECTS) as workers:
        assert not workers.are_several
        assert 9 == workers.begin(times(1, 3), "a", [endless("x")]).result()
        with pytest.raises(ValueError, match="not so"):
            workers.begin(Call("raises", 0, Subject.raises))
