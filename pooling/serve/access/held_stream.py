# SPDX-License-Identifier: Apache-2.0
"""A stream that begins before its model is loaded: comments tell how far loading is, then the app's events follow.

By then the head of the answer is out, with status 200: an error of the app goes out as an event, as vLLM tells errors
of streams that have begun. Imports no vLLM.
"""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

_PATHS = ("/chat/completions", "/completions", "/responses", "/messages")
"""Ends of the paths whose answers are server-sent events if the body asks for a stream."""
_HEAD: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")],
}


class _StreamField(msgspec.Struct):
    stream: Any = None


_DECODE = msgspec.json.Decoder(_StreamField).decode


def asks_for_stream(path: str, body: bytes) -> bool:
    """Whether the answer is a stream of events; reads the whole body."""
    if not path.endswith(_PATHS) or b'"stream"' not in body:
        return False
    try:
        return _DECODE(body).stream is True
    except (msgspec.DecodeError, ValueError, RecursionError):
        return False


class HeldStream:
    """The answer to one request that waits; `send` it through this once it does not any more."""

    def __init__(self, send: Send, path: str) -> None:
        self.has_begun = False
        """Whether the head of the answer is out."""
        self._send = send
        self._path = path
        self._error: bytes | None = None  # the body so far of an answer that is no stream

    async def comment(self, text: str) -> None:
        """Tell the client that it is not forgotten."""
        if not self.has_begun:
            self.has_begun = True
            await self._send(dict(_HEAD, headers=list(_HEAD["headers"])))
        await self._event(f": {text}\n\n".encode(), more=True)

    async def refuse(self, response: Response, scope: Scope, receive: Receive) -> None:
        """End with an error, as an event if the head is out."""
        await response(scope, receive, self)

    async def __call__(self, message: Message) -> None:
        """Send what the app answers."""
        if not self.has_begun:
            await self._send(message)
        elif message["type"] == "http.response.start":
            kind = Headers(raw=list(message.get("headers", ()))).get("content-type", "")
            if message["status"] != 200 or not kind.startswith("text/event-stream"):
                self._error = b""
        elif message["type"] != "http.response.body" or self._error is None:
            await self._send(message)
        else:
            self._error += message.get("body", b"")
            if not message.get("more_body", False):
                await self._event(self._as_event(self._error), more=False)

    def _as_event(self, body: bytes) -> bytes:
        line = b" ".join(body.split(b"\n"))
        if self._path.endswith(("/messages", "/responses")):
            return b"event: error\ndata: " + line + b"\n\n"
        return b"data: " + line + b"\n\ndata: [DONE]\n\n"

    async def _event(self, body: bytes, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})
