# SPDX-License-Identifier: Apache-2.0
"""A process of a tensor parallel group other than rank 0: repeats what rank 0 does, see rank_group.py.

Messages from rank 0, in order:

    device  NAME ARGS                      a call on the memory; not answered, a failure ends this rank
    make_pages NUM                         make all pages of the device
    build   MODEL CONFIG                   make the model's worker and load its weights
    call    MODEL METHOD ARGS KWARGS WANTED     call the worker; its result is sent back if WANTED, else None
    runner  MODEL METHOD ARGS              call the model's runner adapter
    forget  MODEL                          the model is gone; not answered
    failed                                 rank 0 raised in what it does at the same time
    stop
"""

from __future__ import annotations

import logging
import pickle
import signal
from multiprocessing.connection import Connection
from typing import Any

from tokenpool.logs import log_to_stderr
from tokenpool.process.parent_death import end_with_parent

logger = logging.getLogger(__name__)


def follow(
    connection: Connection, alarm: Connection, rank: int, init_method: str, page_size: int, cpu_link: int | None
) -> None:
    """Entry of the process; returns when rank 0 says so or is gone."""
    log_to_stderr(f"rank {rank}")
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # rank 0 drains first
    from tokenpool.host.ranks.rank_models import RankModels

    _Follower(connection, alarm, RankModels(rank, init_method, page_size, cpu_link)).run()


class _Follower:
    def __init__(self, connection: Connection, alarm: Connection, models: Any) -> None:
        self._connection = connection
        self._alarm = alarm
        self._models = models
        models.next_message = self._next

    def run(self) -> None:
        while True:
            try:
                kind, *content = self._next()
            except EOFError:
                return
            if kind == "stop":
                return
            if kind == "device":
                self._models.mirror.do(*content)
            elif kind == "forget":
                self._models.forget(*content)
            elif kind != "failed":
                self._answer(kind, content)

    def _next(self) -> Any:
        return pickle.loads(self._connection.recv_bytes())

    def _answer(self, kind: str, content: list[Any]) -> None:
        try:
            result = getattr(self._models, kind)(*content)
        except Exception as error:
            logger.exception("%s failed", kind)
            self._alarm.send_bytes(b"!")
            result = error
        try:
            message = pickle.dumps(result)
        except (pickle.PicklingError, TypeError, AttributeError):  # an exception that holds what cannot be sent
            message = pickle.dumps(RuntimeError(f"{type(result).__name__}: {result}"))
        self._connection.send_bytes(message)
