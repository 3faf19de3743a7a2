# SPDX-License-Identifier: Apache-2.0
"""A wire between two sockets of this machine that can be cut, and can fall silent."""

from __future__ import annotations

import asyncio
import contextlib


class Wire:
    """Listens at `port` and passes on, in both directions, what comes for `target`; made by `Wire.to`.

    Whoever connects while nobody listens there is turned away, as without the wire.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self._flows = asyncio.Event()
        self._flows.set()
        self._ends: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def to(cls, target: int) -> Wire:
        """A wire to a port of this machine."""
        made = cls(target)
        made._server = await asyncio.start_server(made._join, "127.0.0.1", 0)
        made.port = made._server.sockets[0].getsockname()[1]
        return made

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            other_reader, other_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._ends += [writer, other_writer]
        for source, sink in ((reader, other_writer), (other_reader, writer)):
            task = asyncio.create_task(self._pass_on(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while content := await source.read(1 << 16):
                await self._flows.wait()
                sink.write(content)
        sink.close()

    def cut(self) -> None:
        """End all connections; others may be made."""
        for end in self._ends:
            end.transport.abort()
        self._ends.clear()

    def fall_silent(self) -> None:
        """Pass nothing on any more; neither side is told."""
        self._flows.clear()

    def close(self) -> None:
        """Cut it for good."""
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
