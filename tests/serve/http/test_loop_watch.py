# SPDX-License-Identifier: Apache-2.0
"""A stand-still of the event loop is counted, and the log names the request that caused it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import Any

import pytest

from tests.serve.gateway.test_router import make_scope
from tokenpool.serve.http import loop_watch
from tokenpool.serve.http.loop_watch import LoopWatch
from tokenpool.serve.http.request_note import NOTE_KEY, RequestNote, note_of

pytestmark = pytest.mark.cpu

HEADERS = {"x-request-id": "r-1", "authorization": "Bearer secret"}


class Seen(logging.Handler):
    """What the watch has logged, also for threads that wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.stands = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        if "stands still" in self.lines[-1]:
            self.stands.set()


@pytest.fixture
def seen():
    handler = Seen()
    loop_watch.logger.addHandler(handler)
    before, loop_watch.logger.level = loop_watch.logger.level, logging.INFO
    yield handler
    loop_watch.logger.removeHandler(handler)
    loop_watch.logger.level = before


async def nobody(*message: Any) -> Any:
    raise AssertionError("nothing is read or sent")


def watch_one(app: Any, seen: Seen, headers: Any = None) -> None:
    """Serve one request with `app` below a watch, and wait until the loop has gone on."""

    async def main() -> None:
        watch = LoopWatch()
        watch.start()
        try:
            await watch.around(app)(make_scope(headers=HEADERS | (headers or {})), nobody, nobody)
            while not any("goes on" in line for line in seen.lines):
                await asyncio.sleep(0.01)
        finally:
            watch.stop()

    asyncio.run(asyncio.wait_for(main(), 30))


def hold_the_loop(seen: Seen) -> None:
    assert seen.stands.wait(20)


def test_the_log_tells_work_from_waiting(seen):
    """How much of a stand-still the loop's own thread has computed, so that a busy machine is told from a request."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        before = time.thread_time()
        while time.thread_time() < before + 0.02 or not seen.stands.is_set():
            pass

    watch_one(app, seen)
    line = next(line for line in seen.lines if "goes on" in line)
    own, of_all = (float(each.partition("=")[2]) for each in line.split() if "cpu_seconds=" in each)
    assert own >= 0.02
    assert of_all >= own - 0.01  # both are rounded


def test_the_log_names_threads_that_compute_meanwhile(seen, monkeypatch):
    """They hold the interpreter; threads that wait are left out."""
    monkeypatch.setattr(loop_watch, "_MOST_BESIDE", 100)  # whatever else runs in the process of the tests
    ends, is_over = threading.Event(), []

    def compute() -> None:
        while not is_over:
            sum(range(100))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        hold_the_loop(seen)

    threads = [threading.Thread(target=target) for target in (compute, ends.wait)]
    for thread in threads:
        thread.start()
    try:
        watch_one(app, seen)
    finally:
        is_over.append(True)
        ends.set()
        for thread in threads:
            thread.join()
    line = next(line for line in seen.lines if "stands still" in line)
    beside = next(part for part in line.split() if part.startswith("beside="))
    assert beside.count("test_loop_watch.py") == 1
    assert "threading.py" not in beside


@pytest.mark.parametrize("in_child", [False, True])
def test_the_log_names_the_request_that_holds_the_loop(seen, in_child):
    """Method, path, model, tenant, id and where it is, also for a task that it started; neither body nor key."""

    async def work() -> None:
        hold_the_loop(seen)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        note_of(scope).model, note_of(scope).tenant = "org/a", "search"
        await (asyncio.create_task(work()) if in_child else work())

    watch_one(app, seen)
    line = next(line for line in seen.lines if "stands still" in line)
    named = "request=POST path='/v1/chat/completions' model='org/a' tenant='search' request_id='r-1'"
    assert named in line
    assert "at=python3" in line or "threading.py" in line
    assert "secret" not in "".join(seen.lines)
    assert 1 == sum("stands still" in line for line in seen.lines)


def test_what_nobody_asked_for_is_told_as_such(seen):
    """A task that outlives the request which started it is the pool's own work."""

    async def work(is_over: asyncio.Event) -> None:
        await is_over.wait()
        hold_the_loop(seen)

    is_over = asyncio.Event()
    tasks: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tasks.append(asyncio.create_task(work(is_over)))
        asyncio.get_running_loop().call_soon(is_over.set)

    watch_one(app, seen)
    assert any("request=none" in line for line in seen.lines)


def test_a_client_forges_no_line():
    """Whatever a path or an id holds is one short word of the line."""
    scope = make_scope("/x\nWARNING y" + "z" * 1000, {"x-request-id": "a\r\nb" * 500})
    told = str(RequestNote.of(scope))
    assert "\n" not in told and "\r" not in told
    assert len(told) < 1000


def test_stand_stills_are_counted(seen):
    """The largest lateness, the sum of all, and how many were later than each bound."""

    def count(name: str) -> float:
        return loop_watch._STALLS.labels(name)._value.get()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        hold_the_loop(seen)

    before, sum_before = [count("0.05"), count("0.2"), count("5")], loop_watch._LAG_S._value.get()
    began_s = time.monotonic()
    watch_one(app, seen)
    took_s = time.monotonic() - began_s
    assert all(now > then for now, then in zip([count("0.05"), count("0.2")], before[:2], strict=True))
    assert 0.2 < loop_watch._LAG_S._value.get() - sum_before <= took_s
    assert 0.2 < loop_watch._LAG_MAX_S._value.get() <= took_s


def test_a_note_that_nobody_made_may_be_filled_in():
    """The router works without a watch around it."""
    note_of({}).model = "a"
    assert note_of({NOTE_KEY: (note := RequestNote())}) is note
