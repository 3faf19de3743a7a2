# SPDX-License-Identifier: Apache-2.0
"""The target's end of a move: makes room for a few chunks, asks for them, and takes in what came whole.

Bytes are received straight into slots of the host tier that were set aside for them. Room is made, and blocks are taken
in, on the host loop's thread: a call of it per chunk, in which no bytes are copied. The rest is done beside the loop.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import msgspec
import numpy as np

from tokenpool.errors import HostError
from tokenpool.host.kv.kv_supply import OnLoop
from tokenpool.host.kv.kv_window import Window
from tokenpool.memory.host_slots import in_order
from tokenpool.memory.kv_blocks import Arrival
from tokenpool.memory.kv_tier import HostKVTier
from tokenpool.wire.kv_frames import (
    IDLE_LIMIT_S,
    KV_LIMIT_S,
    MESSAGE_BYTES,
    Chunk,
    Open,
    Opened,
    Void,
    Want,
    blocks_in_chunk,
    window_of,
)
from tokenpool.wire.messages import Wire

_MOST_LOOKED_AT = 4096
"""Keys in one call of the loop."""


@dataclass(slots=True, eq=False)
class Asked:
    """A chunk that there is room for: its keys, and a slot for each."""

    number: int
    keys: Sequence[bytes]
    arrival: Arrival
    came: list[tuple[bytes, int | None] | None] = field(default_factory=list)
    """Key and tag of the block in each slot, once all bytes are there; None = it is void."""

    def views(self, chunk: Chunk, block_bytes: int) -> list[memoryview]:
        """Where the bytes of a chunk go, in the order in which they come; HostError for one that was not asked."""
        indices = [index for index, _ in chunk.blocks]
        if any(b <= a for a, b in zip([-1, *indices], [*indices, len(self.keys)], strict=True)):
            raise HostError("the other host sends KV blocks that nobody asked for")
        runs = in_order(self.arrival.slots[: len(indices)])
        return [
            memoryview(buffer.data.numpy())[first * block_bytes : (first + count) * block_bytes]
            for buffer, first, count in runs
        ]

    def filled(self, chunk: Chunk, void: Void) -> None:
        """All bytes of the chunk are where `views` said."""
        dropped = set(void.blocks)
        self.came = [
            None if number in dropped else (self.keys[index], tag) for number, (index, tag) in enumerate(chunk.blocks)
        ]


class Fetch:
    """What is missing of a list of blocks, and what of it is on its way; called on the loop's thread only.

    Blocks that are here already are not asked for. Without room for a single one it ends early.
    """

    def __init__(
        self, tier: HostKVTier, model: str, keys: Sequence[bytes], block_bytes: int, generation: int = 0,
        *, chunk_blocks: int | None = None, window: int | None = None,
    ) -> None:  # fmt: skip
        """`generation` is that of the source's blocks, as it was offered."""
        self.generation = generation
        self.num_here = 0
        """Of these blocks, as far as is known."""
        self.num_came = 0
        """Of them, those that the other host sent."""
        self.block_bytes = block_bytes
        self.chunk_blocks = chunk_blocks or blocks_in_chunk(block_bytes)
        self.window = window or window_of(block_bytes)
        """Chunks that may be on their way."""
        self._tier, self._model, self._keys = tier, model, keys
        self._next = self._number = 0
        self._open: list[Asked] = []

    @property
    def is_done(self) -> bool:
        """Whether nothing is to be asked for any more, and nothing on its way."""
        return self._next == len(self._keys) and not self._open

    def turn(self, filled: Asked | None = None) -> list[Asked]:
        """Take in a chunk that came, and make room for the next ones, as many as may be on their way."""
        if filled is not None:
            self._open.remove(filled)
            if filled.arrival.stale is None:  # the model is another one, and the other host may not know yet
                self._next = len(self._keys)
            came = self._tier.end_arrival(filled.arrival, filled.came)
            self.num_came += came
            self.num_here += came
        asked: list[Asked] = []
        left = _MOST_LOOKED_AT
        while len(self._open) < self.window and self._next < len(self._keys) and left > 0:
            first = self._next
            one = self._ask(left)
            left -= self._next - first
            if one is None:
                break
            asked.append(one)
        return asked

    def close(self) -> None:
        """Give all room back that is set aside; nobody writes there any more."""
        self._next = len(self._keys)
        while self._open:
            self._tier.end_arrival(self._open.pop().arrival, ())

    def _ask(self, most: int) -> Asked | None:
        """The next chunk; None if no key is missing, or there is no room, for which it may wait."""
        missing: list[int] = []
        known, end = 0, self._next
        for end in range(self._next, min(len(self._keys), self._next + most)):
            if len(missing) == self.chunk_blocks:
                break
            if self._tier.refresh(self._model, self._keys[end]):
                known += 1
            else:
                missing.append(end)
        else:
            end += 1
        if not missing:
            self.num_here, self._next = self.num_here + known, end
            return None
        arrival = self._tier.begin_arrival(self._model, len(missing), self.block_bytes)
        fits = len(arrival.slots)
        if not fits:
            self._tier.end_arrival(arrival, ())
            if not self._open:
                self._next = len(self._keys)
            return None
        if fits < len(missing):
            end = missing[fits]
            known = end - self._next - fits
        self.num_here, self._next = self.num_here + known, end
        asked = Asked(self._number, [self._keys[index] for index in missing[:fits]], arrival)
        self._number += 1
        self._open.append(asked)
        return asked


