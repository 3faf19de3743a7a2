# SPDX-License-Identifier: Apache-2.0
"""Whatever a rank does in a build or a step, no other waits for it for ever: random programs of ranks as threads.

Ranks meet in collectives, which a rank that is missing never lets the others leave. The law says exactly when that
happens, and then the group must end; in all other cases it must go on, and the failure must be told to its model.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import Pipe
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpool.host.ranks.rank_follower import Follower, Seat
from tokenpool.host.ranks.rank_questions import RankQuestions
from tokenpool.host.ranks.rank_watch import RankLimits, RankWatch

pytestmark = pytest.mark.cpu

LIMITS = RankLimits(call_s=1.5, build_s=1.5, alarm_s=0.75)
TICK_S = 0.05
MODELS = ("one", "two")


class Fault(Exception):
    """What a rank raises on purpose."""


class Ended(Exception):
    """The process of all ranks would have ended here."""


@dataclass(frozen=True)
class Job:
    """A step, or a build with points, and what goes wrong in it."""

    model: str
    ops: tuple[str, ...]
    faults: tuple[tuple[int, int, str], ...] = ()
    """Rank, index into `ops`, and `raise` or `hang`."""

    @property
    def is_build(self) -> bool:
        return "meet" in self.ops

    def fault(self, rank: int, index: int) -> str:
        return next((how for *place, how in self.faults if place == [rank, index]), "")


class World:
    """Ranks as threads of this process; `end` frees all that wait, as the end of their processes would."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.ended = ""
        self.trace: list[list[tuple[str, str]]] = [[] for _ in range(size)]
        self._over = threading.Event()
        self._meeting = threading.Barrier(size)
        self.watch = RankWatch(size, LIMITS)
        pipes, alarms = [Pipe() for _ in range(size - 1)], [Pipe(duplex=False) for _ in range(size - 1)]
        self._alarms = [ours for ours, _ in alarms]
        self.questions = RankQuestions([ours for ours, _ in pipes], self.watch, self.end)
        begun = [0] * (size - 1)
        for rank in range(1, size):
            seat = Seat(rank, "", 0, None, pipes[rank - 1][1], alarms[rank - 1][1], begun)
            models = _Models(self, rank)
            threading.Thread(target=Follower(seat, models).run, daemon=True).start()
        threading.Thread(target=self._tick, daemon=True).start()

    def end(self, reason: str) -> None:
        self.ended = self.ended or reason
        self._over.set()
        self._meeting.abort()
        if threading.current_thread().name == "rank 0":
            raise Ended(reason)

    def do(self, rank: int, job: Job, meet: Any) -> None:
        """What a rank does of a job."""
        for index, op in enumerate(job.ops):
            fault = job.fault(rank, index)
            if fault == "hang":
                self._over.wait()
            if fault or self.ended:
                raise Fault(f"rank {rank}")
            if op == "meet":
                meet()
            elif op == "collective":
                try:
                    self._meeting.wait()
                except threading.BrokenBarrierError:
                    raise Ended from None
            self.trace[rank].append((job.model, f"{op} {index}"))

    def _tick(self) -> None:
        while not self._over.wait(TICK_S):
            for index, alarm in enumerate(self._alarms):
                while alarm.poll():
                    alarm.recv_bytes()
                    self.watch.alarmed(index)
            if reason := self.watch.pass_time(TICK_S):
                self.end(reason)

    def stop(self) -> None:
        self._over.set()
        self._meeting.abort()
        self.questions.send("stop")


class _Models:
    """A follower's `RankModels`."""

    meet: Any
    next_message: Any

    def __init__(self, world: World, rank: int) -> None:
        self._world, self._rank = world, rank
        self.num_paused = 0

    def call(self, job: Job) -> str:
        self._world.do(self._rank, job, lambda: self.meet())
        return f"rank {self._rank}"

    def is_built_beside(self, kind: str, content: tuple[Any, ...]) -> bool:
        return content[0].is_build

    def on_engine_stream(self, work: Any) -> Any:
        return work

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.num_paused += 1
        yield


