# SPDX-License-Identifier: Apache-2.0
"""A host's side of the node's store: asks the keeper, and does without it when there is none, or it does not answer.

One side thread speaks to the keeper. What only has to be told (leases that end, bytes of this host's own, its budget)
nobody waits for, so a switch never waits for the keeper. One that is late for `ANSWER_LIMIT_S` counts as gone: the
connection is closed, which ends the leases there, and the thread looks for it, or starts another one, and offers what
this host holds. Copies stay valid all the while: it is the kernel that keeps them, for whoever has them mapped.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from tokenpool.errors import HostError, text_of
from tokenpool.memory.copies.shared_memory import SharedMemory
from tokenpool.node_store.line import Line, Told
from tokenpool.node_store.messages import Drop, Hold, Message, Offer, Seal, SetBudget, Show, Tick

logger = logging.getLogger(__name__)

BEGIN_LIMIT_S = 5.0
"""How long a host that starts, or has just lost the keeper, waits for one to be there."""
_LOOK_S = 0.05
_TICK_S = 1.0
_WAITS_S = (0.2, 1.0, 5.0, 30.0)
"""After each attempt in a row that has found no keeper."""


@dataclass(slots=True)
class _Held:
    """A sealed copy that this host has mapped."""

    memory: SharedMemory
    meta: bytes
    count: int = 1
    is_nodes: bool = False
    """Whether the keeper counts it; else it is this host's own."""
    asked_in: int = -1
    """The generation whose keeper was asked to count it."""


@dataclass(slots=True)
class _Asked:
    """What the side thread is to say, to the keeper of one generation, and who waits for the answer."""

    message: Message
    generation: int
    file: int | None = None
    answer: Future[Told | None] = field(default_factory=Future)


