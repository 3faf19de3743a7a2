# SPDX-License-Identifier: Apache-2.0
"""Ray's head is away: what a server says of it, and that nobody waits for it. Without Ray."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.stand_ins import StandInClient, plan_of
from tests.serve.pool.test_other_servers import two_servers, until
from tokenpool.cluster.pool_record import Kept, KeptWriter
from tokenpool.cluster.values import HostCount
from tokenpool.errors import HostError
from tokenpool.model_life import Life
from tokenpool.serve.clustered import head_watch, ray_hosts
from tokenpool.serve.clustered.head_watch import AWAY_AFTER_S, LOOK_PERIOD_S, HeadWatch

pytestmark = pytest.mark.vllm


class Time:
    """A clock that a test moves on."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def hurry(monkeypatch: pytest.MonkeyPatch, **limits_s: float) -> None:
    """Limits of a server that is alone, in the place of the real ones."""
    for name, limit_s in limits_s.items():
        monkeypatch.setattr(ray_hosts, f"_{name}", limit_s)


def leave_alone(hosts: ray_hosts.RayHosts, monkeypatch: pytest.MonkeyPatch, ask: Any, killed: list[int]) -> None:
    """No further view comes; hosts answer as `ask` does, and signals that the server sends itself are noted."""
    for task in hosts._tasks:
        task.cancel()
    monkeypatch.setattr(ray_hosts.os, "kill", lambda pid, number: killed.append(number))
    monkeypatch.setattr(hosts, "ask", ask)


def watch_of(time_: Time) -> HeadWatch:
    return HeadWatch(lambda limit_s: None, clock=time_)


STEPS = st.lists(st.tuples(st.sampled_from(["judge", "answer", "pause"]), st.floats(0.01, 2.0)), max_size=60)


@given(steps=STEPS)
def test_it_is_away_after_seconds_without_an_answer_and_never_for_a_pause_of_ones_own(
    steps: list[tuple[str, float]],
) -> None:
    """However looks and judgements fall: not away while answers come, away once none has come for long enough."""
    time_ = Time()
    watch = watch_of(time_)
    answered_s = time_.now_s
    asleep_s = 0.0
    for what, seconds in steps:
        if what == "pause":  # the process is stopped, by a debugger or a busy machine
            time_.now_s += 100 * seconds
            asleep_s += 100 * seconds
        else:
            time_.now_s += seconds
        if what == "answer":
            watch.answered()
            answered_s, asleep_s = time_.now_s, 0.0
        watch.judge()
        silent_s = time_.now_s - answered_s
        if silent_s <= AWAY_AFTER_S:
            assert watch.is_up
        if silent_s - asleep_s > AWAY_AFTER_S:
            assert not watch.is_up, "it has not answered, and is said to be up"
        told = watch.told()
        assert told["up"] is watch.is_up and (told["away_s"] > 0) is not watch.is_up


def test_one_pause_of_this_process_is_no_silence_of_the_head() -> None:
    time_ = Time()
    watch = watch_of(time_)
    time_.now_s += 3600
    watch.judge()
    assert watch.is_up
    for _ in range(int((AWAY_AFTER_S + LOOK_PERIOD_S) / LOOK_PERIOD_S)):
        time_.now_s += LOOK_PERIOD_S
        watch.judge()
    assert not watch.is_up


def test_its_going_and_coming_are_a_line_each(caplog: pytest.LogCaptureFixture) -> None:
    time_ = Time()
    watch = watch_of(time_)
    with caplog.at_level(logging.WARNING):
        for _ in range(60):
            time_.now_s += LOOK_PERIOD_S
            watch.judge()
        assert [record.getMessage()[:41] for record in caplog.records] == ["Ray's head has not answered for 6 s: requ"]
        assert head_watch._UP._value.get() == 0 and watch.told() == {"up": False, "away_s": 60.0}
        watch.answered()
        for _ in range(4):
            time_.now_s += LOOK_PERIOD_S
            watch.judge()
    assert [record.getMessage() for record in caplog.records][1:] == ["Ray's head answers again"]
    assert head_watch._UP._value.get() == 1 and watch.told() == {"up": True, "away_s": 0.0}