def run_job(world: World, job: Job, beside: list[Job], told: list[tuple[str, str]]) -> None:
    """Rank 0's side, as GroupExecutor has it; `beside` are steps that are taken while a build pauses."""
    questions = world.questions
    with world.watch.work(f"a job of {job.model}", builds=job.is_build) as work:
        if not job.is_build and questions.take_failure(job.model) is not None:
            told.append((job.model, "left"))
            return
        work.question = questions.ask("call", job)

        def pause() -> None:
            if beside:
                run_job(world, beside.pop(), [], told)

        try:
            world.do(0, job, lambda: questions.meet(pause))
            if job.is_build:
                questions.answers(work.question)
            else:
                questions.leave(work.question, job.model)
        except Exception as error:
            if isinstance(error, Ended):
                raise
            questions.give_up(work.question, str(error))
            told.append((job.model, "raised"))


@dataclass
class Fate:
    """What becomes of a plan."""

    told: list[tuple[str, str]]
    kept: set[str]
    end: Job | None = None


def foretell(plan: list[tuple[Job, list[Job]]], size: int) -> Fate:
    """What must become of a plan: what is told to whom, and in which job the group ends, if it does."""
    fate = Fate([], set())

    def skip(job: Job) -> bool:
        if job.is_build or job.model not in fate.kept:
            return False
        fate.kept.remove(job.model)
        fate.told.append((job.model, "left"))
        return True

    for job, beside in plan:
        if skip(job):
            continue
        struck, stop = struck_ranks(job, size)
        others = list(beside)
        for _ in [op for op in job.ops[:stop] if op == "meet"][: len(others)]:
            skip(others.pop())
        waits = stop < len(job.ops) and job.ops[stop] == "collective" and 0 < len(struck) < size
        if waits or "hang" in struck.values():
            fate.end = job
            return fate
        if 0 in struck or (struck and job.is_build):
            fate.told.append((job.model, "raised"))
        elif struck:
            fate.kept.add(job.model)
    return fate


def struck_ranks(job: Job, size: int) -> tuple[dict[int, str], int]:
    """The ranks that come to a fault of theirs, and the point or collective that nobody passes for it."""
    first: dict[int, tuple[int, str]] = {}
    for rank, index, how in sorted(job.faults, key=lambda fault: fault[1]):
        first.setdefault(rank, (index, how))
    barriers = [index for index, op in enumerate(job.ops) if op in ("meet", "collective")]
    missed = [next((b for b in barriers if b >= index), len(job.ops)) for index, _ in first.values()]
    stop = min(missed, default=len(job.ops))
    return {rank: how for rank, (index, how) in first.items() if index <= stop}, stop


def jobs(size: int, *, faulty: bool, builds: bool) -> st.SearchStrategy[Job]:
    names = ("meet", "meet", "collective", "compute") if builds else ("collective", "compute")
    ops = st.lists(st.sampled_from(names), min_size=1, max_size=5).map(tuple)
    place = st.tuples(st.integers(0, size - 1), st.integers(0, 4), st.sampled_from(("raise", "raise", "raise", "hang")))
    faults = st.lists(place, min_size=1, max_size=2) if faulty else st.just([])
    return st.builds(
        lambda model, ops, faults: Job(model, ops, tuple((r, min(i, len(ops) - 1), how) for r, i, how in faults)),
        st.sampled_from(MODELS), ops, faults,
    )  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_no_rank_waits_for_ever_and_no_group_ends_for_nothing(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 3), "ranks")
    plan = data.draw(
        st.lists(
            st.tuples(st.booleans(), st.integers(0, 4)).flatmap(
                lambda drawn: st.tuples(
                    jobs(size, faulty=drawn[1] < 2, builds=drawn[0]),
                    st.lists(jobs(size, faulty=False, builds=False), max_size=2 * drawn[0]),
                )
            ),
            min_size=1,
            max_size=5,
        ),
        "plan",
    )
    fate, world, told = foretell(plan, size), World(size), list[tuple[str, str]]()

    def rank_0() -> None:
        try:
            for job, beside in plan:
                run_job(world, job, list(beside), told)
                if job is fate.end:  # what a step has left is waited for in the next one
                    run_job(world, Job(job.model, ("compute",)), [], told)
            world.questions.settle()
        except Ended:
            pass

    thread = threading.Thread(target=rank_0, name="rank 0", daemon=True)
    thread.start()
    thread.join(60)
    try:
        assert not thread.is_alive(), f"waits for ever: {plan}"
        assert bool(world.ended) == (fate.end is not None), world.ended
        assert told[: len(fate.told)] == fate.told
        if fate.end is None:
            assert len(told) == len(fate.told)
            assert {model for model in MODELS if world.questions.take_failure(model) is not None} == fate.kept
            assert world.questions._open == [] and world.questions._left == {}
    finally:
        world.stop()


