# SPDX-License-Identifier: Apache-2.0
"""The processes of a tensor parallel group: this one is rank 0, each other rank follows it in a process of its own.

Models of a group run on all its ranks. The host decides, schedules and keeps all books in rank 0; a follower has the
workers of all models and repeats, in order, what is done to the memory and what the engines ask of their workers.
"""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import os
import pickle
import secrets
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import cloudpickle

from tokenpool.errors import HostError
from tokenpool.host.ranks.rank_follower import follow

logger = logging.getLogger(__name__)

_ALARM_LIMIT_S = 30.0
_STOP_LIMIT_S = 5.0


class RankGroup:
    """Rank 0's side. `send` may be called from any thread, all else from the host loop's."""

    def __init__(self, size: int, page_size: int, cpu_link: int | None = None) -> None:
        """Start the followers; they import vLLM while this process goes on. Sizes and link are those of HostConfig."""
        self.size = size
        self._folder = tempfile.TemporaryDirectory(prefix="tokenpool-ranks-")
        # vLLM names the ranks' shared memory after this file, which must therefore be like no other on the machine.
        self.init_method = f"file://{self._folder.name}/tokenpool-{secrets.token_hex(8)}"
        """Where the ranks meet, for torch.distributed."""
        self._lock = threading.Lock()
        self._closing = False
        self._failed_answers = [0] * (size - 1)
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        alarms = []
        context = multiprocessing.get_context("spawn")
        for rank in range(1, size):
            ours, theirs = context.Pipe()
            alarm, alarm_end = context.Pipe(duplex=False)
            process = context.Process(
                target=follow,
                args=(theirs, alarm_end, rank, self.init_method, page_size, cpu_link),
                name=f"rank {rank}",
                daemon=True,
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
            packed = [connection.recv_bytes() for connection in self._connections]
        except (OSError, EOFError) as error:
            raise HostError(f"a rank of the tensor parallel group is gone: {error}") from error
        answers = [_unpacked(answer) for answer in packed]
        for index, answer in enumerate(answers):
            self._failed_answers[index] += isinstance(answer, Exception)
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
        """End this process when a follower is gone, or failed alone: rank 0 may wait for it in a kernel, for ever.

        A follower that fails gives one alarm and then one answer, so the two counts tell whether rank 0 took it.
        """
        sentinels = [process.sentinel for process in self._processes]
        given, due_s = [0] * len(alarms), [math.inf] * len(alarms)
        while True:
            ready = wait([*sentinels, *alarms], _wait_s(min(due_s)))
            if self._closing:
                return
            if any(sentinel in ready for sentinel in sentinels):
                logger.critical("a rank of the tensor parallel group ended: the host ends too")
                os._exit(70)
            now_s = time.monotonic()
            for index, alarm in enumerate(alarms):
                if alarm in ready:
                    alarm.recv_bytes()
                    given[index] += 1
                if self._failed_answers[index] >= given[index]:
                    due_s[index] = math.inf
                elif due_s[index] == math.inf:
                    due_s[index] = now_s + _ALARM_LIMIT_S
                elif due_s[index] <= now_s:
                    logger.critical("rank %d failed while another waits for it: the host ends", index + 1)
                    os._exit(70)


def _wait_s(due_s: float) -> float | None:
    return None if due_s == math.inf else max(0.0, due_s - time.monotonic())


def _unpacked(answer: bytes) -> Any:
    try:
        return pickle.loads(answer)
    except Exception as error:  # such as an exception whose class takes other arguments; the others' answers count
        return RuntimeError(f"an answer of a rank cannot be read: {type(error).__name__}: {error}")
