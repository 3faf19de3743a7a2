# SPDX-License-Identifier: Apache-2.0
"""Jobs run in order on one side thread, stop within a chunk, and fail alone."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Iterator

import pytest

from tokenpool.memory.copy_engine import CopyEngine, CopyJob, JobCancelled

pytestmark = pytest.mark.cpu

LIMIT_S = 20.0


@pytest.fixture
def engine() -> Iterator[CopyEngine]:
    engine = CopyEngine()
    yield engine
    engine.close()


def hold(job_started: threading.Event, go_on: threading.Event):
    """Work that reports one chunk, waits for the test, and reports another."""

    def work(job: CopyJob) -> str:
        job.advance(10)
        job_started.set()
        assert go_on.wait(LIMIT_S)
        job.advance(10)
        return "whole"

    return work


def test_jobs_run_in_order_on_one_other_thread(engine):
    """The side thread takes jobs as they came, one after another."""
    seen: list[tuple[int, int]] = []
    jobs = [engine.submit(str(i), 1, lambda job, i=i: seen.append((i, threading.get_ident()))) for i in range(20)]
    assert all(job.wait(LIMIT_S) for job in jobs)
    assert list(range(20)) == [i for i, _ in seen]
    assert 1 == len({thread for _, thread in seen})
    assert threading.get_ident() not in {thread for _, thread in seen}
    assert 0 == engine.pending()


def test_a_job_tells_its_progress_and_its_result(engine):
    """Progress grows with each chunk; the result is there when the job is done."""
    started, go_on = threading.Event(), threading.Event()
    job = engine.submit("load", 20, hold(started, go_on))
    assert started.wait(LIMIT_S)
    assert (10, False, None) == (job.progress, job.done(), job.result)
    assert not job.wait(0.0)
    go_on.set()
    assert job.wait(LIMIT_S)
    assert (20, True, True, "whole") == (job.progress, job.done(), job.succeeded, job.result)
    assert job.seconds > 0


def test_cancel_stops_a_running_job_at_its_next_chunk(engine):
    """The chunk under way is finished, nothing after it is done."""
    started, go_on = threading.Event(), threading.Event()
    job = engine.submit("load", 20, hold(started, go_on))
    assert started.wait(LIMIT_S)
    job.cancel()
    assert not job.cancelled
    go_on.set()
    assert job.wait(LIMIT_S)
    assert (True, False, None) == (job.cancelled, job.succeeded, job.result)
    assert job.error is None
    assert "it was cancelled" == job.problem


def test_a_cancelled_job_that_waits_does_not_begin(engine):
    """Its work is never called, and the job after it runs."""
    started, go_on, calls = threading.Event(), threading.Event(), []
    engine.submit("first", 20, hold(started, go_on))
    second = engine.submit("second", 1, lambda job: calls.append("second"))
    third = engine.submit("third", 1, lambda job: calls.append("third"))
    second.cancel()
    go_on.set()
    assert third.wait(LIMIT_S)
    assert second.cancelled
    assert ["third"] == calls


def test_a_cancelled_job_that_waits_ends_before_those_before_it(engine):
    """Who cancels it waits for no other job, which may hang in a disk; what its work holds on to is let go."""
    started, go_on = threading.Event(), threading.Event()
    first = engine.submit("first", 20, hold(started, go_on))

    class Buffer:
        pass

    buffer = Buffer()
    kept = weakref.ref(buffer)
    second = engine.submit("second", 1, lambda job, buffer=buffer: pytest.fail("it was cancelled"))
    del buffer
    assert started.wait(LIMIT_S)
    try:
        second.cancel()
        assert (True, True, False) == (second.done(), second.cancelled, first.done())
        assert kept() is None
    finally:
        go_on.set()
    assert engine.submit("third", 1, lambda job: "fine").wait(LIMIT_S)
    assert (True, "it was cancelled") == (first.succeeded, second.problem)


@pytest.mark.parametrize("exit_with", [SystemExit(3), GeneratorExit(), asyncio.CancelledError()])
def test_a_job_that_ends_its_thread_has_failed_and_the_others_run(engine, exit_with):
    """The code of a model may call sys.exit while its checkpoint is read: that is an error of that job alone."""

    def broken(job: CopyJob) -> None:
        raise exit_with

    job, after = engine.submit("broken", 10, broken), engine.submit("after", 1, lambda job: "fine")
    assert job.wait(LIMIT_S)
    assert after.wait(LIMIT_S)
    assert (True, False, False) == (job.done(), job.succeeded, job.cancelled)
    assert f"RuntimeError: it ended by {type(exit_with).__name__}: {exit_with}" == job.problem
    assert exit_with is job.error.__cause__
    assert "fine" == after.result


def test_cancelling_a_job_that_is_done_changes_nothing(engine):
    """What succeeded stays succeeded."""
    job = engine.submit("load", 1, lambda job: "whole")
    assert job.wait(LIMIT_S)
    job.cancel()
    assert job.succeeded
    assert "whole" == job.result


def test_code_that_handles_every_exception_does_not_swallow_a_cancel(engine):
    """A loader's own `except Exception` lets the cancel pass."""
    started, go_on = threading.Event(), threading.Event()

    def work(job: CopyJob) -> None:
        try:
            hold(started, go_on)(job)
        except Exception:
            pytest.fail("the cancel was taken for an error")

    job = engine.submit("load", 20, work)
    assert started.wait(LIMIT_S)
    job.cancel()
    go_on.set()
    assert job.wait(LIMIT_S)
    assert job.cancelled
    assert not issubclass(JobCancelled, Exception)