def test_a_step_is_left_and_at_most_one() -> None:
    """Rank 0 goes on while the other is in its step; the next question waits for that one."""
    world, inside, told = World(2), threading.Event(), list[tuple[str, str]]()
    go_on = threading.Event()
    original = world.do

    def slow(rank: int, job: Job, meet: Any) -> None:
        if rank == 1 and job.ops == ("compute",):
            inside.set()
            go_on.wait(60)
        original(rank, job, meet)

    world.do = slow  # type: ignore[method-assign]
    run_job(world, Job("one", ("compute",)), [], told)
    assert inside.wait(60)
    assert world.trace == [[("one", "compute 0")], []]  # rank 0 is done with it
    second = threading.Thread(target=run_job, args=(world, Job("two", ("compute", "compute")), [], told), daemon=True)
    second.start()
    time.sleep(0.2)
    assert world.trace[0] == [("one", "compute 0")]
    go_on.set()
    second.join(60)
    world.questions.settle()
    assert world.trace[0] == world.trace[1] and len(world.trace[0]) == 3
    world.stop()


def test_ranks_take_steps_of_others_where_a_build_pauses() -> None:
    """All at the same point of it, and none before all are there."""
    world, told = World(3), list[tuple[str, str]]()
    build = Job("one", ("compute", "meet", "collective", "meet", "compute"))
    step = Job("two", ("collective", "compute"))
    run_job(world, build, [step, step], told)
    world.questions.settle()
    world.stop()
    assert told == [] and world.trace[1:] == [world.trace[0]] * 2
    names = [model for model, _ in world.trace[0]]
    assert names == ["one", "two", "two", "one", "one", "two", "two", "one", "one"]


def test_a_rank_may_have_more_points_than_rank_0() -> None:
    """It is let through: rank 0 is past them."""
    world = World(2)
    with nullcontext():
        question = world.questions.ask("call", Job("one", ("meet", "meet", "compute")))
        assert ["rank 1"] == world.questions.answers(question)
    world.stop()


def test_a_shortage_on_one_rank_decides_for_all() -> None:
    """It fails between two points; no rank goes on to where it would wait for that one."""
    world, told = World(3), list[tuple[str, str]]()
    build = Job("one", ("meet", "compute", "meet", "collective"), faults=((2, 1, "raise"),))
    run_job(world, build, [], told)
    run_job(world, Job("two", ("collective",)), [], told)
    world.questions.settle()
    world.stop()
    assert (told, world.ended) == ([("one", "raised")], "")
    assert not any(entry == ("one", "collective 3") for trace in world.trace for entry in trace)


def test_what_the_watch_says_of_ranks_that_hang() -> None:
    watch = RankWatch(4, RankLimits(10.0, 100.0, 5.0))
    with watch.work("a step of llama") as work:
        work.question = 7
        watch.begun = [7, 0, 3]
        assert "" == watch.pass_time(9.0)
        assert (
            watch.pass_time(2.0) == "a step of llama does not get on for 11.0 s: rank 1 in it as well, ranks 2, 3 not"
        )
    assert "" == watch.pass_time(1000.0)
    with watch.work("a build", builds=True):
        assert "" == watch.pass_time(99.0)
        watch.beat()
        assert "" == watch.pass_time(99.0)
        with watch.work("a step beside"):
            assert "" == watch.pass_time(9.0)
        assert "" == watch.pass_time(99.0)
        watch.alarmed(1)
        assert watch.pass_time(5.0) == "rank 2 failed while rank 0 is in a build, and may be waited for"
        watch.taken(1)
    assert "" == watch.pass_time(1000.0)


def test_limits_are_shorter_than_those_of_the_keeper() -> None:
    config: Any = SimpleNamespace(host_timeout_s=10.0, load_timeout_s=50.0)
    limits = RankLimits.of(config)
    assert limits.alarm_s < limits.call_s < 10.0 < limits.build_s < 50.0
