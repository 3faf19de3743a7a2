# SPDX-License-Identifier: Apache-2.0
"""TCP sockets of a process on whatever network it is; psutil reads those of its caller's network only."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

LISTEN = "0A"
Address = tuple[str, int]


def tcp_sockets(pid: int) -> Iterator[tuple[Address, Address, str]]:
    """Address here, address there and the kernel's state in hex, of each TCP socket over IPv4 of a process."""
    own = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            own.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if f"socket:[{words[9]}]" in own:
            yield _address(words[1]), _address(words[2]), words[3]


def _address(text: str) -> Address:
    address, port = text.split(":")
    return socket.inet_ntoa(bytes.fromhex(address)[::-1]), int(port, 16)
