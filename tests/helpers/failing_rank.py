# SPDX-License-Identifier: Apache-2.0
"""A group of two ranks of which the other one fails at every question: `python -m tests.helpers.failing_rank HOW`.

`answered`: rank 0 takes each answer and is idle afterwards. `alone`: it never does. `unreadable`: the answers are
exceptions that cannot be made again. `link`: the other rank answers with its `cpu_link` instead.

Prints what rank 0 got, and `alive` once it has been idle for long.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from multiprocessing.connection import Connection
from typing import Any

import tokenpool.host.ranks.rank_group as rank_group
from tokenpool.host.ranks.rank_follower import _Follower

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

    def call(self, how: str) -> Any:
        """Fail, or tell."""
        if how == "link":
            return self._cpu_link
        if how == "unreadable":
            raise OddError(1, 2)
        raise ValueError("a failing step")


def follow(connection: Connection, alarm: Connection, rank: int, init_method: str, cpu_link: int | None) -> None:
    """The other rank."""
    _Follower(connection, alarm, Models(cpu_link)).run()


def main(how: str) -> None:
    """See the module."""
    rank_group._ALARM_LIMIT_S = LIMIT_S
    rank_group.follow = follow
    group, got = rank_group.RankGroup(2, 77), Counter[str]()
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


if __name__ == "__main__":
    main(*sys.argv[1:])