class NodeStore:
    """One per host; its methods may be called from any thread."""

    def __init__(
        self,
        folder: Path,
        budget_bytes: int,
        on_wanted: Callable[[int], object] = lambda nbytes: None,
        register: Callable[[int, int], Callable[[], None]] = lambda address, nbytes: lambda: None,
    ) -> None:
        """`on_wanted` is called on the side thread with bytes that this host is asked to give up if it can.

        `register` is `register_host` of the device that copies are made to.
        """
        self.folder = folder
        self.free_bytes = budget_bytes
        """What nobody needs of the node's budget, as it was at the last answer."""
        self.book: dict[str, Any] = {}
        """The whole book as it was at the last tick; empty without a keeper."""
        self.budget_bytes = budget_bytes
        self.generation = 0
        """Changes with each keeper that is lost: what this host filled for it is its own then."""
        self._on_wanted = on_wanted
        self._register = register
        self._lock = threading.RLock()  # guards the copies, and whether there is a keeper
        self._held: dict[str, _Held] = {}
        self._held_bytes = 0  # of those that the keeper counts, once for each model
        self._expected_bytes = 0  # of copies that this host fills, or waits for
        self._used_bytes = 0  # by the host's own book
        self._own_bytes = 0  # of that, what the node does not count as copies
        self._chunk_bytes = max(1 << 20, budget_bytes // 64)
        self._todo: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()  # None: look what is to be told
        self._is_woken = self._closed = False
        self._there = threading.Event()
        self._lost_s = float("-inf")
        self._thread: threading.Thread | None = None
        # The side thread's:
        self._line = Line(folder)
        self._told_bytes, self._told_budget = 0, budget_bytes  # as the keeper knows them
        self._due_s, self._failures = float("-inf"), 0

    # -- life ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Look for the keeper, once or for a few seconds, and go on to see to it on a side thread."""
        self._lost_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="node-store", daemon=True)
        self._thread.start()
        while not self._there.wait(_LOOK_S) and (self.may_come_back or not self._failures):
            pass  # where all hosts of a machine start at once, the first attempt may take longer
        if not self.is_there:
            logger.warning("there is no keeper of host copies: this host keeps its own folder=%s", self.folder)

    def close(self) -> None:
        """Leave; what this host held stays for others."""
        self._closed = True
        self._todo.put(None)
        if self._thread is not None:
            self._thread.join()

    @property
    def is_there(self) -> bool:
        """Whether a keeper answers, as far as is known."""
        return self._there.is_set()

    @property
    def may_come_back(self) -> bool:
        """Whether the keeper was lost a moment ago: the next one takes about a second."""
        return not self.is_there and not self._closed and time.monotonic() < self._lost_s + BEGIN_LIMIT_S

    # -- what a host needs ---------------------------------------------------------------------------

    @property
    def shared_bytes(self) -> int:
        """What the node counts of this host's copies, and not this host: once for each of its models."""
        return self._held_bytes + self._expected_bytes

    def expect(self, nbytes: int, generation: int) -> None:
        """A copy of so many bytes is on its way into the keeper's book, or, if less than 0, no more."""
        with self._lock:
            if generation == self.generation:
                self._expected_bytes += nbytes

    def cover(self, used_bytes: int) -> None:
        """Have the node count what this host uses beside copies that are the node's; never refused, nor waited for.

        Where there is no room the budget is exceeded for now, and all hosts are asked to give up what is idle.
        """
        self._used_bytes = used_bytes
        self._own_bytes = max(0, used_bytes - self.shared_bytes)
        if self.is_there and not self._knows_enough():
            self._wake()

    def set_budget(self, budget_bytes: int) -> None:
        """What the pool says now that the node may use; not waited for."""
        self.budget_bytes = budget_bytes
        self._wake()

    def hold_again(self, key: str) -> tuple[SharedMemory, bytes] | None:
        """A copy that this host has already, and what was said of it; `release` it once more, too."""
        with self._lock:
            if (held := self._held.get(key)) is None:
                return None
            held.count += 1
            self._recount()
            return held.memory, held.meta

    def take_over(self, key: str, file: int, nbytes: int, meta: bytes, generation: int) -> SharedMemory:
        """Map a sealed copy that was claimed in this generation; raises OSError, ValueError."""
        with self._lock:
            if (held := self._held.get(key)) is not None:  # another thread was faster
                os.close(file)
                self.tell(Drop(key), generation)
                held.count += 1
                self._recount()
                return held.memory
            memory = SharedMemory.open(file, nbytes)
            self._tell_device(memory)
            is_nodes = generation == self.generation
            self._held[key] = _Held(memory, meta, is_nodes=is_nodes, asked_in=generation)
            self._recount()
            return memory

    def publish(self, key: str, memory: SharedMemory, meta: bytes, *, is_filler: bool) -> bool:
        """Take a sealed copy in; the keeper hears of it now, or when there is one. False if this host has another."""
        if key in self._held:
            return False
        self._tell_device(memory)
        generation = self.generation
        told = self.ask(Seal(key, meta), generation, memory.file) if is_filler else None
        if told is None or not told[0].ok:
            generation = self.generation
            told = self.ask(Offer(key, memory.nbytes, meta), generation, memory.file)
        is_taken = told is not None and told[0].ok
        with self._lock:
            if key in self._held:  # another thread was faster
                if is_taken:
                    self.tell(Drop(key), generation)
                return False
            asked_in = generation if told is not None else -1
            is_nodes = is_taken and generation == self.generation
            self._held[key] = _Held(memory, meta, is_nodes=is_nodes, asked_in=asked_in)
            self._recount()
            return True

    def _tell_device(self, memory: SharedMemory) -> None:
        try:
            memory.register(self._register)
        except OSError as error:  # copies are slower
            logger.warning("a shared host copy cannot be page-locked: %s", error)

    def release(self, key: str) -> None:
        """Need a copy no more that was taken over, held again or published; the keeper is told soon."""
        with self._lock:
            held = self._held[key]
            held.count -= 1
            if not held.count:
                del self._held[key]
                held.memory.close()
                if held.is_nodes:
                    self.tell(Drop(key), self.generation)
            self._recount()

    def _recount(self) -> None:
        self._held_bytes = sum(held.memory.nbytes * held.count for held in self._held.values() if held.is_nodes)

    # -- asking the keeper ---------------------------------------------------------------------------

    def ask(self, message: Message, generation: int, file: int | None = None) -> Told | None:
        """What the keeper of this generation answers, after all that it was told before; None = it is gone, or late."""
        return self.ask_later(message, generation, file).result()

    def ask_later(self, message: Message, generation: int, file: int | None = None) -> Future[Told | None]:
        """The same, which is there soon; `file` must stay open until then."""
        asked = _Asked(message, generation, file)
        with self._lock:
            if self.is_there:
                self._todo.put(asked)
            else:
                asked.answer.set_result(None)
        return asked.answer

    def tell(self, message: Message, generation: int) -> None:
        """Say it to the keeper of this generation, if that is still there."""
        self._todo.put(_Asked(message, generation))

    def show(self) -> dict[str, Any]:
        """The node's book now, with all that was told before; empty without a keeper."""
        self._wake()
        told = self.ask(Show(), self.generation)
        return told[0].book if told is not None else {}

    def _wake(self) -> None:
        if not self._is_woken:
            self._is_woken = True
            self._todo.put(None)

    # -- the side thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed:
            try:
                self._run_once()
            except (OSError, HostError, msgspec.MsgspecError) as error:
                self._lose(text_of(error))
            except Exception as error:  # whatever it is, the host does without
                logger.exception("the keeper of host copies cannot be seen to")
                self._lose(type(error).__name__)
        self._lose("this host leaves")

    def _run_once(self) -> None:
        try:
            asked = self._todo.get(timeout=max(0.0, self._due_s - time.monotonic()))
        except queue.Empty:
            asked = None
        if asked is not None:
            self._say(asked)
        elif self.is_there:
            self._settle()
        if time.monotonic() >= self._due_s:
            self._due_s = time.monotonic() + (self._tick() if self.is_there else self._look())

    def _say(self, asked: _Asked) -> None:
        told = None
        try:
            if asked.generation == self.generation:
                told = self._exchange(asked.message, asked.file)
        except BaseException:
            self._todo.put(asked)  # answered once it is known that the keeper is lost
            raise
        asked.answer.set_result(told)

    def _exchange(self, message: Message, file: int | None = None) -> Told:
        answer, beside = self._line.exchange(message, file)
        if not isinstance(message, Show):
            self.free_bytes = answer.free_bytes
        return answer, beside

    def _knows_enough(self) -> bool:
        return 0 <= self._told_bytes - self._own_bytes <= 2 * self._chunk_bytes

    def _settle(self) -> None:
        """Tell the keeper what this host may use, and has of its own unless it knows about as much."""
        self._is_woken = False
        if self._told_budget != (budget := self.budget_bytes):
            self._exchange(SetBudget(budget))
            self._told_budget = budget
        if self._knows_enough():
            return
        own = self._own_bytes
        rounded = -(-own // self._chunk_bytes) * self._chunk_bytes
        if own < self._told_bytes or not (self._hold(rounded) or self._hold(own)):
            self._hold(own, force=True)

    def _hold(self, own_bytes: int, *, force: bool = False) -> bool:
        answer, _ = self._exchange(Hold(own_bytes, force))
        if answer.ok:
            self._told_bytes = own_bytes
        return answer.ok

    def _tick(self) -> float:
        self._offer()
        wanted = self._exchange(Tick())[0].wanted_bytes
        self.book = self._exchange(Show())[0].book
        if wanted:
            self._on_wanted(wanted)
        self._own_bytes = max(0, self._used_bytes - self.shared_bytes)
        self._settle()
        return _TICK_S

    def _look(self) -> float:
        """Find a keeper and tell it what this host has; returns after how long to do what is next."""
        budget = self.budget_bytes
        self._line.open(budget)
        self._told_bytes, self._told_budget = 0, budget
        self._offer()
        self._own_bytes = max(0, self._used_bytes - self.shared_bytes)
        self._settle()
        self._failures = 0
        self._there.set()
        return _TICK_S

    def _offer(self) -> None:
        """Let the keeper count copies that it was not asked about yet."""
        with self._lock:
            rest = [(key, held, os.dup(held.memory.file)) for key, held in self._held.items()
                    if held.asked_in != self.generation]  # fmt: skip
        try:
            for key, held, file in rest:
                answer, _ = self._exchange(Offer(key, held.memory.nbytes, held.meta), file)
                with self._lock:
                    held.asked_in, held.is_nodes = self.generation, answer.ok
                    if answer.ok and self._held.get(key) is not held:  # it was released meanwhile
                        self.tell(Drop(key), self.generation)
                    self._recount()
        finally:
            for _, _, file in rest:
                os.close(file)

    def _lose(self, why: str) -> None:
        now_s = time.monotonic()
        with self._lock:
            if not self._closed:
                logger.info("%s keeper of host copies: %s", "lost the" if self.is_there else "no", why)
            if self.is_there:
                self._lost_s = self._due_s = now_s
            else:
                self._due_s = now_s + _WAITS_S[min(self._failures, len(_WAITS_S) - 1)]
                self._failures += 1
            self._there.clear()
            self.generation += 1
            self._expected_bytes = 0
            for held in self._held.values():
                held.is_nodes = False
            self._recount()
        self._line.close()
        self.book, self.free_bytes = {}, self.budget_bytes
        self._is_woken = False
        while not self._todo.empty():
            if (asked := self._todo.get()) is not None:
                asked.answer.set_result(None)
