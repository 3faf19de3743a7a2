# SPDX-License-Identifier: Apache-2.0
"""The host copy of one content in memory that the node shares, whoever fills it; see `HostCopy`."""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import Future
from enum import Enum, auto

import torch

from tokenpool.memory.copies.host_copy import MakeRoom
from tokenpool.memory.copies.shared_memory import SharedMemory
from tokenpool.node_store.books import CopyState
from tokenpool.node_store.client import NodeStore
from tokenpool.node_store.line import Told
from tokenpool.node_store.messages import MOST_META_BYTES, Allocate, Claim, Drop

logger = logging.getLogger(__name__)

IDLE_LIMIT_S = 15.0
"""A host that fills says about once a second that it gets on: one that is silent for so long is stopped."""
FILL_LIMIT_S = 600.0
_MOMENT_S = 0.01
"""In which a keeper answers."""


class _Is(Enum):
    """What this copy is."""

    UNKNOWN = auto()
    OURS = auto()
    """This host fills it for the node."""
    OWN = auto()
    """This host fills it for itself."""
    HELD = auto()
    """Sealed, and in the books of `NodeStore`."""
    RELEASED = auto()


class SharedCopy:
    """Used by one thread at a time."""

    def __init__(self, store: NodeStore, key: str, nbytes: int = 0) -> None:
        """`nbytes` is the size of it that is known; another one is not taken."""
        self.key = key
        self.meta = b""
        self.is_whole = False
        self._store = store
        self._nbytes = nbytes
        self._expected = (0, 0)  # bytes, and the keeper's generation
        self._memory: SharedMemory | None = None
        self._is = _Is.UNKNOWN
        self._asked: Future[Told | None] | None = None  # whether it is there
        self._asked_in = 0  # the keeper's generation
        self._began_s: float | None = None

    @property
    def tensor(self) -> torch.Tensor:
        """See `HostCopy`."""
        assert self._memory is not None, "the copy has no memory yet"
        return self._memory.tensor

    @property
    def is_asking(self) -> bool:
        """Whether the keeper has not answered yet."""
        return self._asked is not None

    def claim(self) -> bool:
        """See `HostCopy`. Who has waited for long, or for somebody who is silent, fills one of its own."""
        if self._is is not _Is.UNKNOWN:
            return True
        if self._began_s is None:
            self._began_s = time.monotonic()
        if self._asked is None:
            if (held := self._store.hold_again(self.key)) is not None:
                self._memory, self.meta = held
                self._have(self._memory.nbytes)
                return True
            self._expect(self._nbytes)
            self._asked_in = self._store.generation
            self._asked = self._store.ask_later(Claim(self.key), self._asked_in)
        try:
            told = self._asked.result(_MOMENT_S)
        except TimeoutError:
            return False
        self._asked = None
        self._hear(told)
        return self._is is not _Is.UNKNOWN

    def _hear(self, told: Told | None) -> None:
        assert self._began_s is not None
        if told is None:
            is_late = time.monotonic() > self._began_s + FILL_LIMIT_S
            if is_late or not (self._store.is_there or self._store.may_come_back):
                self._keep_own("there is no keeper")
            return  # else the next keeper is asked, which may be there already
        answer, file = told
        if answer.state == CopyState.MINE:
            self._is = _Is.OURS
        elif answer.state == CopyState.SEALED and file is not None:
            self._take(file, answer.nbytes, answer.meta)
        elif answer.state != CopyState.FILLING:
            self._keep_own(answer.problem or "the keeper gives none")
        elif answer.idle_s > IDLE_LIMIT_S or time.monotonic() > self._began_s + FILL_LIMIT_S:
            self._keep_own("another host fills it and does not get on")

    def prepare(self, nbytes: int) -> None:
        """See `HostCopy`."""
        self._nbytes = nbytes
        if self._is in (_Is.UNKNOWN, _Is.OURS):
            self._expect(nbytes)

    def allocate(self, nbytes: int, make_room: MakeRoom) -> None:
        """See `HostCopy`; room is made among copies of this host, too, and the others are asked to make some."""
        assert self._is in (_Is.OURS, _Is.OWN) and self._memory is None, f"a copy that is {self._is} gets no memory"
        self.prepare(nbytes)
        if self._is is _Is.OURS:
            told = self._store.ask(Allocate(self.key, nbytes), self._asked_in)
            if told is not None and not told[0].ok:
                make_room(nbytes)
                told = self._store.ask(Allocate(self.key, nbytes, force=True), self._asked_in)
            if told is None or not told[0].ok:
                self._keep_own("the keeper has no place for it")
        self._memory = SharedMemory.make(nbytes)

    def publish(self, meta: bytes) -> None:
        """See `HostCopy`."""
        if self._is not in (_Is.OURS, _Is.OWN) or self._memory is None:
            return
        if len(meta) > MOST_META_BYTES:
            logger.info("a host copy stays this host's: %d bytes would have to be said of it", len(meta))
            self._give_up_filling()
            return
        try:
            self._memory.seal()
        except OSError as error:
            logger.warning("a host copy cannot be sealed, it stays this host's: %s", error)
            self._give_up_filling()
            return
        if self._store.publish(self.key, self._memory, meta, is_filler=self._is is _Is.OURS):
            self._is, self.meta = _Is.HELD, meta
            self._expect(0)
        else:
            self._give_up_filling()

    def release(self) -> None:
        """See `HostCopy`."""
        self._expect(0)
        if self._asked is not None:
            self._asked.add_done_callback(self._decline)
        if self._is is _Is.HELD:
            self._store.release(self.key)
        elif self._is is _Is.OURS:
            self._drop()
        self._is, self._memory, self._asked = _Is.RELEASED, None, None

    def again(self) -> SharedCopy:
        """See `HostCopy`."""
        return SharedCopy(self._store, self.key, self._nbytes)

    def _decline(self, asked: Future[Told | None]) -> None:
        """Nobody waits for the answer any more."""
        if (told := asked.result()) is None:
            return
        answer, file = told
        if file is not None:
            os.close(file)
        if answer.state in (CopyState.MINE, CopyState.SEALED):
            self._drop()

    def _drop(self) -> None:
        self._store.tell(Drop(self.key), self._asked_in)

    def _have(self, nbytes: int) -> None:
        self._is, self.is_whole, self._nbytes = _Is.HELD, True, nbytes
        self._expect(0)

    def _take(self, file: int, nbytes: int, meta: bytes) -> None:
        if self._nbytes not in (0, nbytes):
            os.close(file)
            self._keep_own(f"the node's copy has {nbytes} bytes, not {self._nbytes}")
        else:
            try:
                self._memory, self.meta = self._store.take_over(self.key, file, nbytes, meta, self._asked_in), meta
                self._have(nbytes)
                return
            except (OSError, ValueError) as error:
                self._keep_own(f"the node's copy cannot be mapped: {error}")
        self._drop()

    def _keep_own(self, why: str) -> None:
        logger.info("this host keeps a copy of its own copy=%s: %s", self.key[:16], why)
        self._expect(0)
        self._is = _Is.OWN

    def _give_up_filling(self) -> None:
        if self._is is _Is.OURS:
            self._drop()
        self._expect(0)
        self._is = _Is.OWN

    def _expect(self, nbytes: int) -> None:
        """Count so many bytes as the node's until the copy is there, or has become this host's own."""
        before, generation = self._expected
        self._store.expect(-before, generation)
        self._expected = nbytes, self._store.generation
        self._store.expect(*self._expected)
