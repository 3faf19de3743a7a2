# SPDX-License-Identifier: Apache-2.0
"""The keeper: one process per node and store that has the descriptors of all sealed copies, and the books.

It never reads or writes a copy, and answers everything at once: what takes long, hosts do, and ask again. A connection
is a client; when the kernel closes it, its leases and fills end. It ends itself when there has been none for a while.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tokenpool.memory.copies.seals import check_sealed
from tokenpool.node_store.books import CopyState, NodeBooks, NoRoomError
from tokenpool.node_store.messages import (
    MESSAGE_BYTES,
    MOST_META_BYTES,
    VERSION,
    Allocate,
    Answer,
    Claim,
    Drop,
    Hello,
    Hold,
    Offer,
    Seal,
    SetBudget,
    Show,
    Tick,
    pack,
    read_message,
)
from tokenpool.node_store.place import peer_of

logger = logging.getLogger(__name__)

STAYS_S = 60.0
"""How long it is there without a client: a host or a server that is started again finds its copies."""
GRACE_S = 3.0
"""How long one that takes the place of another lets nobody fill what hosts from before may have and offer."""


@dataclass(slots=True)
class _Said:
    """One message and what came beside it; a descriptor that nobody takes is closed."""

    message: Any
    file: int | None

    def take_file(self) -> int:
        if self.file is None:
            raise ValueError("the copy is missing")
        file, self.file = self.file, None
        return file


@dataclass(slots=True)
class _Told:
    """An answer and the descriptor to go beside it."""

    answer: Answer = field(default_factory=Answer)
    file: int | None = None


class Keeper:
    """Serves on one listening socket; used by one thread."""

    def __init__(self, listening: socket.socket, stays_s: float = STAYS_S, grace_s: float = 0.0) -> None:
        self.books = NodeBooks()
        self._listening = listening
        self._stays_s = stays_s
        self._files: dict[str, int] = {}  # of sealed copies
        self._progress_s: dict[str, float] = {}  # of copies that are filled, when they last got on
        self._joined: set[int] = set()
        self._alone_since_s = time.monotonic()
        self._fills_from_s = self._alone_since_s + grace_s
        self._closer = ThreadPoolExecutor(1)  # the last one to close a large memory frees it, which takes seconds
        self._selector = selectors.DefaultSelector()
        self._selector.register(listening, selectors.EVENT_READ)
        self._deeds: dict[type, Callable[[int, _Said], _Told]] = {
            Hello: self._hello, Offer: self._offer, Claim: self._claim, Allocate: self._allocate,
            Seal: self._seal, Drop: self._drop, Hold: self._hold,
            SetBudget: self._set_budget, Tick: self._tick, Show: self._show,
        }  # fmt: skip

    @property
    def num_clients(self) -> int:
        """Connections."""
        return len(self._selector.get_map()) - 1

    def run(self) -> None:
        """Serve until nobody has been there for a while."""
        while self.num_clients or time.monotonic() < self._alone_since_s + self._stays_s:
            for ready, _ in self._selector.select(1.0):
                if ready.fileobj is self._listening:
                    self._accept()
                else:
                    assert isinstance(ready.fileobj, socket.socket)
                    self._serve(ready.fileobj)
        logger.info("nobody is there any more: ending with %d copies", len(self._files))

    def _accept(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except OSError as error:
            logger.debug("a host is not let in: %s", error)
            time.sleep(0.01)  # with too many files open it would be there again at once
            return
        with contextlib.suppress(OSError):
            if peer_of(connection)[1] != os.getuid():
                connection.close()
                return
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ)

    def _serve(self, connection: socket.socket) -> None:
        try:
            content, files, flags, _ = socket.recv_fds(connection, MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            if not content or flags & socket.MSG_TRUNC:
                raise ConnectionError("it is gone")
            said = _Said(None, files[0] if files else None)
            try:
                told = self._answer(connection.fileno(), said, content)
            finally:
                if said.file is not None:
                    os.close(said.file)
            beside = [told.file] if told.file is not None else []
            socket.send_fds(connection, [pack(told.answer)], beside)
        except BlockingIOError:  # on reading: it was a false alarm; nobody has so many answers to read
            pass
        except (OSError, msgspec.MsgspecError) as error:
            logger.debug("client %d: %s", connection.fileno(), error)
            self._part(connection)
        except Exception:  # the others are served on
            logger.exception("client %d is shown out", connection.fileno())
            self._part(connection)

    def _part(self, connection: socket.socket) -> None:
        client = connection.fileno()
        self._selector.unregister(connection)
        connection.close()
        if client in self._joined:
            self._joined.discard(client)
            self._forget(self.books.leave(client))
        self._alone_since_s = time.monotonic()

    def _answer(self, client: int, said: _Said, content: bytes) -> _Told:
        said.message = read_message(content)
        if client not in self._joined and not isinstance(said.message, Hello | Show):
            return _Told(Answer(ok=False, problem="say hello first"))
        try:
            told = self._deeds[type(said.message)](client, said)
        except NoRoomError:
            told = _Told(Answer(ok=False))
        except ValueError as error:
            told = _Told(Answer(ok=False, problem=str(error)))
        if client in self._joined:
            books = self.books
            told.answer = msgspec.structs.replace(
                told.answer,
                free_bytes=max(0, books.budget_bytes - books.used_bytes + books.evictable_bytes),
                wanted_bytes=books.wanted_of(client),
            )
        return told

    def _forget(self, keys: list[str]) -> None:
        for key in keys:
            self._progress_s.pop(key, None)
            if (file := self._files.pop(key, None)) is not None:
                self._closer.submit(os.close, file)  # its memory goes when no host has it mapped

    # -- one for each message ------------------------------------------------------------------------

    def _hello(self, client: int, said: _Said) -> _Told:
        message: Hello = said.message
        if message.version != VERSION:
            return _Told(Answer(ok=False, problem=f"the keeper speaks version {VERSION}, the host {message.version}"))
        self._forget(self.books.join(client, message.budget_bytes))
        self._joined.add(client)
        return _Told()

    def _offer(self, client: int, said: _Said) -> _Told:
        message: Offer = said.message
        file = said.take_file()
        try:
            _check(file, message.nbytes, message.meta)
            mine = self._files.get(message.key)
            if mine is not None and os.path.sameopenfile(mine, file):  # it has only lost the connection
                self.books.claim(client, message.key)
                return _Told()
            if not self.books.offer(client, message.key, message.nbytes, message.meta):
                return _Told(Answer(ok=False))
            self._files[message.key], file = file, -1
        finally:
            if file >= 0:
                os.close(file)
        self._forget(self.books.evict(0))
        return _Told()

    def _claim(self, client: int, said: _Said) -> _Told:
        message: Claim = said.message
        if message.key not in self.books.copies and time.monotonic() < self._fills_from_s:
            return _Told(Answer(state=CopyState.FILLING))
        state = self.books.claim(client, message.key)
        now_s = time.monotonic()
        if state is CopyState.MINE:
            self._progress_s[message.key] = now_s
            return _Told(Answer(state=state))
        if state is CopyState.FILLING:
            return _Told(Answer(state=state, idle_s=now_s - self._progress_s[message.key]))
        copy = self.books.copies[message.key]
        return _Told(Answer(state=state, nbytes=copy.nbytes, meta=copy.meta), self._files[message.key])

    def _allocate(self, client: int, said: _Said) -> _Told:
        message: Allocate = said.message
        self._forget(self.books.allocate(client, message.key, message.nbytes, force=message.force))
        return _Told()

    def _seal(self, client: int, said: _Said) -> _Told:
        message: Seal = said.message
        file = said.take_file()
        try:
            copy = self.books.copies.get(message.key)
            _check(file, copy.nbytes if copy else 0, message.meta)
            self.books.seal(client, message.key, message.meta)
        except BaseException:
            os.close(file)
            raise
        self._files[message.key] = file
        self._progress_s.pop(message.key, None)
        return _Told()

    def _drop(self, client: int, said: _Said) -> _Told:
        message: Drop = said.message
        self._forget(self.books.drop(client, message.key))
        return _Told()

    def _hold(self, client: int, said: _Said) -> _Told:
        message: Hold = said.message
        self._forget(self.books.hold(client, message.own_bytes, force=message.force))
        return _Told()

    def _set_budget(self, client: int, said: _Said) -> _Told:
        message: SetBudget = said.message
        self._forget(self.books.set_budget(client, message.budget_bytes))
        return _Told()

    def _tick(self, client: int, said: _Said) -> _Told:
        now_s = time.monotonic()
        for key in self._progress_s:
            if self.books.copies[key].filler == client:
                self._progress_s[key] = now_s
        return _Told()

    def _show(self, client: int, said: _Said) -> _Told:
        self.check()
        return _Told(Answer(book={"pid": os.getpid(), **self.books.snapshot()}))

    def check(self) -> None:
        """Raise AssertionError unless the books are in order and there is a descriptor for each sealed copy."""
        self.books.check()
        sealed = {key for key, copy in self.books.copies.items() if copy.is_sealed}
        assert sealed == self._files.keys(), "books and descriptors differ"
        assert self._progress_s.keys() == self.books.copies.keys() - sealed, "books and fillings differ"


def _check(file: int, nbytes: int, meta: bytes) -> None:
    check_sealed(file, nbytes)
    if len(meta) > MOST_META_BYTES:
        raise ValueError(f"{len(meta)} bytes are said of the copy, {MOST_META_BYTES} at most")
