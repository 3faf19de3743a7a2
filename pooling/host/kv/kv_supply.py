# SPDX-License-Identifier: Apache-2.0
"""The source's end of a move: sends cached blocks out of the slots that they lie in, and holds none of them for it.

A block stays what it is as long as its entry is in the tier. So the side thread reads bytes beside the host's loop, and
looks afterwards whether the entry is still there: if not, the loop may have given the slot to another block in the
middle, and the block is void. Nothing is pinned, so neither a slow nor a dead receiver keeps memory of this host.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from tokenpool.host.kv.kv_window import Window
from tokenpool.host.kv.request_image import MARK
from tokenpool.memory.host_slots import SlotBuffer, in_order
from tokenpool.memory.kv_blocks import CachedBlock
from tokenpool.wire.kv_frames import IDLE_LIMIT_S, MESSAGE_BYTES, Chunk, Open, Opened, Void, Want, window_of
from tokenpool.wire.messages import Wire

OnLoop = Callable[[Callable[[], Any]], Future[Any]]
"""Runs a function on the host loop's thread, between two steps."""
_ZEROS = memoryview(bytes(1 << 16))
_MOST_VIEWS = 256
"""In one call of the kernel, which takes 1,024."""


class Supply:
    """Of one chunk: which of the blocks asked for are there, and their bytes as views. For one thread, not the loop's.

    It keeps nothing alive: of a buffer that goes in the middle the rest reads as zero, and its blocks are void.
    """

    def __init__(
        self, entries: Mapping[bytes, CachedBlock], keys: list[bytes], block_bytes: int,
        is_current: Callable[[], bool] = lambda: True,
    ) -> None:  # fmt: skip
        """`is_current` says whether the blocks are still those that were offered: if not, none is there."""
        self._entries = entries
        found = [(index, key, entries.get(key)) for index, key in enumerate(keys)]
        found = found if is_current() else []
        here = [(i, key, e) for i, key, e in found if e is not None and e.slot.buffer.block_bytes == block_bytes]
        self.blocks = [(index, entry.tag) for index, _, entry in here]
        self.nbytes = len(here) * block_bytes
        self._block_bytes = block_bytes
        self._sent = [(key, weakref.ref(entry)) for _, key, entry in here]
        runs = in_order(entry.slot for *_, entry in here)
        self._runs = [(weakref.ref(buffer), first, count) for buffer, first, count in runs]

    def has_copies(self) -> bool:
        """Whether bytes may still be on their way into the slots."""
        buffers = [buffer for ref, *_ in self._runs if (buffer := ref()) is not None]
        return any(buffer.copies is not None for buffer in buffers)

    def settle(self) -> None:
        """Wait until all bytes are there; on the loop's thread."""
        for ref, *_ in self._runs:
            if (buffer := ref()) is not None:
                buffer.settle()

    def views(self, start: int) -> list[memoryview]:
        """The bytes from `start` on, or the first part of them; let go of them before waiting for anything."""
        views: list[memoryview] = []
        for ref, first, count in self._runs:
            size = count * self._block_bytes
            if start < size:
                views += _bytes_of(ref(), first * self._block_bytes, size, start)
                if len(views) >= _MOST_VIEWS:
                    break
            start = max(0, start - size)
        return views[:_MOST_VIEWS]

    def void(self) -> list[int]:
        """Which blocks, by their place in `blocks`, are no longer what they were when they were looked up."""
        return [
            number
            for number, (key, ref) in enumerate(self._sent)
            if (entry := ref()) is None or self._entries.get(key) is not entry
        ]


def _bytes_of(buffer: SlotBuffer | None, offset: int, size: int, start: int) -> list[memoryview]:
    if buffer is not None:
        return [memoryview(buffer.data.numpy())[offset + start : offset + size]]
    whole, rest = divmod(size - start, len(_ZEROS))
    return [*[_ZEROS] * min(whole, _MOST_VIEWS), _ZEROS[:rest]]


class Sender:
    """Answers what one target wants of one model, until its connection ends; on a thread of its own."""

    def __init__(
        self, wire: Wire, opened: Open, entries: Mapping[bytes, CachedBlock], on_loop: OnLoop,
        forget: Callable[[list[bytes]], None], is_current: Callable[[], bool],
    ) -> None:  # fmt: skip
        """`forget` is called on the loop with keys that begin with MARK and were asked for: nobody asks twice.

        For `is_current` see Supply.
        """
        self._wire, self._opened, self._entries, self._on_loop = wire, opened, entries, on_loop
        self._forget, self._is_current = forget, is_current

    def run(self, *, shares_memory: bool) -> None:
        """Send until the target has all that it wants, which is when it goes. Raises as `Wire` does, and MsgspecError.

        With `shares_memory` it is on the same machine, and gets the bytes without a socket.
        """
        with ExitStack() as stack:
            window, num_places = None, window_of(self._opened.block_bytes) if shares_memory else 0
            if num_places:
                window = Window.make(num_places, self._opened.chunk_blocks * self._opened.block_bytes)
                stack.enter_context(window)
            self._wire.set_limit(IDLE_LIMIT_S)
            opened = msgspec.msgpack.encode(Opened(num_places))
            self._wire.send_with_file(opened, window.file if window is not None else None)
            while (content := self._next()) is not None:
                self._send(msgspec.msgpack.decode(content, type=Want), window)

    def _next(self) -> bytes | None:
        self._wire.set_limit(IDLE_LIMIT_S)
        try:
            return self._wire.receive(MESSAGE_BYTES)
        except EOFError:
            return None

    def _send(self, want: Want, window: Window | None) -> None:
        keys = want.keys[: self._opened.chunk_blocks]
        supply = Supply(self._entries, keys, self._opened.block_bytes, self._is_current)
        void: list[int] = []
        try:
            if supply.has_copies():
                self._on_loop(supply.settle).result(IDLE_LIMIT_S)
            if window is not None:
                fill(window.place(want.number), supply)
            self._wire.set_limit(IDLE_LIMIT_S)
            self._wire.send(msgspec.msgpack.encode(Chunk(want.number, supply.blocks)))
            if window is None:
                self._wire.send_views(supply.views, supply.nbytes)
            void = supply.void()
        finally:
            if images := [key for key in keys if key.startswith(MARK)]:
                self._on_loop(partial(self._forget, images)).result(IDLE_LIMIT_S)
        self._wire.send(msgspec.msgpack.encode(Void(void)))


def fill(place: npt.NDArray[np.uint8], supply: Supply) -> None:
    """Copy the blocks of a chunk to a place; other Python threads run meanwhile."""
    start = 0
    while start < supply.nbytes:
        for view in supply.views(start):
            np.copyto(place[start : start + len(view)], np.frombuffer(view, np.uint8))
            start += len(view)