@pytest.mark.parametrize("how", ["raises", "hangs"])
def test_a_look_that_fails_or_never_returns_holds_nobody_up(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop goes on, one thread looks at most, and an answer that comes later counts."""
    monkeypatch.setattr(head_watch, "AWAY_AFTER_S", 0.05)
    go_on, is_well = threading.Event(), threading.Event()
    busy: list[int] = []
    most_busy = 0

    def look(limit_s: float) -> None:
        nonlocal most_busy
        busy.append(1)
        most_busy = max(most_busy, len(busy))
        try:
            if not is_well.is_set():
                if how == "raises":
                    raise ConnectionError("nobody is there")
                go_on.wait(60)
        finally:
            busy.pop()

    async def main() -> None:
        watch = HeadWatch(look, period_s=0.01)
        task = asyncio.create_task(watch.follow())
        await until(lambda: not watch.is_up)
        is_well.set()
        go_on.set()
        await until(lambda: watch.is_up)
        task.cancel()

    asyncio.run(main())
    assert most_busy == 1


def test_a_server_says_that_the_head_is_away_and_serves_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with two_servers(monkeypatch, [plan_of("a", load="on_demand")]) as (one, _):
            one.hosts.head.is_up = False
            report = await one.hosts.report()
            assert report["cluster"]["head"]["up"] is False and report["cluster"]["head"]["away_s"] >= 0
            assert one.states() == {"a": "cold"}

    asyncio.run(main())


@pytest.mark.parametrize("left", ["a host", "the head", "nobody", "no need"])
def test_a_server_ends_when_neither_head_nor_host_answers(left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only then: who waits gets 503, and its end is a failure, so that it is started anew."""
    hurry(monkeypatch, ALONE_LOOK_S=0.01, ALONE_SAY_S=0.05, ALONE_LIMIT_S=0.2, LAST_WORD_S=0.01)
    killed: list[int] = []
    asked = 0

    async def ask(method: str, *args: Any) -> dict[str, Any]:
        nonlocal asked
        asked += 1
        return {"h0": None if left == "a host" else ConnectionError("gone"), "h1": ConnectionError("gone")}

    async def main() -> None:
        async with two_servers(monkeypatch) as (one, _):
            await one.add("a")
            leave_alone(one.hosts, monkeypatch, ask, killed)
            one.hosts.head.is_up = left == "the head"
            if left == "no need":
                assert one.hosts.view is not None
                one.hosts.view = replace(one.hosts.view, hosts={}, host_count=HostCount(0, 2, (), ()))
            model = one.models["a"]
            client = cast(StandInClient, model.client)
            client.waiting.append("accepted")
            task = asyncio.create_task(one.hosts._watch_alone())
            if left == "nobody":
                await until(lambda: not one.hosts.is_alive)
                assert client.waiting == ["accepted"], "it may be this server that is cut off"
                await task
                assert client.told["accepted"].startswith("503: ") and "no engine host" in client.told["accepted"]
                assert model.app.state == Life.FAILED and isinstance(one.hosts._session.fault, HostError)
            else:
                await asyncio.sleep(0.5)
                assert not task.done() and one.hosts.is_alive and client.told == {}
                task.cancel()
                client.waiting.clear()

    asyncio.run(main())
    assert killed == ([signal.SIGTERM] if left == "nobody" else [])
    assert (asked == 0) is (left in ("the head", "no need"))


@pytest.mark.parametrize("left", ["nobody", "the head now and then", "a first host that comes"])
def test_a_server_without_a_host_ends_when_the_head_is_gone_for_good(
    left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No host can come any more: after a longer limit than where hosts are lost, until which requests wait for one."""
    hurry(monkeypatch, ALONE_LOOK_S=0.01, ALONE_SAY_S=0.02, ALONE_LIMIT_S=0.05, BARE_LIMIT_S=0.5, LAST_WORD_S=0.01)
    killed: list[int] = []

    async def ask(method: str, *args: Any) -> dict[str, Any]:
        return {"h0": None}

    async def main() -> None:
        async with two_servers(monkeypatch) as (one, _):
            await one.add("a")
            leave_alone(one.hosts, monkeypatch, ask, killed)
            view = one.hosts.view
            assert view is not None
            one.hosts.view = replace(view, hosts={}, host_count=HostCount(0, 2, (), ()))
            one.hosts.head.is_up = False
            client = cast(StandInClient, one.models["a"].client)
            client.waiting.append("accepted")
            task = asyncio.create_task(one.hosts._watch_alone())
            await asyncio.sleep(0.25)
            assert not task.done() and one.hosts.is_alive and client.told == {}, "it waits for a first host"
            if left == "nobody":
                await task
                assert client.told["accepted"].startswith("503: ") and "has been no engine host" in str(client.told)
                assert isinstance(one.hosts._session.fault, HostError)
                return
            for _ in range(3):
                if left == "a first host that comes":
                    one.hosts.view = view
                one.hosts.head.is_up = left == "the head now and then"
                await asyncio.sleep(0.1)
                one.hosts.head.is_up = False
                await asyncio.sleep(0.2)
            assert not task.done() and one.hosts.is_alive and client.told == {}
            task.cancel()
            client.waiting.clear()

    asyncio.run(main())
    assert killed == ([signal.SIGTERM] if left == "nobody" else [])


def test_a_server_that_was_cut_off_serves_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """New requests are refused while neither head nor hosts answer, and taken once a host does."""
    hurry(monkeypatch, ALONE_LOOK_S=0.01, ALONE_SAY_S=0.02)
    is_back = False

    async def ask(method: str, *args: Any) -> dict[str, Any]:
        return {"h0": None if is_back else ConnectionError("cut off")}

    async def main() -> None:
        nonlocal is_back
        async with two_servers(monkeypatch) as (one, _):
            await one.add("a")
            monkeypatch.setattr(one.hosts, "ask", ask)
            one.hosts.head.is_up = False
            task = asyncio.create_task(one.hosts._watch_alone())
            await until(lambda: one.states() == {"a": "unavailable"})
            assert not one.hosts.is_alive
            is_back = True
            await until(lambda: one.states() == {"a": "ready"})
            assert one.hosts.is_alive and not task.done()
            task.cancel()

    asyncio.run(main())


def kept(number: int) -> Kept:
    return Kept([], number.to_bytes(4, "big"), [])


WRITES = st.lists(st.sampled_from(["works", "fails", "is slow"]), max_size=12)


@settings(deadline=None, max_examples=30)
@given(writes=WRITES, puts=st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_what_is_put_last_is_kept_in_the_end_and_nothing_older_after_it(writes: list[str], puts: list[int]) -> None:
    """However writes go: one at a time, and whoever changes something goes on without them."""
    outcomes, stored, under_way = iter(writes), [], []

    def write(value: Kept) -> None:
        under_way.append(1)
        assert len(under_way) == 1, "two writes at a time"
        try:
            outcome = next(outcomes, "works")
            if outcome == "is slow":
                time.sleep(0.01)
            if outcome == "fails":
                raise ConnectionError("the head is away")
            stored.append(value)
        finally:
            under_way.pop()

    async def main() -> None:
        writer = KeptWriter(write, retry_s=0.001)
        for number, rests in enumerate(puts):
            writer.put(kept(number))
            for _ in range(rests):
                await asyncio.sleep(0.002)
        await until(lambda: stored and stored[-1] == kept(len(puts) - 1))
        assert await writer.written(20)
        await writer.stop(20)

    asyncio.run(main())
    assert stored == sorted(stored, key=lambda value: value.file_models)


def test_a_write_that_hangs_holds_up_one_change_for_a_moment_and_no_others() -> None:
    go_on, stored = threading.Event(), []

    def write(value: Kept) -> None:
        go_on.wait(60)
        stored.append(value)

    async def main() -> None:
        writer = KeptWriter(write)
        writer.put(kept(0))
        assert not await writer.written(0.01)
        writer.put(kept(1))
        assert not await writer.written(1e9), "the second one waited too"
        go_on.set()
        await until(lambda: stored == [kept(0), kept(1)])
        writer.put(kept(2))
        assert await writer.written(20)
        await writer.stop(20)
        writer.put(kept(3))

    asyncio.run(main())
    assert stored == [kept(0), kept(1), kept(2)]
