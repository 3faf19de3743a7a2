# SPDX-License-Identifier: Apache-2.0
"""What the router reads of a request's body: its model's name, and what parsing its JSON would cost. No vLLM here."""

from __future__ import annotations

import asyncio
import codecs
import json
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import numpy as np
from starlette.datastructures import Headers
from starlette.formparsers import FormParser, MultiPartParser
from starlette.types import Message, Receive

MAX_DEPTH = 128
"""Levels of arrays and objects in a body. JSON schemas of tools have a dozen; code that walks a deeper value by
recursion, in validation or in grammar compilers, may run out of stack."""

MAX_CONTAINERS = 20_000
"""Arrays and objects in a body. Each takes an allocation, so that a body of brackets alone would keep parsers busy."""

MAX_VALUES = 1_000_000
"""Values in a body, such as the numbers of prompts that come as tokens."""

_PIECE_BYTES = 64 * 1024
"""Of a body that are looked at before others have a turn."""
_COUNTED_BYTES = 1 << 20
"""The same where brackets and commas are only counted."""
_FORM_TYPES = ("multipart/form-data", "application/x-www-form-urlencoded")
_QUOTE, _COMMA = b'",'
_OPENS, _CLOSES = b"[{", b"]}"


class UnreadableModelError(Exception):
    """The body is there, but no model's name can be read from it."""


class _ModelField(msgspec.Struct):
    model: Any = None


_DECODE_MODEL = msgspec.json.Decoder(_ModelField).decode


async def body_model(headers: Headers, body: bytes) -> str | None:
    """Return the body's `model`, or None if it is absent, null or empty, as vLLM treats them alike."""
    content_type = media_type(headers.get("content-type", ""))
    if content_type in _FORM_TYPES:
        name = await _form_model(headers, body, content_type)
    else:
        name = _json_model(body)
    if name is not None and not isinstance(name, str):
        raise UnreadableModelError
    return name or None


def _json_model(body: bytes) -> Any:
    try:
        return _DECODE_MODEL(body).model
    except (msgspec.DecodeError, ValueError, RecursionError):
        # What vLLM's json.loads takes and msgspec does not: NaN, a byte order mark, UTF-16, lone surrogates.
        try:
            return json.loads(body).get("model")
        except (ValueError, AttributeError, RecursionError):
            raise UnreadableModelError from None


async def _form_model(headers: Headers, body: bytes, content_type: str) -> Any:
    """Parse the form only as far as its `model` field: clients send it before megabytes of audio."""

    async def pieces() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(body), _PIECE_BYTES):
            yield body[start : start + _PIECE_BYTES]
            await asyncio.sleep(0)  # others have a turn: the parser is slow
            if any(key == "model" for key, _ in getattr(parser, "items", ())):
                return

    parser = (MultiPartParser if content_type.startswith("multipart") else FormParser)(headers, pieces())
    try:
        form = await parser.parse()
    except Exception as exc:
        # Whatever a hostile form breaks in the parser breaks again in the app, which answers for it.
        raise UnreadableModelError from exc
    await form.close()
    return form.get("model")


def adapter_name(body: bytes, key: str) -> Any:
    """Return the name, under `key`, of a body that asks vLLM to load an adapter, or None if there is none to read."""
    try:
        return json.loads(body).get(key)
    except (ValueError, AttributeError, RecursionError):
        return None  # vLLM's own validation says what is wrong with it


async def fault_of(body: bytes, content_type: str) -> str | None:
    """Say why a body that is JSON, or may be taken for it, costs too much to parse, or return None.

    Works on the bytes, without recursion: O(bytes), and others have a turn every `_PIECE_BYTES`.
    """
    if media_type(content_type) in _FORM_TYPES or not await _may_be_large(body):
        return None  # nearly every request ends here
    encoding, scan = json.detect_encoding(body), _JsonScan()
    decoder = None if encoding in ("utf-8", "utf-8-sig") else codecs.getincrementaldecoder(encoding)("replace")
    for start in range(0, len(body), _PIECE_BYTES):
        if start:
            await asyncio.sleep(0)
        piece = body[start : start + _PIECE_BYTES]
        if decoder is not None:
            piece = decoder.decode(piece).encode(errors="replace")
        if piece and (fault := scan.feed(piece)) is not None:
            return fault
    return None


