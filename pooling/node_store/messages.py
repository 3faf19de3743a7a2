# SPDX-License-Identifier: Apache-2.0
"""What hosts and the keeper of a node say to each other: one message, one answer, on a Unix socket of packets.

A sealed copy travels as the descriptor of its memory beside the message.
"""

from __future__ import annotations

from typing import Any

import msgspec

VERSION = 1
"""Of the words below; hosts and keepers of different versions know nothing of each other."""
MESSAGE_BYTES = 1 << 16
"""More than any message has."""
MOST_META_BYTES = 32 << 10


class Hello(msgspec.Struct, tag=True, frozen=True):
    """The first message: what the client's pool says that the node may use."""

    version: int
    budget_bytes: int


class Offer(msgspec.Struct, tag=True, frozen=True):
    """A sealed copy, beside it, from before the connection; `ok` = it is the node's, and this client holds it."""

    key: str
    nbytes: int
    meta: bytes


class Claim(msgspec.Struct, tag=True, frozen=True):
    """Whether there is such a copy; see CopyState. A sealed one comes beside the answer."""

    key: str


class Allocate(msgspec.Struct, tag=True, frozen=True):
    """Book a claimed copy; `ok` = it may be filled. Never refused with `force`."""

    key: str
    nbytes: int
    force: bool = False


class Seal(msgspec.Struct, tag=True, frozen=True):
    """The copy, beside it, is whole."""

    key: str
    meta: bytes


class Drop(msgspec.Struct, tag=True, frozen=True):
    """A lease ends, or the filling."""

    key: str


class Hold(msgspec.Struct, tag=True, frozen=True):
    """What the client has of its own is now so much; `ok` = so be it. Never refused with `force`."""

    own_bytes: int
    force: bool = False


class SetBudget(msgspec.Struct, tag=True, frozen=True):
    """What the client's pool says now that the node may use."""

    budget_bytes: int


class Tick(msgspec.Struct, tag=True, frozen=True):
    """The client gets on, with what it fills too; the answer says what is wanted of it."""


class Show(msgspec.Struct, tag=True, frozen=True):
    """The whole book."""


Message = Hello | Offer | Claim | Allocate | Seal | Drop | Hold | SetBudget | Tick | Show


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """To each message."""

    ok: bool = True
    problem: str = ""
    """Why not; empty = there was no room."""
    state: str = ""
    """Of a claimed copy."""
    nbytes: int = 0
    meta: bytes = b""
    idle_s: float = 0.0
    """How long a filling that another client does has not got on."""
    free_bytes: int = 0
    """Of the node's budget, with what nobody holds."""
    wanted_bytes: int = 0
    """What the client is asked to give up if it can do without."""
    book: dict[str, Any] = {}


pack = msgspec.msgpack.Encoder().encode
read_message = msgspec.msgpack.Decoder(Message).decode
read_answer = msgspec.msgpack.Decoder(Answer).decode
