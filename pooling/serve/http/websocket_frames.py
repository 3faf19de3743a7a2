# SPDX-License-Identifier: Apache-2.0
"""Looks at what a websocket's client sends as at a body, before an app parses it. Imports no vLLM.

Frames that have come already are received without a pause: a client that sends many would have the event loop for
itself. So others have a turn before each.
"""

from __future__ import annotations

import asyncio
from collections import deque

from starlette.types import Message, Receive, Send

from tokenpool.serve.http.request_body import fault_of

_POLICY_VIOLATION = 1008
_MAX_REASON_BYTES = 123


class WatchedSocket:
    """The `receive` and `send` of one websocket, for its app."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._early: deque[Message] = deque()
        self._is_over = False

    async def peek(self) -> Message:
        """Receive a message while there is no app yet, which gets it later."""
        self._early.append(await self._receive())
        return self._early[-1]

    async def receive(self) -> Message:
        """The next message; a frame that costs too much to parse closes the socket, and the app sees it close.

        Each frame has a text, one of bytes too.
        """
        message = self._early.popleft() if self._early else await self._receive()
        if message["type"] == "websocket.disconnect":
            self._is_over = True
        elif message["type"] == "websocket.receive":
            await asyncio.sleep(0)
            frame = message.get("bytes") or (message.get("text") or "").encode(errors="replace")
            if (fault := await fault_of(frame, "")) is not None:
                reason = fault.encode()[:_MAX_REASON_BYTES].decode(errors="ignore")
                await self.send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": reason})
                self._is_over = True
                return {"type": "websocket.disconnect", "code": _POLICY_VIOLATION, "reason": reason}
            if message.get("text") is None:  # apps that read texts fail at what has none
                return {**message, "text": frame.decode(errors="replace")}
        return message

    async def send(self, message: Message) -> None:
        """Send a message, unless the app has been told that nobody is there any more."""
        if not self._is_over:
            await self._send(message)
