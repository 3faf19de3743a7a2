# SPDX-License-Identifier: Apache-2.0
"""A group of two ranks of which the other one fails at every question: `python -m tests.helpers.failing_rank HOW`.

`answered`: rank 0 takes each answer and is idle afterwards. `alone`: it never does. `unreadable`: the answers are
exceptions that cannot be made again. `link`: the other rank answers with its `cpu_link` instead. `short`: a host is
started whose other rank has too few pages.

Prints what rank 0 got, and `alive` once it has been idle for long.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections import Counter
from multiprocessing.connection import Connection
from typing import Any

import tokenpool.host.ranks.rank_group as rank_group
from tokenpool.errors import CapacityError
from tokenpool.host.ranks.rank_follower import _Follower
from tokenpool.memory.devices.cpu import CpuDevice
from tokenpool.wire.spec import HostConfig

LIMIT_S = 0.5
NUM_CALLS = 200


class OddError(Exception):
    """Can be pickled, and not made again."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__("odd")


class Models:
    """Fails."""

    def __init__(self, cpu_link: int | None) -> None:
        self._cpu_link = cpu_link

    def make_pages(self, num_pages: int) -> None:
        """Have too few."""
        raise CapacityError(f"rank 1: the GPU gives 3 of {num_pages} pages", needed_pages=num_pages, free_pages=3)

    def call(self, how: str) -> Any:
        """Fail, or tell."""
        if how == "link":
            return self._cpu_link
        if how == "unreadable":
            raise OddError(1, 2)
        raise ValueError("a failing step")


def follow(
    connection: Connection, alarm: Connection, rank: int, init_method: str, page_size: int, cpu_link: int | None
) -> None:
    """The other rank."""
    _Follower(connection, alarm, Models(cpu_link)).run()


def main(how: str) -> None:
    """See the module."""
    rank_group._ALARM_LIMIT_S = LIMIT_S
    rank_group.follow = follow
    if how == "short":
        _open_devices()
    group, got = rank_group.RankGroup(2, 1 << 16, 77), Counter[str]()
    if how == "alone":
        group.send("call", how)
    else:
        for _ in range(NUM_CALLS):
            group.send("call", how)
            try:
                got[str(group.answers())] += 1
            except Exception as error:
                got[type(error).__name__] += 1
    print(dict(got), flush=True)
    threading.Event().wait(4 * LIMIT_S if how != "alone" else 45.0)
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
