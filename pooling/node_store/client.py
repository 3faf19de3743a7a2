# SPDX-License-Identifier: Apache-2.0
"""A host's side of the node's store: asks the keeper, and does without it when there is none, or it does not answer.

Every call has a limit. A keeper that is late once counts as gone: the connection is closed, which ends the leases
there, and a thread looks for it, or starts another one, and offers what this host holds. Copies stay valid all the
while: it is the kernel that keeps them, for whoever has them mapped.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from tokenpool.errors import HostError
from tokenpool.memory.copies.shared_memory import SharedMemory
from tokenpool.node_store.messages import (
    MESSAGE_BYTES,
    VERSION,
    Answer,
    Drop,
    Hello,
    Hold,
    Message,
    Offer,
    Seal,
    SetBudget,
    Show,
    Tick,
    pack,
    read_answer,
)
from tokenpool.node_store.place import connect, peer_of, start_keeper

logger = logging.getLogger(__name__)

CALL_LIMIT_S = 0.5
"""A keeper answers in well under a millisecond."""
_BEGIN_LIMIT_S = 5.0
"""How long a host that starts waits for a keeper to be there."""
_TICK_S = 1.0
_WAITS_S = (0.0, 0.2, 1.0, 5.0, 30.0)
"""Between two attempts in a row to reach a keeper."""
_HUNG_S = 30.0
"""A keeper that answers nobody for so long is killed, so that another one can be there."""


@dataclass(slots=True)
class _Held:
    """A sealed copy that this host has mapped."""

    memory: SharedMemory
    meta: bytes
    count: int = 1
    is_nodes: bool = True
    """Whether the keeper counts it; else it is this host's own."""


