# SPDX-License-Identifier: Apache-2.0
"""The processes of a tensor parallel group: this one is rank 0, each other rank follows it in a process of its own.

Models of a group run on all its ranks. The host decides, schedules and keeps all books in rank 0; a follower has the
workers of all models and repeats, in order, what is done to the memory and what the engines ask of their workers.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import secrets
import tempfile
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import cloudpickle

from tokenpool.errors import HostError
from tokenpool.host.rank_follower import follow

logger = logging.getLogger(__name__)

_ALARM_LIMIT_S = 30.0
_STOP_LIMIT_S = 5.0


class RankGroup:
    """Rank 0's side. `send` may be called from any thread, all else from the host loop's."""

    def __init__(self, size: int) -> None:
        """Start the followers; they import vLLM while this process goes on."""
        self.size = size
        self._folder = tempfile.TemporaryDirectory(prefix="tokenpool-ranks-")
        # vLLM names the ranks' shared memory after this file, which must therefore be like no other on the machine.
        self.init_method = f"file://{self._folder.name}/tokenpool-{secrets.token_hex(8)}"
        """Where the ranks meet, for torch.distributed."""
        self._lock = threading.Lock()
        self._closing = False
        self._answered = threading.Event()
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        alarms = []
        context = multiprocessing.get_context("spawn")
        for rank in range(1, size):
            ours, theirs = context.Pipe()
            alarm, alarm_end = context.Pipe(duplex=False)
            process = context.Process(
                target=follow, args=(theirs, alarm_end, rank, self.init_method), name=f"rank {rank}", daemon=True
            )
            process.start()
            theirs.close()
            alarm_end.close()
            self._connections.append(ours)
            self._processes.append(process)
            alarms.append(alarm)
        threading.Thread(target=self._watch, args=(alarms,), name="ranks", daemon=True).start()

    @property
    def pids(self) -> list[int]:
        """Process ids of the followers, by rank."""
        return [process.pid for process in self._processes]

    def send(self, kind: str, *content: Any) -> None:
        """Tell all followers something they do not answer; raises HostError when one is gone."""
        message = cloudpickle.dumps((kind, *content))
        try:
            with self._lock:
                for connection in self._connections:
                    connection.send_bytes(message)
        except OSError as error:
            raise HostError(f"a rank of the tensor parallel group is gone: {error}") from error

    def repeat(self, name: str, args: tuple[Any, ...]) -> None:
        """Have a call on rank 0's memory repeated; see mirrored_device.py."""
        self.send("device", name, args)

    def answers(self) -> list[Any]:
        """What the followers answer to the last question, by rank; raises what the first of them raised."""
        try:
            answers = [pickle.loads(connection.recv_bytes()) for connection in self._connections]
        except (OSError, EOFError) as error:
            raise HostError(f"a rank of the tensor parallel group is gone: {error}") from error
        self._answered.set()
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def discard_answers(self) -> None:
        """Take the answers to a question that rank 0 failed at, whatever they are."""
        if not all(connection.poll(_ALARM_LIMIT_S) for connection in self._connections):
            logger.critical("rank 0 failed while another waits for it: the host ends")
            os._exit(70)
        with contextlib.suppress(Exception):
            self.answers()

    def close(self) -> None:
        """End the followers."""
        self._closing = True
        try:
            self.send("stop")
        except HostError:
            logger.debug("a rank was gone already")
        for process in self._processes:
            process.join(_STOP_LIMIT_S)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()

    def _watch(self, alarms: Sequence[Connection]) -> None:
        """End this process when a follower is gone, or failed alone: rank 0 may wait for it in a kernel, for ever."""
        sentinels = [process.sentinel for process in self._processes]
        while True:
            ready = wait([*sentinels, *alarms])
            if self._closing:
                return
            if any(sentinel in ready for sentinel in sentinels):
                logger.critical("a rank of the tensor parallel group ended: the host ends too")
                os._exit(70)
            self._answered.clear()
            for alarm in alarms:
                if alarm in ready:
                    alarm.recv_bytes()
            if not self._answered.wait(_ALARM_LIMIT_S):
                logger.critical("a rank failed while another waits for it: the host ends")
                os._exit(70)
