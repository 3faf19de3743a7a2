# SPDX-License-Identifier: Apache-2.0
"""However a job of the build lane ends, whoever waits for it is told, and the loop goes on."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

import pytest

from tokenpool.errors import HostError
from tokenpool.host.engine.engine_globals import EngineGlobals
from tokenpool.host.load.build_lane import BuildLane

pytestmark = pytest.mark.vllm

LIMIT_S = 20.0
ENDS = [ValueError("bad"), SystemExit(3), GeneratorExit(), KeyboardInterrupt()]


def raising(error: BaseException) -> Any:
    def job() -> None:
        raise error

    return job


def run_on_loop(lane: BuildLane, *, beside: bool) -> threading.Thread:
    """A loop that grants slices as long as there is something to do, on a thread that a test can wait for."""

    def loop() -> None:
        while lane.busy:
            try:
                lane.run_slice(beside=beside)
            except KeyboardInterrupt:
                assert not beside

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    return thread


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
def test_whatever_a_job_raises_reaches_its_future(error, beside):
    """An Exception as it is, else a HostError that names it; the job after it runs."""
    lane = BuildLane(EngineGlobals())
    bad, good = lane.submit(raising(error)), lane.submit(lambda: 5)
    loop = run_on_loop(lane, beside=beside)
    told = bad.exception(LIMIT_S)
    if isinstance(error, Exception):
        assert told is error
    else:
        assert isinstance(told, HostError) and type(error).__name__ in str(told)
        assert told.__cause__ is error
    assert 5 == good.result(LIMIT_S)
    loop.join(LIMIT_S)
    assert not loop.is_alive() and not lane.busy


@pytest.mark.parametrize("beside", [False, True])
def test_a_job_that_nobody_waits_for_any_more_is_left_out(beside):
    """A future that was cancelled ends neither the lane nor the jobs after it."""
    lane, ran = BuildLane(EngineGlobals()), []
    gone, good = lane.submit(lambda: ran.append(1)), lane.submit(lambda: 5)
    assert gone.cancel()
    loop = run_on_loop(lane, beside=beside)
    assert 5 == good.result(LIMIT_S)
    loop.join(LIMIT_S)
    assert not loop.is_alive() and [] == ran


def test_jobs_that_wait_are_told_when_the_host_ends():
    """Also beside one that was cancelled."""
    lane = BuildLane(EngineGlobals())
    jobs: list[Future] = [lane.submit(lambda: 1) for _ in range(3)]
    jobs[0].cancel()
    lane.abort()
    assert not lane.busy
    assert all(isinstance(job.exception(LIMIT_S), HostError) for job in jobs[1:])


def test_a_job_without_a_thread_has_failed(monkeypatch):
    """The system gives no thread: the future says so, the loop is not held up, and the next job may have one."""
    lane = BuildLane(EngineGlobals())
    bad, good = lane.submit(lambda: 1), lane.submit(lambda: 5)
    with monkeypatch.context() as broken:
        broken.setattr(threading.Thread, "start", lambda self: raising(RuntimeError("can't start new thread"))())
        lane.run_slice(beside=True)
    assert isinstance(bad.exception(0), RuntimeError)
    lane.run_slice(beside=True)
    assert 5 == good.result(0)


def test_a_stream_that_cannot_be_set_fails_the_job(monkeypatch):
    """What the lane does before the job counts as the job."""
    monkeypatch.setattr("tokenpool.host.load.build_lane.engine_stream", lambda: object())
    monkeypatch.setattr("torch.cuda.set_stream", raising_with_argument)
    lane = BuildLane(EngineGlobals())
    bad = lane.submit(lambda: 1)
    loop = run_on_loop(lane, beside=True)
    assert isinstance(bad.exception(LIMIT_S), RuntimeError)
    loop.join(LIMIT_S)
    assert not loop.is_alive()


def raising_with_argument(_: Any) -> None:
    raise RuntimeError("no such stream")
