# SPDX-License-Identifier: Apache-2.0
"""Calls beside a thread that cannot wait for them: each gives its own result, and those that are left take no core."""

from __future__ import annotations

import os
import random
import threading

import pytest

from tokenpool.process.side_call import SideCall, SideCalls

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("seed", range(5))
def test_each_call_gives_its_own_result(seed: int) -> None:
    """In whatever order they end, are looked at or left; what is left counts until it ends."""
    draw = random.Random(seed)
    calls: SideCalls[int] = SideCalls("side", 3)
    gates: list[threading.Event] = []
    under_way: list[tuple[int, SideCall[int]]] = []
    num_left = 0
    for number in range(60):
        what = draw.randrange(4)
        if what < 2:
            gate = threading.Event()
            gates.append(gate)
            under_way.append((number, calls.begin(lambda gate=gate, number=number: gate.wait(60) and number)))
        elif what == 2 and under_way:
            index = draw.randrange(len(under_way))
            expected, call = under_way.pop(index)
            gates.pop(index).set()
            assert call.wait(60) and call.result() == expected
        elif under_way and num_left < 3:
            index = draw.randrange(len(under_way))
            expected, call = under_way.pop(index)
            call.leave()
            num_left += 1
            assert calls.is_full == (num_left >= 3)
            gates.pop(index).set()
            assert call.wait(60) and call.result() == expected
            while len(calls._left) >= num_left:  # its thread takes it off
                pass
            num_left -= 1
    for gate in gates:
        gate.set()
    assert [call.result() for _, call in under_way if call.wait(60)] == [number for number, _ in under_way]


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="the system has no such class of threads")
def test_a_call_that_is_left_has_the_cores_that_nobody_wants() -> None:
    """And its thread makes no other call, for that cannot be taken back; others are as they were."""
    calls: SideCalls[int] = SideCalls("side", 3)
    first = calls.begin(threading.get_native_id)
    assert first.wait(60)
    gate, told = threading.Event(), []

    def work() -> int:
        told.append(threading.get_native_id())
        gate.wait(60)
        return os.sched_getscheduler(0)

    left = calls.begin(work)
    while not told:
        pass
    left.leave()
    gate.set()
    assert left.wait(60) and left.result() == os.SCHED_IDLE
    for _ in range(3):
        assert calls.run(lambda: os.sched_getscheduler(0), 1.0)[0] == os.SCHED_OTHER
        assert calls.run(threading.get_native_id, 1.0)[0] != told[0]


def test_a_call_gives_way_whether_it_has_begun_or_not() -> None:
    """And its thread makes no other call at that rank."""
    calls: SideCalls[int] = SideCalls("side", 3)

    def rank() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    own = rank()
    for _ in range(20):
        gate = threading.Event()
        call = calls.begin(lambda gate=gate: gate.wait(60) and rank())
        call.give_way()
        gate.set()
        assert call.wait(60) and call.result() == max(own, 19)
        assert calls.run(rank, 1.0)[0] == own


def test_an_idle_thread_holds_nothing() -> None:
    """What a call referred to goes with it."""
    import weakref

    class Thing:
        pass

    calls: SideCalls[Thing] = SideCalls("side", 3)
    thing = Thing()
    seen = weakref.ref(thing)
    call = calls.begin(lambda thing=thing: thing)
    assert call.wait(60)
    del call, thing
    assert calls.run(lambda: None, 1.0)[0] is None
    for _ in range(1000):
        if seen() is None:
            return
        calls.run(lambda: None, 1.0)
    raise AssertionError("a thread keeps what its call was given")