class NodeStore:
    """One per host; its methods may be called from any thread."""

    def __init__(
        self,
        folder: Path,
        budget_bytes: int,
        on_wanted: Callable[[int], object] = lambda nbytes: None,
        register: Callable[[int, int], Callable[[], None]] = lambda address, nbytes: lambda: None,
    ) -> None:
        """`on_wanted` is called on a side thread with bytes that this host is asked to give up if it can.

        `register` is `register_host` of the device that copies are made to.
        """
        self.folder = folder
        self.free_bytes = budget_bytes
        """What nobody needs of the node's budget, as it was at the last answer."""
        self.book: dict[str, Any] = {}
        """The whole book as it was at the last tick; empty without a keeper."""
        self.budget_bytes = budget_bytes
        self._on_wanted = on_wanted
        self._register = register
        self._lock = threading.RLock()  # guards what is below
        self._line: socket.socket | None = None
        self._held: dict[str, _Held] = {}
        self.generation = 0
        """Changes with each keeper that is lost: what this host filled for it is its own then."""
        self._held_bytes = 0  # of those that the keeper counts, once for each model
        self._expected_bytes = 0  # of copies that this host fills, or waits for
        self._used_bytes = 0  # by the host's own book
        self._told_bytes = 0  # of its own, as the keeper knows it
        self._chunk_bytes = max(1 << 20, budget_bytes // 64)
        self._silent_since_s: float | None = None
        self._wake, self._closed = threading.Event(), False
        self._thread: threading.Thread | None = None

    # -- life ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Look for the keeper, at most for a few seconds, and go on to see to it on a side thread."""
        deadline = time.monotonic() + _BEGIN_LIMIT_S
        while not self._reach() and time.monotonic() < deadline:
            time.sleep(0.02)
        if not self.is_there:
            logger.warning("there is no keeper of host copies: this host keeps its own folder=%s", self.folder)
        self._thread = threading.Thread(target=self._see_to_it, name="node-store", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Leave; what this host held stays for others."""
        self._closed = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            self._lose("this host leaves")

    @property
    def is_there(self) -> bool:
        """Whether a keeper answers, as far as is known."""
        return self._line is not None

    # -- what a host needs ---------------------------------------------------------------------------

    @property
    def shared_bytes(self) -> int:
        """What the node counts of this host's copies, and not this host: once for each of its models."""
        return self._held_bytes + self._expected_bytes

    def _recount(self) -> None:
        self._held_bytes = sum(held.memory.nbytes * held.count for held in self._held.values() if held.is_nodes)

    def expect(self, nbytes: int, generation: int) -> None:
        """A copy of so many bytes is on its way into the keeper's book, or, if less than 0, no more."""
        with self._lock:
            if generation == self.generation:
                self._expected_bytes += nbytes

    def cover(self, used_bytes: int) -> None:
        """Have the node count what this host uses beside copies that are the node's; never refused.

        Where there is no room the budget is exceeded for now, and all hosts are asked to give up what is idle.
        """
        with self._lock:
            self._used_bytes = used_bytes
            if self._own_bytes > self._told_bytes and self._line is not None:
                rounded = -(-self._own_bytes // self._chunk_bytes) * self._chunk_bytes
                if self._hold(rounded) or self._hold(self._own_bytes):
                    return
            self._settle()

    def set_budget(self, budget_bytes: int) -> None:
        """What the pool says now that the node may use."""
        self.budget_bytes = budget_bytes
        self.ask(SetBudget(budget_bytes))

    def hold_again(self, key: str) -> tuple[SharedMemory, bytes] | None:
        """A copy that this host has already, and what was said of it; `release` it once more, too."""
        with self._lock:
            if (held := self._held.get(key)) is None:
                return None
            held.count += 1
            self._recount()
            return held.memory, held.meta

    def take_over(self, key: str, file: int, nbytes: int, meta: bytes) -> SharedMemory:
        """Map a sealed copy that was claimed; raises OSError, ValueError."""
        with self._lock:
            if (held := self._held.get(key)) is not None:  # another thread was faster
                os.close(file)
                self.ask(Drop(key))
                held.count += 1
                self._recount()
                return held.memory
            memory = SharedMemory.open(file, nbytes)
            self._tell_device(memory)
            self._held[key] = _Held(memory, meta)
            self._recount()
            return memory

    def publish(self, key: str, memory: SharedMemory, meta: bytes, *, is_filler: bool) -> bool:
        """Take a sealed copy in; the keeper hears of it now, or when there is one. False if this host has another."""
        with self._lock:
            if key in self._held:
                return False
            self._tell_device(memory)
            told = self.ask(Seal(key, meta), memory.file) if is_filler else None
            if told is None or not told[0].ok:
                told = self.ask(Offer(key, memory.nbytes, meta), memory.file)
            self._held[key] = _Held(memory, meta, is_nodes=told is not None and told[0].ok)
            self._recount()
            return True

    def _tell_device(self, memory: SharedMemory) -> None:
        try:
            memory.register(self._register)
        except OSError as error:  # copies are slower
            logger.warning("a shared host copy cannot be page-locked: %s", error)

    def release(self, key: str) -> None:
        """Need a copy no more that was taken over, held again or published."""
        with self._lock:
            held = self._held[key]
            held.count -= 1
            if not held.count:
                del self._held[key]
                held.memory.close()
                if held.is_nodes:
                    self.ask(Drop(key))
            self._recount()

    def ask(self, message: Message, file: int | None = None) -> tuple[Answer, int | None] | None:
        """What the keeper answers, and the descriptor beside it; None = there is none, or it was late."""
        with self._lock:
            line = self._line
            if line is None:
                return None
            try:
                return self._exchange(line, message, file)
            except (OSError, msgspec.MsgspecError) as error:
                self._lose(f"{error or type(error).__name__}")
                return None

    def show(self) -> dict[str, Any]:
        """The node's book now; empty without a keeper."""
        told = self.ask(Show())
        return told[0].book if told is not None else {}

    # -- the keeper ----------------------------------------------------------------------------------

    def _exchange(self, line: socket.socket, message: Message, file: int | None) -> tuple[Answer, int | None]:
        socket.send_fds(line, [pack(message)], [file] if file is not None else [])
        content, files, _, _ = socket.recv_fds(line, MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
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
        if not isinstance(message, Show):
            self.free_bytes = answer.free_bytes
        return answer, files[0] if files else None

    @property
    def _own_bytes(self) -> int:
        return max(0, self._used_bytes - self.shared_bytes)

    def _settle(self) -> None:
        """Tell the keeper what this host has of its own, unless it knows about as much."""
        with self._lock:
            own = self._own_bytes
            if not 0 <= self._told_bytes - own <= 2 * self._chunk_bytes:
                self._hold(own, force=True)

    def _hold(self, own_bytes: int, *, force: bool = False) -> bool:
        told = self.ask(Hold(own_bytes, force))
        if told is not None and told[0].ok:
            self._told_bytes = own_bytes
        return told is None or told[0].ok

    def _lose(self, why: str) -> None:
        line, self._line = self._line, None
        if line is not None:
            line.close()
            self.generation += 1
            self._expected_bytes = 0
            self.book, self.free_bytes = {}, self.budget_bytes
            logger.info("the keeper of host copies is gone: %s", why)
            self._wake.set()

    def _reach(self) -> bool:
        """Find a keeper, start one if there is none, and tell it what this host has; returns whether that is done."""
        line = None
        try:
            line = self._connect()
            answer, _ = self._exchange(line, Hello(VERSION, self.budget_bytes), None)
            if not answer.ok:
                raise HostError(answer.problem)
            with self._lock:
                self._join(line)
                self._line, self._silent_since_s = line, None
                self._settle()
            return True
        except (OSError, HostError, msgspec.MsgspecError) as error:
            logger.info("no keeper of host copies: %s", error or type(error).__name__)
            if line is not None:
                if isinstance(error, TimeoutError):
                    self._end_if_hung(line)
                line.close()
            return False

    def _connect(self) -> socket.socket:
        with suppress(FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            return connect(self.folder, CALL_LIMIT_S)
        start_keeper(self.folder)
        return connect(self.folder, CALL_LIMIT_S)

    def _join(self, line: socket.socket) -> None:
        self._told_bytes = 0
        for key, held in self._held.items():
            answer, _ = self._exchange(line, Offer(key, held.memory.nbytes, held.meta), held.memory.file)
            held.is_nodes = answer.ok
        self._recount()

    def _end_if_hung(self, line: socket.socket) -> None:
        """Kill a keeper that has not answered for long; it is there, or the line would have ended."""
        now_s = time.monotonic()
        if self._silent_since_s is None:
            self._silent_since_s = now_s
        if now_s < self._silent_since_s + _HUNG_S:
            return
        self._silent_since_s = None
        with suppress(OSError):
            process = os.pidfd_open(peer_of(line)[0])
            try:
                poller = select.poll()
                poller.register(line, 0)
                if not poller.poll(0):  # it still has the other end: the number is its
                    logger.error("the keeper of host copies hangs and is killed")
                    signal.pidfd_send_signal(process, signal.SIGKILL)
            finally:
                os.close(process)

    def _see_to_it(self) -> None:
        failures = 0
        while not self._closed:
            self._wake.wait(_TICK_S if self.is_there else _WAITS_S[min(failures, len(_WAITS_S) - 1)])
            self._wake.clear()
            if self._closed:
                return
            try:
                if self.is_there:
                    failures = 0
                    self._tick()
                else:
                    failures = 0 if self._reach() else failures + 1
            except Exception:  # whatever it is, the host does without
                logger.exception("the keeper of host copies cannot be seen to")
                failures += 1

    def _tick(self) -> None:
        told = self.ask(Tick())
        if told is None:
            return
        self.book = self.show()
        if told[0].wanted_bytes:
            self._on_wanted(told[0].wanted_bytes)
