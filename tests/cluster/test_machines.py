# SPDX-License-Identifier: Apache-2.0
"""The machines that the tests of separate networks run on are separate, can be parted, and leave nothing behind."""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.network.delay import DelayingWire
from tests.helpers.network.machines import Machine, Machines
from tests.helpers.server import poll

pytestmark = pytest.mark.cpu


def reaches(one: Machine, two: Machine) -> bool:
    """Whether a packet comes over."""
    listener, sender = socket_on(two), socket_on(one)
    with listener, sender:
        sender.sendto(b"hello", listener.getsockname())
        listener.settimeout(0.5)
        try:
            return listener.recv(16) == b"hello"
        except TimeoutError:
            return False


def socket_on(machine: Machine) -> socket.socket:
    with machine.inside():
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.bind((machine.address, 0))
        return made


def test_machines_are_apart_and_leave_nothing():
    """Cables and pairs of machines can be cut and mended; what runs there ends with the block, also if it fails."""
    before = set(Path("/sys/class/net").iterdir())
    with pytest.raises(KeyError), Machines(3) as (first, second, third):
        pairs = [(one, two) for one in (first, second, third) for two in (first, second, third)]
        assert all(reaches(*pair) for pair in pairs)
        second.unplug()
        assert [pair for pair in pairs if reaches(*pair)] == [p for p in pairs if p[0] is p[1] or second not in p]
        second.plug()
        poll(lambda: reaches(first, second) and reaches(second, third))
        first.part_from(third)
        assert not reaches(first, third) and not reaches(third, first)
        assert reaches(first, second) and reaches(third, second)
        first.join_with(third)
        poll(lambda: reaches(first, third) and reaches(third, first))

        code = "import tempfile, pathlib; pathlib.Path(tempfile.gettempdir(), 'here').touch(); input()"
        child = subprocess.Popen([*first.enter, sys.executable, "-c", code], stdin=subprocess.PIPE)
        poll(lambda: (first.folder / "here").exists())
        assert not (second.folder / "here").exists() and child.pid in first.pids()
        folder = first.folder
        raise KeyError
    assert child.wait() != 0 and not folder.parent.exists()
    assert set(Path("/sys/class/net").iterdir()) == before


def test_a_delaying_wire_is_late_and_loses_nothing():
    """All bytes come in order both ways, none before its time, and what comes after the others' end does too."""
    delay_s, sizes = 0.05, [random.Random(1).randrange(1, 200_000) for _ in range(20)]
    sent = b"".join(bytes([number]) * size for number, size in enumerate(sizes))

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while content := await reader.read(1 << 16):
            writer.write(content)
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        wire = await DelayingWire.make("127.0.0.1", server.sockets[0].getsockname()[:2], delay_s)
        reader, writer = await asyncio.open_connection("127.0.0.1", wire.port)
        start_s = time.monotonic()
        writer.write(sent)
        got = await reader.readexactly(1)
        assert time.monotonic() - start_s >= 2 * delay_s
        got += await reader.readexactly(len(sent) - 1)
        assert got == sent
        writer.write(b"last")
        writer.write_eof()
        assert await reader.read() == b"last"
        writer.close()

    asyncio.run(main())
