# SPDX-License-Identifier: Apache-2.0
"""A wire that passes everything on later, for networks whose kernel has no `netem`.

python -m tests.helpers.network.delay 10.0.0.2 10.0.0.1:4000 0.001       # says its port, and runs until it is killed
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections import deque

_READ_BYTES = 1 << 16


class DelayingWire:
    """Listens at `address`, and passes on what comes for `target`, each byte `delay_s` after it came; see `make`."""

    def __init__(self, target: tuple[str, int], delay_s: float) -> None:
        self._target, self._delay_s = target, delay_s
        self.port = 0

    @classmethod
    async def make(cls, address: str, target: tuple[str, int], delay_s: float) -> DelayingWire:
        """A wire from a free port of an address of this machine."""
        made = cls(target, delay_s)
        server = await asyncio.start_server(made._join, address, 0)
        made.port = server.sockets[0].getsockname()[1]
        return made

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            other_reader, other_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        for sink in (writer, other_writer):
            sink.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ways = self._pass_on(reader, other_writer), self._pass_on(other_reader, writer)
        await asyncio.gather(*ways)
        for sink in (writer, other_writer):
            sink.close()

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        """While some bytes wait for their time, further ones are read: it is a delay, and no queue."""
        loop = asyncio.get_running_loop()
        waiting: deque[bytes] = deque()
        is_empty = asyncio.Event()

        def send() -> None:
            sink.write(waiting.popleft())
            if not waiting:
                is_empty.set()

        with contextlib.suppress(OSError):
            while content := await source.read(_READ_BYTES):
                waiting.append(content)
                is_empty.clear()
                loop.call_later(self._delay_s, send)
        if waiting:
            await is_empty.wait()
        with contextlib.suppress(OSError):
            sink.write_eof()


async def _run(address: str, target: str, delay_s: float) -> None:
    host, port = target.rsplit(":", 1)
    wire = await DelayingWire.make(address, (host, int(port)), delay_s)
    print(wire.port, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_run(sys.argv[1], sys.argv[2], float(sys.argv[3])))
