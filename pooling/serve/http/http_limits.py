# SPDX-License-Identifier: Apache-2.0
"""uvicorn's HTTP protocols with bounds on what a connection may send before it is known what it wants. Imports no vLLM.

Whatever parser is installed, a request's head ends within `HEAD_BYTES` and `SILENCE_S`, and its body goes on at least
every `SILENCE_S`; else it is answered 431 or 408, if its answer has not begun, and its connection is closed.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_BYTES = 64 * 1024
"""Largest request line and headers of a request, together, unless uvicorn's settings say otherwise."""
HEAD_LINES = 256
"""Most headers of a request, unless they do."""
SILENCE_S = 30.0
"""How long a connection may take for a whole head, and how long it may send nothing of a body that is not whole."""

_REASONS = {408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


class _Bounded(asyncio.Protocol):
    """What both parsers share; comes before uvicorn's class, which has the attributes used here."""

    silence_s = SILENCE_S

    def __init__(self: Any, config: Config, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)  # type: ignore[call-arg]  # of uvicorn's class
        self._max_bytes = config.h11_max_incomplete_event_size or HEAD_BYTES
        self._max_lines = getattr(config, "h11_max_header_count", HEAD_LINES)

    def connection_made(self: Any, transport: Any) -> None:
        """Begin to wait for the first request."""
        self._since_s = self.loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._is_over = False
        super().connection_made(transport)
        self._watch()

    def connection_lost(self: Any, exc: Exception | None) -> None:
        """Wait no longer."""
        self._unwatch()
        super().connection_lost(exc)

    def data_received(self: Any, data: bytes) -> None:
        """Note that the client is there; what it sends of a head does not lengthen the time for it."""
        if self._is_in_body() or not self._waits_for_client():
            self._since_s = self.loop.time()
        super().data_received(data)
        if not self.transport.is_closing() and self._waits_for_client():
            self._watch()

    def handle_websocket_upgrade(self: Any, *args: Any) -> None:
        """Leave the connection to the websocket's protocol."""
        self._unwatch()
        super().handle_websocket_upgrade(*args)  # type: ignore[misc]  # of uvicorn's class

    def _watch(self: Any) -> None:
        if self._timer is None and not self._is_over:
            self._timer = self.loop.call_at(self._since_s + self.silence_s, self._look)

    def _unwatch(self: Any) -> None:
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self: Any) -> None:
        self._timer = None
        if self.transport.is_closing() or not self._waits_for_client():
            return  # the next request starts the watch again
        if self.flow.read_paused or self._is_answering():
            self._since_s = self.loop.time()  # the client is not heard now, or waits itself
        if self.loop.time() < self._since_s + self.silence_s:
            self._watch()
        else:
            self._end(408, b"The request did not become whole in time.")

    def _is_idle(self: Any) -> bool:
        """Whether uvicorn's own limit holds, of a connection that has had an answer and has sent nothing since."""
        return self.timeout_keep_alive_task is not None

    def _is_answering(self: Any) -> bool:
        """Whether an answer to a whole request is on its way."""
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

    def _end(self: Any, status: int, text: bytes) -> None:
        """Answer, unless an answer has begun, and close."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            lines = [b"HTTP/1.1 %d %s" % (status, _REASONS[status])]
            lines += [b"%s: %s" % header for header in self.server_state.default_headers]
            lines += [b"content-type: text/plain; charset=utf-8", b"content-length: %d" % len(text)]
            self.transport.write(b"\r\n".join([*lines, b"connection: close", b"", text]))
        self.transport.close()

    def _end_by_size(self: Any) -> None:
        self.logger.warning("head of a request has more than %d bytes or %d headers", self._max_bytes, self._max_lines)
        self._end(431, b"The head of the request is too large.")


class BoundedH11(_Bounded, H11Protocol):
    """With h11."""

    def __init__(self, config: Config, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)
        self.conn = _BoundedConnection(self._max_bytes, self._max_lines)

    def _is_in_body(self) -> bool:
        return self.conn.their_state is h11.SEND_BODY

    def _waits_for_client(self) -> bool:
        state = self.conn.their_state
        has_more = state in (h11.IDLE, h11.DONE) and bool(self.conn.trailing_data[0])
        return self._is_in_body() or has_more or (state is h11.IDLE and not self._is_idle())

    def send_400_response(self, msg: str) -> None:
        """Tell a head that is too large from one that is wrong."""
        if getattr(sys.exc_info()[1], "error_status_hint", 400) == 431:
            self._end_by_size()
        else:
            super().send_400_response(msg)


class _BoundedConnection(h11.Connection):
    """One that looks at the size of heads that come whole, too."""

    def __init__(self, max_bytes: int, max_lines: int) -> None:
        super().__init__(h11.SERVER, max_bytes)
        self._max_bytes, self._max_lines = max_bytes, max_lines

    def next_event(self) -> Any:
        """See h11."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            size = len(event.target) + sum(len(name) + len(value) + 4 for name, value in event.headers)
            if size > self._max_bytes or len(event.headers) > self._max_lines:
                raise h11.RemoteProtocolError("head too large", error_status_hint=431)
        return event
