# SPDX-License-Identifier: Apache-2.0
"""A group of two ranks of which the other one fails at every question: `python -m tests.helpers.failing_rank HOW`.

`answered`: rank 0 takes each answer and is idle afterwards. `left`: it waits for none, and is idle. `unreadable`: the
answers are exceptions that cannot be made again. `alone`: rank 0 never takes the answer, and waits in something else.
`hangs`, `stops`, `dies`: what the other rank does with its first question. `full`: it takes no message any more.
`link`: the other rank answers with its `cpu_link` instead. `short`: a host starts whose other rank has too few pages.

Prints what rank 0 got, and `alive` once it has been idle for long.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from contextlib import nullcontext
from typing import Any

import tokenpool.host.ranks.rank_group as rank_group
from tokenpool.errors import CapacityError
from tokenpool.host.ranks.rank_follower import Follower, Seat
from tokenpool.host.ranks.rank_watch import RankLimits
from tokenpool.memory.devices.cpu import CpuDevice
from tokenpool.process.parent_death import end_with_parent
from tokenpool.wire.pulse import STACKS_SIGNAL
from tokenpool.wire.spec import HostConfig

LIMIT_S = 3.0
HANG = ("hangs", "stops", "full")
NUM_CALLS = 200


class OddError(Exception):
    """Can be pickled, and not made again."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__("odd")


class Models:
    """Fails."""

    def __init__(self, cpu_link: int | None) -> None:
        self._cpu_link = cpu_link

    def is_built_beside(self, *_: Any) -> bool:
        """Nothing is built."""
        return False

    def make_pages(self, num_pages: int) -> None:
        """Have too few."""
        raise CapacityError(f"rank 1: the GPU gives 3 of {num_pages} pages", needed_pages=num_pages, free_pages=3)

    def call(self, how: str) -> Any:
        """Fail, or tell."""
        if how == "link":
            return self._cpu_link
        if how == "unreadable":
            raise OddError(1, 2)
        if how == "hangs":
            threading.Event().wait()
        if how in ("stops", "full", "dies"):
            os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)
        raise ValueError("a failing step")


def follow(seat: Seat) -> None:
    """The other rank."""
    end_with_parent()
    faulthandler.register(STACKS_SIGNAL)
    Follower(seat, Models(seat.cpu_link)).run()


def main(how: str) -> None:
    """See the module."""
    rank_group.follow = follow
    if how == "short":
        _open_devices()
    limits = RankLimits(call_s=LIMIT_S if how in HANG else 120.0, build_s=120.0, alarm_s=LIMIT_S)
    group, got = rank_group.RankGroup(2, 1 << 16, 77, limits), Counter[str]()
    with group.watch.work("the start", builds=True):
        group.answers(group.ask("call", "link"))
    if how in ("alone", "full"):
        group.ask("call", how)
    for _ in range(NUM_CALLS if how not in ("alone", "full") else 0):
        with group.watch.work("a call") as work:
            work.question = group.ask("call", how)
            if how == "left":
                group.leave(work.question, "model")
                failure = group.take_failure("model")
                assert failure is not None
                assert group.take_failure("model") is None, "it is told once"
                got[type(failure.__cause__).__name__] += 1
                continue
            try:
                got[str(group.answers(work.question))] += 1
            except Exception as error:
                got[type(error).__name__] += 1
    if how == "left":
        group.leave(group.ask("call", how), "model")  # whose answer comes while rank 0 is idle
    while how == "full":
        group.repeat("fill", (0, 1 << 20, 0))
    print(dict(got), flush=True)
    with group.watch.work("a kernel") if how == "alone" else nullcontext():
        threading.Event().wait(2 * LIMIT_S if how != "alone" else 45.0)
    print("alive", flush=True)
    group.close()
    os._exit(0)


def _open_devices() -> None:
    from tokenpool.host.ranks.rank_devices import open_devices

    try:
        open_devices(HostConfig(1 << 20, 1 << 16, tensor_parallel_size=2), CpuDevice(), 16)
    except CapacityError as error:
        print(f"{error}; needed {error.needed_pages}, free {error.free_pages}", flush=True)
    assert not multiprocessing.active_children(), "the other rank is left"
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
