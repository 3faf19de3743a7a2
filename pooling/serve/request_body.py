# SPDX-License-Identifier: Apache-2.0
"""What the router reads of a request's body: the model's name and how deep its JSON is. Imports no vLLM."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.formparsers import FormParser, MultiPartParser
from starlette.types import Message, Receive

MAX_DEPTH = 128
"""Levels of arrays and objects in a body. JSON schemas of tools have a dozen; code that walks a deeper value by
recursion, in validation or in grammar compilers, may run out of stack."""

_FORM_PIECE_BYTES = 64 * 1024
_FORM_TYPES = ("multipart/form-data", "application/x-www-form-urlencoded")
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)  # one without an end goes to the body's end
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_ALIKE = bytes.maketrans(b"{}", b"[]")


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
        for start in range(0, len(body), _FORM_PIECE_BYTES):
            yield body[start : start + _FORM_PIECE_BYTES]
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


def adapter_name(body: bytes) -> Any:
    """Return the `lora_name` of a body that asks vLLM to load an adapter, or None if there is none to read."""
    try:
        return json.loads(body).get("lora_name")
    except (ValueError, AttributeError, RecursionError):
        return None  # vLLM's own validation says what is wrong with it


def is_too_deep(body: bytes, content_type: str) -> bool:
    """Tell whether a body that is JSON, or may be taken for it, is nested deeper than `MAX_DEPTH`.

    Works on the bytes, without recursion: O(bytes), and at most MAX_DEPTH passes over the brackets alone.
    """
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH or media_type(content_type) in _FORM_TYPES:
        return False  # nearly every request ends here
    if (encoding := json.detect_encoding(body)) not in ("utf-8", "utf-8-sig"):
        body = body.decode(encoding, "replace").encode(errors="replace")
    brackets = _STRING.sub(b"", body).translate(_ALIKE, _NO_BRACKETS)
    for _ in range(MAX_DEPTH):  # each pass takes the innermost level away
        brackets, before = brackets.replace(b"[]", b""), brackets
        if brackets == before:
            break
    return b"[]" in brackets or brackets.count(b"[") > MAX_DEPTH


def media_type(content_type: str) -> str:
    """The type alone of a content-type header, in lower case."""
    return content_type.partition(";")[0].strip().lower()


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that yields the body once, then the real messages: the app sees its client go."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed
