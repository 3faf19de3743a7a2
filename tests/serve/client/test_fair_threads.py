# SPDX-License-Identifier: Apache-2.0
"""Tasks of several owners on a few threads: each runs once, in turn, and what is given up is let go at once."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenpool.serve.client import fair_threads
from tokenpool.serve.client.fair_threads import FairThreads

pytestmark = pytest.mark.cpu

PLACES, PLACES_EACH = 3, 2


def threads() -> FairThreads:
    return FairThreads("test", PLACES, PLACES_EACH)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30))
def test_each_runs_once_in_its_owners_order_within_the_places(owners: list[str]) -> None:
    """Whoever sends what: nothing is lost, no owner has more than his places, and none overtakes himself."""
    fair, lock = threads(), threading.Lock()
    running: Counter[str] = Counter()
    too_many, begun = [], []

    def work(owner: str, number: int) -> int:
        with lock:
            running[owner] += 1
            if running[owner] > PLACES_EACH or running.total() > PLACES:
                too_many.append(dict(running))
            begun.append((owner, number))
        with lock:
            running[owner] -= 1
        return number

    futures = [fair.submit(owner, lambda o=owner, n=n: work(o, n)) for n, owner in enumerate(owners)]  # type: ignore[misc]
    assert [future.result(60) for future in futures] == list(range(len(owners)))
    assert too_many == []
    assert sorted(begun, key=lambda each: each[1]) == [(owner, number) for number, owner in enumerate(owners)]


def test_one_owner_at_a_time_keeps_his_order() -> None:
    """With one place each, what he asked for first is begun first."""
    fair, begun = FairThreads("test", PLACES, 1), []
    futures = [fair.submit("a", lambda n=n: begun.append(n)) for n in range(20)]  # type: ignore[misc]
    for future in futures:
        future.result(60)
    assert begun == list(range(20))


def test_one_that_is_cancelled_is_let_go_and_not_begun() -> None:
    """Though the places are taken for as long as anybody looks: what it holds may be large."""

    class Text:
        pass

    fair, ends, begun, text = threads(), threading.Event(), [], Text()
    blocking = [fair.submit("a", lambda: ends.wait(60)) for _ in range(PLACES_EACH)]
    held = weakref.ref(text)
    waiting = fair.submit("a", lambda text=text: begun.append(text))  # type: ignore[misc]
    del text
    assert waiting.cancel()
    del waiting
    gc.collect()
    assert held() is None
    ends.set()
    assert all(future.result(60) for future in blocking)
    fair.submit("a", lambda: None).result(60)
    assert begun == []


def test_at_the_end_what_waits_is_cancelled_and_nothing_more_is_taken() -> None:
    fair, ends = threads(), threading.Event()
    blocking = [fair.submit("a", lambda: ends.wait(60)) for _ in range(PLACES_EACH)]
    waiting = [fair.submit("a", lambda: True) for _ in range(3)]
    fair.shutdown()
    assert all(future.cancelled() for future in waiting)
    with pytest.raises(RuntimeError, match="gone"):
        fair.submit("b", lambda: True)
    ends.set()
    assert all(future.result(60) for future in blocking)


def test_a_flood_that_is_given_up_is_not_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many wait, one that is cancelled is not compared with the others."""
    num_compared = 0

    class Counted(fair_threads._Task[Any]):
        def __eq__(self, other: object) -> bool:
            nonlocal num_compared
            num_compared += 1
            return self is other

        __hash__ = object.__hash__

    monkeypatch.setattr(fair_threads, "_Task", Counted)
    fair, ends = threads(), threading.Event()
    blocking = [fair.submit("a", lambda: ends.wait(60)) for _ in range(PLACES_EACH)]
    waiting = [fair.submit("a", lambda: True) for _ in range(200)]
    assert all(future.cancel() for future in reversed(waiting))
    assert num_compared <= len(waiting)
    ends.set()
    assert all(future.result(60) for future in blocking)


def test_a_thread_that_cannot_be_started_keeps_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asked is told, as often as that is so; later there are as many places as before."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    fair = threads()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(PLACES + 1):
            with contextlib.suppress(RuntimeError):
                fair.submit("a", lambda: True).result(0)
    assert fair.num_running == 0
    assert fair.submit("a", lambda: True).result(60)
