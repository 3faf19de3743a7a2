# SPDX-License-Identifier: Apache-2.0
"""What two hosts say to each other while KV blocks go from one to the other; plain values, beside them raw bytes.

    target                                             source
    Open(model, sizes) ──────────────────────────────►
                       ◄────────────────────────────── Opened(places) and, on one machine, a descriptor
    Want(0, keys), Want(1, keys), ... ───────────────►                    as many as the target has room for
                       ◄────────────────────────────── Chunk(0, blocks), their bytes, Void(0)
    Want(4, keys) ───────────────────────────────────►                    the place of chunk 0 is free again
                       ◄────────────────────────────── Chunk(1, blocks), their bytes, Void(2)
    the end of the connection

A Want is also the credit for its chunk: the source sends nothing that was not asked for, and keeps nothing for it.
With a descriptor the bytes are not in the stream but in shared memory, in place `number % places`.
"""

from __future__ import annotations

import msgspec

KV_LIMIT_S = 30.0
"""Within which the KV of a request is there, or it moves without."""
IDLE_LIMIT_S = 10.0
"""Without a byte the other side counts as gone."""
CHUNK_BYTES = 4 << 20
"""Bytes that are asked for at a time; a block larger than this goes alone."""
MESSAGE_BYTES = 4 << 20
"""The largest message, the bytes of blocks aside: names of the blocks of one chunk."""
_WINDOW = 4


class Open(msgspec.Struct, array_like=True, frozen=True):
    """Whose blocks, how many bytes each has, and how many of them are asked for at a time."""

    model: str
    block_bytes: int
    chunk_blocks: int
    generation: int
    """Of the source's blocks, as in the offer: another model of that name has other blocks under the same keys."""


class Opened(msgspec.Struct, array_like=True, frozen=True):
    """Chunks that the shared memory has places for, of `chunk_blocks` each; 0 = there is none."""

    num_places: int


class Want(msgspec.Struct, array_like=True, frozen=True):
    """Blocks of one chunk; numbers go up by one."""

    number: int
    keys: list[bytes]


class Chunk(msgspec.Struct, array_like=True, frozen=True):
    """Those that are there: which of the keys asked for, and the block's tag. Their bytes follow, in this order."""

    number: int
    blocks: list[tuple[int, int | None]]


class Void(msgspec.Struct, array_like=True, frozen=True):
    """Which of the blocks just sent are not valid: the source gave them up meanwhile."""

    blocks: list[int]


def blocks_in_chunk(block_bytes: int) -> int:
    """How many blocks of a size go at a time."""
    return max(1, CHUNK_BYTES // block_bytes)


def window_of(block_bytes: int) -> int:
    """How many chunks of such blocks are asked for at a time: 16 MiB together, or one block."""
    chunk_bytes = blocks_in_chunk(block_bytes) * block_bytes
    return max(1, min(_WINDOW, _WINDOW * CHUNK_BYTES // chunk_bytes))