async def _may_be_large(body: bytes) -> bool:
    # In UTF-16 and UTF-32, too, each of these characters has this byte.
    num_opens = num_commas = 0
    for start in range(0, len(body), _COUNTED_BYTES):
        if start:
            await asyncio.sleep(0)
        end = start + _COUNTED_BYTES
        num_opens += body.count(b"[", start, end) + body.count(b"{", start, end)
        num_commas += body.count(b",", start, end)
        if num_opens > min(MAX_DEPTH, MAX_CONTAINERS) or num_commas >= MAX_VALUES:
            return True
    return False


class _JsonScan:
    """Counts what lies outside of the strings of a JSON text that comes in pieces."""

    def __init__(self) -> None:
        self._in_string = False
        self._carried = b""  # a backslash that belongs to the next piece
        self._depth = self._num_containers = self._num_commas = 0

    def feed(self, piece: bytes) -> str | None:
        """Count one more piece; returns what is wrong with the text so far."""
        text = np.frombuffer(self._without_escapes(piece), np.uint8)
        if not len(text):
            return None
        inside = np.bitwise_xor.accumulate((text == _QUOTE).view(np.int8)).view(bool) ^ self._in_string
        self._in_string = bool(inside[-1])
        outside = ~inside
        opens = outside & ((text == _OPENS[0]) | (text == _OPENS[1]))
        closes = outside & ((text == _CLOSES[0]) | (text == _CLOSES[1]))
        depths = np.cumsum(opens.view(np.int8) - closes.view(np.int8), dtype=np.int32)
        deepest, self._depth = self._depth + int(depths.max()), self._depth + int(depths[-1])
        self._num_containers += int(np.count_nonzero(opens))
        self._num_commas += int(np.count_nonzero(outside & (text == _COMMA)))
        if deepest > MAX_DEPTH:
            return f"The JSON of the request is nested deeper than {MAX_DEPTH} levels."
        if self._num_containers > MAX_CONTAINERS:
            return f"The JSON of the request has more than {MAX_CONTAINERS} arrays and objects."
        if self._num_commas >= MAX_VALUES:
            return f"The JSON of the request has more than {MAX_VALUES} values."
        return None

    def _without_escapes(self, piece: bytes) -> bytes:
        """The piece without escaped quotes and backslashes, so that each quote begins or ends a string."""
        piece, self._carried = self._carried + piece, b""
        if b"\\" not in piece:
            return piece
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:
            piece, self._carried = piece[:-1], b"\\"
        return piece.replace(b"\\\\", b"").replace(b'\\"', b"")


def media_type(content_type: str) -> str:
    """The type alone of a content-type header, in lower case."""
    return content_type.partition(";")[0].strip().lower()


def replay(body: bytes, receive: Receive, content_type: str = "") -> Receive:
    """Return a `receive` that yields the body once, then the real messages: the app sees its client go.

    JSON comes in one message, a form in pieces, between which others have a turn: its parser is slow.
    """
    size = _PIECE_BYTES if media_type(content_type) in _FORM_TYPES else max(1, len(body))
    pieces = iter(range(0, max(1, len(body)), size))

    async def replayed() -> Message:
        if (start := next(pieces, None)) is None:
            return await receive()
        if start:
            await asyncio.sleep(0)
        is_all = not start and size >= len(body)
        piece = body if is_all else body[start : start + size]
        return {"type": "http.request", "body": piece, "more_body": start + size < len(body)}

    return replayed