def test_a_failed_job_keeps_its_error_and_the_others_run(engine):
    """The error waits for whoever finishes the job."""

    def broken(job: CopyJob) -> None:
        job.advance(5)
        raise OSError("the disk is gone")

    job, after = engine.submit("broken", 10, broken), engine.submit("after", 1, lambda job: "fine")
    assert after.wait(LIMIT_S)
    assert (True, False, False) == (job.done(), job.succeeded, job.cancelled)
    assert "OSError: the disk is gone" == job.problem
    assert "fine" == after.result


def test_notify_comes_after_each_job_and_may_fail():
    """The host loop is woken by every job that ends; an error in that call stops nothing."""
    told: list[tuple[str, bool]] = []

    def notify(job: CopyJob) -> None:
        told.append((job.label, job.done()))
        raise RuntimeError("nobody listens")

    engine = CopyEngine(notify=notify)
    try:
        assert engine.submit("a", 1, lambda job: None).wait(LIMIT_S)
        assert engine.submit("b", 1, lambda job: None).wait(LIMIT_S)
    finally:
        engine.close()
    assert [("a", True), ("b", True)] == told


def test_on_start_runs_once_on_the_side_thread():
    """It is where the host gives the thread all its cores; if it fails, jobs run all the same."""
    threads: list[int] = []

    def on_start() -> None:
        threads.append(threading.get_ident())
        raise PermissionError("no such cores")

    engine = CopyEngine(on_start=on_start)
    try:
        jobs = [engine.submit("a", 1, lambda job: threading.get_ident()) for _ in range(3)]
        assert all(job.wait(LIMIT_S) for job in jobs)
    finally:
        engine.close()
    assert 1 == len(threads)
    assert set(threads) == {job.result for job in jobs}


def test_close_cancels_what_is_left_and_ends_the_thread():
    """Queued jobs end as cancelled, nobody waits for them in vain; later jobs are refused."""
    engine = CopyEngine()
    started, go_on = threading.Event(), threading.Event()
    running = engine.submit("running", 20, hold(started, go_on))
    queued = engine.submit("queued", 1, lambda job: pytest.fail("runs although the engine is closed"))
    assert started.wait(LIMIT_S)
    closer = threading.Thread(target=engine.close)
    closer.start()
    while not engine._closed:
        pass
    go_on.set()
    closer.join(LIMIT_S)
    assert not closer.is_alive()
    assert running.cancelled
    assert queued.cancelled
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit("late", 1, lambda job: None)


def test_an_engine_without_jobs_has_no_thread():
    """A host that never moves weights pays nothing."""
    engine = CopyEngine()
    assert engine._thread is None
    engine.close()


def test_a_job_can_run_on_the_callers_thread(engine):
    """Without the queue, for whoever waits anyway; it is told about in the same way."""
    told = []
    engine.notify = told.append
    job = engine.job("now", 3, lambda job: (job.advance(3), threading.get_ident())[1])
    job.run()
    assert threading.get_ident() == job.result
    assert [job] == told