def receive(wire: Wire, fetch: Fetch, model: str, on_loop: OnLoop) -> None:
    """Fetch all blocks over a connection that was proved; on a thread of its own.

    Raises HostError, TimeoutError, OSError, EOFError and MsgspecError, after which `fetch` has to be closed.
    """
    deadline_s = time.monotonic() + KV_LIMIT_S
    wire.set_limit(IDLE_LIMIT_S)
    wire.send(msgspec.msgpack.encode(Open(model, fetch.block_bytes, fetch.chunk_blocks, fetch.generation)))
    with ExitStack() as stack:
        window = _window(wire, fetch, stack)
        turns = deque([on_loop(fetch.turn)])
        waiting: dict[int, Asked] = {}
        while turns or waiting:
            while turns and (turns[0].done() or not waiting):
                for asked in turns.popleft().result(IDLE_LIMIT_S):
                    wire.send(msgspec.msgpack.encode(Want(asked.number, list(asked.keys))))
                    waiting[asked.number] = asked
                if not turns and not waiting and not fetch.is_done:
                    turns.append(on_loop(fetch.turn))
            left_s = deadline_s - time.monotonic()
            if left_s < 0:
                raise TimeoutError
            wire.set_limit(min(IDLE_LIMIT_S, left_s))
            if waiting:
                turns.append(on_loop(partial(fetch.turn, _next(wire, waiting, fetch.block_bytes, window))))


def _window(wire: Wire, fetch: Fetch, stack: ExitStack) -> Window | None:
    """The memory in which the other host puts chunks, until the stack ends; None = they come over the connection."""
    content, file = wire.receive_with_file(MESSAGE_BYTES)
    try:
        opened = msgspec.msgpack.decode(content, type=Opened)
    except msgspec.MsgspecError:
        if file is not None:
            os.close(file)
        raise
    if file is None:
        return None
    window = stack.enter_context(Window.open(file, opened.num_places, fetch.chunk_blocks * fetch.block_bytes))
    if opened.num_places < fetch.window:
        raise HostError("the other host has too little shared memory")
    return window


def _next(wire: Wire, waiting: dict[int, Asked], block_bytes: int, window: Window | None) -> Asked:
    """Receive one chunk whole."""
    chunk = msgspec.msgpack.decode(wire.receive(MESSAGE_BYTES), type=Chunk)
    asked = waiting.pop(chunk.number, None)
    if asked is None:
        raise HostError("the other host sends KV that nobody asked for")
    views = asked.views(chunk, block_bytes)
    if window is None:
        for view in views:
            wire.receive_into(view)
    void = msgspec.msgpack.decode(wire.receive(MESSAGE_BYTES), type=Void)
    if window is not None:
        place, start = window.place(chunk.number), 0
        for view in views:
            np.copyto(np.frombuffer(view, np.uint8), place[start : start + len(view)])
            start += len(view)
    asked.filled(chunk, void)
    return asked
