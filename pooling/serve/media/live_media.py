# SPDX-License-Identifier: Apache-2.0
"""One budget of a frontend for what media of requests unpack to, which tenants share: images, videos and sounds.

A small file may hold a gigabyte. Bytes are taken before a file is unpacked, and given back when nobody needs what came
out of it any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Iterator
from http import HTTPStatus

from vllm.exceptions import GracefulHTTPError, VLLMValidationError

from tokenpool.process.heap import HeapTrimmer
from tokenpool.serve.access.byte_shares import ByteShares
from tokenpool.serve.access.tenant_call import current_tenant

MAX_LIVE_BYTES = 1 << 30

LIVE = ByteShares(MAX_LIVE_BYTES)
_TRIMMER = HeapTrimmer()


class Keeper:
    """Takes room for media of one request; made by its task, used in whatever thread."""

    def __init__(self) -> None:
        self.owner = current_tenant()
        self._loop = asyncio._get_running_loop()

    @contextlib.contextmanager
    def room(self, num_bytes: int, what: str) -> Iterator[Room]:
        """Have so many bytes of the budget for the time of the block, and longer if it says so.

        Raises VLLMValidationError for more than there can ever be, GracefulHTTPError while others leave too little.
        """
        shares = LIVE
        most = shares.max_bytes // 2 if self.owner else shares.max_bytes
        if num_bytes > most:
            message = f"{what} takes {num_bytes} bytes once it is unpacked, at most {most} are taken: send less of it."
            raise VLLMValidationError(message, parameter="url")
        if not shares.take(self.owner, num_bytes):
            message = (
                f"Media of requests take {shares.num_bytes} of {shares.max_bytes} bytes here, which leaves too little "
                f"room for {what}: send fewer or smaller ones, or retry after 5 s."
            )
            raise GracefulHTTPError(message, HTTPStatus.SERVICE_UNAVAILABLE)
        room = Room(num_bytes)
        try:
            yield room
        except BaseException:
            shares.give_back(self.owner, num_bytes)
            raise
        kept = 0 if room.media is None else min(room.num_bytes, num_bytes)
        shares.give_back(self.owner, num_bytes - kept)
        if kept:
            weakref.finalize(room.media, self._forget, shares, kept)
            room.media = None

    def _forget(self, shares: ByteShares, num_bytes: int) -> None:
        """What was kept is gone, in whatever thread."""
        shares.give_back(self.owner, num_bytes)
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it is closed: the process ends
                self._loop.call_soon_threadsafe(_TRIMMER.freed, num_bytes)


class Room:
    """What was taken, until it is kept for something."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.media: object | None = None

    def keep_for(self, media: object, num_bytes: int | None = None) -> None:
        """Keep it, or only `num_bytes` of it, for as long as `media` lives."""
        self.media = media
        self.num_bytes = self.num_bytes if num_bytes is None else num_bytes
