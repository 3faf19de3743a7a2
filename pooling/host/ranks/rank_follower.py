# SPDX-License-Identifier: Apache-2.0
"""A process of a tensor parallel group other than rank 0: repeats what rank 0 does, see rank_group.py.

Messages from rank 0, in order, each with the number of a question, 0 where none is asked:

    device  NAME ARGS                      a call on the memory; not answered, a failure ends this rank
    make_pages NUM                         make all pages of the device
    build   MODEL CONFIG                   make the model's worker and load its weights
    call    MODEL METHOD ARGS KWARGS WANTED     call the worker; its result is sent back if WANTED, else None
    growth  MODEL                          what its engine takes of the GPU beside the pool's pages
    runner  MODEL METHOD ARGS              call the model's runner adapter
    built   MODEL RANDOM                   the model is built; not answered
    forget  MODEL                          the model is gone; not answered
    random  RANDOM                         go on with rank 0's random state; not answered
    go                                     all ranks are at this point of the build that is asked for
    failed                                 rank 0 raised in what it does at the same time
    stop

Messages to rank 0: QUESTION True RESULT, an answer, and QUESTION False None, this rank waits at a point of a build.
"""

from __future__ import annotations

import faulthandler
import logging
import pickle
import signal
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from tokenpool.host.ranks.side_thread import SideThread
from tokenpool.logs import log_to_stderr
from tokenpool.process.parent_death import end_with_parent
from tokenpool.wire.pulse import STACKS_SIGNAL

logger = logging.getLogger(__name__)

_TOLD = frozenset({"built", "forget", "random"})


class Seat(NamedTuple):
    """What a follower is given."""

    rank: int
    init_method: str
    page_size: int
    cpu_link: int | None
    connection: Connection
    alarm: Connection
    begun: Any
    """Shared with rank 0: by follower, the question that it is in."""


def follow(seat: Seat) -> None:
    """Entry of the process; returns when rank 0 says so or is gone."""
    log_to_stderr(f"rank {seat.rank}")
    end_with_parent()
    faulthandler.register(STACKS_SIGNAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # rank 0 drains first
    from tokenpool.host.ranks.rank_models import RankModels

    Follower(seat, RankModels(seat.rank, seat.init_method, seat.page_size, seat.cpu_link)).run()


class Follower:
    """Does what the messages say, on `models`, which are `RankModels`."""

    def __init__(self, seat: Seat, models: Any) -> None:
        self._seat = seat
        self._connection = seat.connection
        self._models = models
        self._questions: list[int] = []
        self._side = SideThread()
        models.next_message = self._next
        models.meet = self._meet

    def run(self) -> None:
        """Until rank 0 says so or is gone."""
        while True:
            try:
                message = self._next()
            except EOFError:
                return
            if message[0] == "stop":
                return
            self._handle(*message)

    def _handle(self, kind: str, question: int, *content: Any) -> None:
        if kind == "device":
            self._models.mirror.do(*content)
        elif kind in _TOLD:
            getattr(self._models, kind)(*content)
        elif question and kind not in ("go", "failed"):
            self._answer(kind, question, content)

    def _meet(self) -> None:
        """Called in a build: wait at a point of it until rank 0 goes on."""
        if self._side.is_here:
            self._side.hold()
        else:
            self._wait_at_point(self._questions[-1])

    def _wait_at_point(self, question: int) -> None:
        """Wait until rank 0 goes on; do what it asks for other models meanwhile."""
        self._connection.send_bytes(pickle.dumps((question, False, None)))
        with ExitStack() as paused:
            is_paused = False
            while True:
                kind, asked, *content = self._next()
                if asked == question:
                    if kind == "go":
                        return
                    raise RuntimeError("rank 0 failed in what this rank builds")
                if kind == "stop":
                    raise SystemExit
                if kind != "device" and not is_paused:
                    paused.enter_context(self._models.paused())
                    is_paused = True
                self._handle(kind, asked, *content)

    def _next(self) -> Any:
        return pickle.loads(self._connection.recv_bytes())

    def _answer(self, kind: str, question: int, content: tuple[Any, ...]) -> None:
        self._questions.append(question)
        self._seat.begun[self._seat.rank - 1] = question
        try:
            work = partial(getattr(self._models, kind), *content)
            if self._models.is_built_beside(kind, content):
                result = self._side.run(self._models.on_engine_stream(work), partial(self._wait_at_point, question))
            else:
                result = work()
        except Exception as error:
            logger.exception("%s failed", kind)
            self._seat.alarm.send_bytes(b"!")
            result = error
        finally:
            self._questions.pop()
            self._seat.begun[self._seat.rank - 1] = self._questions[-1] if self._questions else 0
        try:
            message = pickle.dumps(result)
        except (pickle.PicklingError, TypeError, AttributeError):  # an exception that holds what cannot be sent
            message = pickle.dumps(RuntimeError(f"{type(result).__name__}: {result}"))
        self._connection.send_bytes(pickle.dumps((question, True, message)))
