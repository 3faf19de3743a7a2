# SPDX-License-Identifier: Apache-2.0
"""A host's connection to the keeper of its node; a keeper that is not there is started, one that hangs is killed."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

from tokenpool.errors import HostError
from tokenpool.node_store.messages import MESSAGE_BYTES, VERSION, Answer, Hello, Message, pack, read_answer
from tokenpool.node_store.place import connect, peer_of, start_keeper

logger = logging.getLogger(__name__)

Told = tuple[Answer, int | None]
"""What the keeper answers, and the descriptor beside it."""

ANSWER_LIMIT_S = 5.0
"""A keeper answers in well under a millisecond, on a machine that is busy in tenths of a second."""
HELLO_LIMIT_S = 2.0
HUNG_S = 30.0
"""A keeper that answers nobody for so long is killed, so that another one can be there."""


class Line:
    """At most one connection; used by one thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._socket: socket.socket | None = None
        self._silent_since_s: float | None = None

    def open(self, budget_bytes: int) -> None:
        """Find a keeper, or start one, and greet it; raises OSError, HostError, MsgspecError."""
        try:
            self._socket = self._connect()
            answer, _ = self.exchange(Hello(VERSION, budget_bytes))
            if not answer.ok:
                raise HostError(answer.problem)
            self._socket.settimeout(ANSWER_LIMIT_S)
            self._silent_since_s = None
        except BaseException as error:
            if isinstance(error, TimeoutError):
                self._end_if_hung()
            self.close()
            raise

    def exchange(self, message: Message, file: int | None = None) -> Told:
        """Say one thing and hear the answer; raises OSError, MsgspecError, after which the line is of no use."""
        assert self._socket is not None, "there is no keeper"
        socket.send_fds(self._socket, [pack(message)], [file] if file is not None else [])
        content, files, _, _ = socket.recv_fds(self._socket, MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        try:
            if not content:
                raise ConnectionError("it has ended")
            answer = read_answer(content)
        except BaseException:
            for each in files:
                os.close(each)
            raise
        if answer.problem:
            logger.info("the keeper of host copies refuses %s: %s", type(message).__name__, answer.problem)
        return answer, files[0] if files else None

    def close(self) -> None:
        """Leave, which ends all leases there."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connect(self) -> socket.socket:
        with suppress(FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            return connect(self._folder, HELLO_LIMIT_S)
        start_keeper(self._folder)
        return connect(self._folder, HELLO_LIMIT_S)

    def _end_if_hung(self) -> None:
        """Kill a keeper that has not answered for long; it is there, or the line would have ended."""
        now_s = time.monotonic()
        if self._silent_since_s is None:
            self._silent_since_s = now_s
        if self._socket is None or now_s < self._silent_since_s + HUNG_S:
            return
        self._silent_since_s = None
        with suppress(OSError):
            process = os.pidfd_open(peer_of(self._socket)[0])
            try:
                poller = select.poll()
                poller.register(self._socket, 0)
                if not poller.poll(0):  # it still has the other end: the number is its
                    logger.error("the keeper of host copies hangs and is killed")
                    signal.pidfd_send_signal(process, signal.SIGKILL)
            finally:
                os.close(process)
