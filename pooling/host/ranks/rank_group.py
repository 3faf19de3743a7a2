# SPDX-License-Identifier: Apache-2.0
"""The processes of a tensor parallel group: this one is rank 0, each other rank follows it in a process of its own.

Models of a group run on all its ranks. The host decides, schedules and keeps all books in rank 0; a follower has the
workers of all models and repeats, in order, what is done to the memory and what the engines ask of their workers.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import multiprocessing
import os
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from tokenpool.errors import EngineLostError
from tokenpool.host.ranks.rank_follower import Seat, follow
from tokenpool.host.ranks.rank_questions import RankQuestions
from tokenpool.host.ranks.rank_watch import RankLimits, RankWatch
from tokenpool.process.ending import STATUS_OF_A_HANG
from tokenpool.wire.pulse import STACKS_SIGNAL

logger = logging.getLogger(__name__)

_STOP_LIMIT_S = 5.0
_STACKS_S = 1.0
_ENDING_S = 1.0
_LOST_S = 10.0
_PERIOD_S = 1.0


class RankGroup(RankQuestions):
    """Rank 0's side. `send` may be called from any thread, all else from the host loop's or, in turns, a build's."""

    def __init__(
        self, size: int, page_size: int, cpu_link: int | None = None, limits: RankLimits | None = None
    ) -> None:
        """Start the followers; they import vLLM while this process goes on. Sizes and link are those of HostConfig."""
        self.size = size
        self._folder = tempfile.TemporaryDirectory(prefix="tokenpool-ranks-")
        # vLLM names the ranks' shared memory after this file, which must therefore be like no other on the machine.
        self.init_method = f"file://{self._folder.name}/tokenpool-{secrets.token_hex(8)}"
        """Where the ranks meet, for torch.distributed."""
        self._closing = False
        self._processes: list[Any] = []
        context = multiprocessing.get_context("spawn")
        self._begun = context.RawArray(ctypes.c_longlong, size - 1)
        connections, alarms = [], []
        for rank in range(1, size):
            ours, theirs = context.Pipe()
            alarm, alarm_end = context.Pipe(duplex=False)
            seat = Seat(rank, self.init_method, page_size, cpu_link, theirs, alarm_end, self._begun)
            process = context.Process(target=follow, args=(seat,), name=f"rank {rank}", daemon=True)
            process.start()
            theirs.close()
            alarm_end.close()
            connections.append(ours)
            self._processes.append(process)
            alarms.append(alarm)
        super().__init__(connections, RankWatch(size, limits or RankLimits()), self.end)
        threading.Thread(target=self._watch, args=(alarms,), name="ranks", daemon=True).start()

    @property
    def pids(self) -> list[int]:
        """Process ids of the followers, by rank."""
        return [process.pid for process in self._processes]

    def close(self) -> None:
        """End the followers."""
        self._closing = True
        with suppress(Exception):  # one may be gone already
            self.send("stop")
        for process in self._processes:
            process.join(_STOP_LIMIT_S)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()

    def end(self, reason: str) -> None:
        """End this process and, with it, all ranks: one of them may be in a kernel that waits for ever."""
        logger.critical("the tensor parallel group cannot go on, the host ends: %s", reason)
        for process in self._processes:
            with suppress(ProcessLookupError, TypeError):
                os.kill(process.pid, STACKS_SIGNAL)  # into the log; one that is stopped writes none
        time.sleep(_STACKS_S)  # one after the other, so that they can be read
        faulthandler.dump_traceback()
        os._exit(STATUS_OF_A_HANG)

    def _lost(self, reason: str) -> EngineLostError:
        if not self._closing:  # who watches knows more, and ends this process
            time.sleep(_LOST_S)
        return super()._lost(reason)

    def _watch(self, alarms: Sequence[Connection]) -> None:
        """End this process when a follower is gone, or the ranks have come to a stand; see rank_watch.py."""
        watch = self.watch
        sentinels = [process.sentinel for process in self._processes]
        limits = watch.limits
        period_s = min(_PERIOD_S, limits.call_s / 5, limits.build_s / 5, limits.alarm_s / 5)
        looked_s = time.monotonic()
        while True:
            ready = wait([*sentinels, *alarms], period_s)
            if self._closing:
                return
            gone = [rank for rank, sentinel in enumerate(sentinels, 1) if sentinel in ready]
            if gone:
                self._end_without(gone[0])
            for index, alarm in enumerate(alarms):
                if alarm in ready:
                    with suppress(EOFError):  # it is about to be gone
                        alarm.recv_bytes()
                        watch.alarmed(index)
            now_s = time.monotonic()
            passed_s, looked_s = min(now_s - looked_s, 2 * period_s), now_s
            watch.begun = list(self._begun)
            if reason := watch.pass_time(passed_s):
                self.end(reason)

    def _end_without(self, rank: int) -> None:
        process = self._processes[rank - 1]
        process.join(_ENDING_S)  # its pipe is closed a moment before it is gone
        code = process.exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"status {code}"
        doing = self.watch.doing()
        logger.critical("rank %d ended by %s, the host ends too%s", rank, how, f": it was in {doing}" if doing else "")
        os._exit(STATUS_OF_A_HANG)
