# SPDX-License-Identifier: Apache-2.0
"""Tasks that the pool needs are kept running, and its end comes whatever hangs."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.vllm


def failures(task: str) -> float:
    from tokenpool.process import keeper

    return keeper._FAILURES.labels(task)._value.get()


def test_a_task_that_dies_is_logged_counted_and_started_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each death is one line with its traceback and one more of its counter; a task that returns has ended."""
    from tokenpool.process import keeper

    monkeypatch.setattr(keeper, "RESTART_WAITS_S", (0.0,))
    runs = []

    async def work() -> None:
        runs.append(1)
        if len(runs) < 4:
            raise ValueError(f"run {len(runs)}")

    before = failures("some work")
    asyncio.run(asyncio.wait_for(keeper.keep("some work", work), 30))
    assert len(runs) == 4 and failures("some work") - before == 3
    lines = [record for record in caplog.records if "task=some_work" in record.getMessage()]
    assert len(lines) == 3 and all(line.exc_info and line.levelno == logging.ERROR for line in lines)


def test_a_kept_task_can_be_cancelled() -> None:
    """It ends at once, also between two runs, and that is no failure."""
    from tokenpool.process import keeper

    async def test() -> None:
        task = keeper.start_kept("sleeping", lambda: asyncio.sleep(1000))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 30)

    before = failures("sleeping")
    asyncio.run(test())
    assert failures("sleeping") == before


def test_waits_grow_and_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last wait stays; what was stable, or is reset, waits shortly again."""
    from tokenpool.process.keeper import RESTART_WAITS_S, Backoff

    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    backoff = Backoff()
    assert [backoff.next_s() for _ in range(8)] == [*RESTART_WAITS_S, 30.0, 30.0]
    now[0] += 200.0
    assert backoff.next_s() == 0.5
    backoff.next_s()
    backoff.reset()
    assert backoff.next_s() == 0.5
    assert [Backoff(first_at_once=True).next_s() for _ in range(2)] == [0.0, 0.0]


def test_a_part_of_a_shutdown_does_not_hold_up_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    """What hangs is left alone, even if it cannot be cancelled; what fails is logged."""
    from tokenpool.process.ending import within

    async def test() -> None:
        free = asyncio.Event()

        async def deaf() -> None:
            while not free.is_set():
                try:
                    await free.wait()
                except asyncio.CancelledError:
                    continue

        async def bad() -> None:
            raise OSError("no space")

        assert not await within(0.01, "the deaf part", deaf())
        assert await within(30.0, "the bad part", bad())
        assert await within(30.0, "the good part", asyncio.sleep(0))
        free.set()

    asyncio.run(test())
    messages = [record.getMessage() for record in caplog.records]
    left, failed = "the deaf part takes more than 0.01 s, going on without", "the bad part failed, going on without"
    assert messages == [left, failed]


def test_a_process_whose_shutdown_hangs_ends(capfd: pytest.CaptureFixture[str]) -> None:
    """A thread ends it with a status that is not 0 and shows where it hangs; one that is done is let go."""
    from tokenpool.process.ending import STATUS_OF_A_HANG, end_after

    ended, statuses = threading.Event(), []

    def end(status: int) -> None:
        statuses.append(status)
        ended.set()

    done = threading.Event()
    others = [threading.Thread(target=done.wait, daemon=True) for _ in range(120)]  # more than CPython shows
    for other in others:
        other.start()
    end_after(0.01, end)
    assert ended.wait(30)  # as an event loop would hang
    done.set()
    end_after(1000.0, end).cancel()
    assert statuses == [STATUS_OF_A_HANG] and STATUS_OF_A_HANG
    assert "test_a_process_whose_shutdown_hangs_ends" in capfd.readouterr().err


def test_a_pool_whose_host_does_not_end_is_stopped(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`stop` returns, whatever the host, its clients and the requests do."""
    from tests.helpers.stand_ins import stand_in_pool
    from tokenpool.serve.pool import local_hosts, pool

    monkeypatch.setattr(local_hosts, "HOST_END_S", 0.01)
    monkeypatch.setattr(local_hosts, "KILL_S", 0.0)
    monkeypatch.setattr(pool, "_CLOSE_S", 0.01)

    async def test() -> None:
        async with stand_in_pool(monkeypatch, tmp_path) as world:
            await world.pool.start()
            stuck = world.client("a")
            stuck.waiting.append("stream")
            world.client("b").abort_all = world.client("b").close = lambda: asyncio.sleep(1000)  # type: ignore[method-assign]
            world.hold.clear()
            await asyncio.wait_for(world.pool.stop(), 30)
            assert stuck.waiting == []

    asyncio.run(test())


class Process:
    """A frontend that ends when the test says so."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.end = asyncio.Event()

    async def wait(self) -> int:
        await self.end.wait()
        return 1


def test_a_frontend_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a start that fails nor trouble with what a dead one left behind leaves a frontend away for ever."""
    from tokenpool.process import keeper
    from tokenpool.serve.frontends import frontends

    monkeypatch.setattr(keeper, "RESTART_WAITS_S", (0.0,))
    started: list[Process] = []
    calls = []

    async def start(settings: Any, sock: Any) -> Process:
        calls.append(settings.index)
        if len(calls) == 1:
            raise OSError("no more processes")
        started.append(Process(len(calls)))
        return started[-1]

    async def died(index: int, life: int, pid: int) -> None:
        raise RuntimeError("no such file")

    monkeypatch.setattr(frontends, "FrontendProcess", SimpleNamespace(start=start))
    monkeypatch.setattr(frontends, "replace", lambda settings, **given: SimpleNamespace(**given))

    async def test() -> None:
        pool = SimpleNamespace(stopping=False)
        keeping: Any = SimpleNamespace(
            _pool=pool, processes={}, _settings=None, _sock=None, _died=died, _starts=itertools.count(1), _lives={}
        )
        task = keeper.start_kept("keeping", lambda: frontends.Frontends._keep(keeping, 3))
        async with asyncio.timeout(30):
            while len(started) < 3:
                await asyncio.sleep(0)
                if started:
                    started[-1].end.set()
        assert keeping.processes[3] in started and calls == [3] * len(calls)
        task.cancel()

    asyncio.run(test())
