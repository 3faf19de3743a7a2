# SPDX-License-Identifier: Apache-2.0
"""`GET /v1/pool/logs`: the last log lines of the server and its hosts, of one model or all, one JSON object in a line.

Nothing is kept for a reader: each asks for what is newer than it has seen, so one that is slow misses lines, is told
how many, and is cut off when it takes nothing at all.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tokenpool.errors import PoolError, check_setting, show
from tokenpool.recent_logs import is_about
from tokenpool.serve.access.auth import error_response
from tokenpool.serve.access.gone import until_gone
from tokenpool.serve.gateway.operator import Operator

_LOOK_S = 0.5
_SEND_LIMIT_S = 10.0
"""For a reader to take what is sent."""
_MOST_READERS = 16
"""That follow at a time, at one frontend."""
_MOST_LINES = 2000


async def pool_logs(request: Request) -> Response:
    """`?model=NAME` those that name it, `?lines=100` the last ones, `?follow=1` then those that come."""
    asked, state = request.query_params, request.app.state
    text = asked.get("lines", "100")
    check_setting(text.isdecimal(), "lines", f"must be a whole number, such as 100, got {show(text)}")
    lines = Lines(state.operator, asked.get("model"), min(int(text), _MOST_LINES))
    if asked.get("follow", "0") in ("", "0", "false"):
        return Response(_written(await lines.news()), media_type="application/x-ndjson")
    if getattr(state, "log_readers", 0) >= _MOST_READERS:
        message = f"{_MOST_READERS} readers follow the log here already: end one of them"
        return error_response(429, "RateLimitError", message, None, {"retry-after": "10"})
    return _Stream(lines, state)


class Lines:
    """What one reader has seen."""

    def __init__(self, operator: Operator, model: str | None, num_first: int) -> None:
        self._operator = operator
        self._model = model
        self._num_first: int | None = num_first
        self._seen: dict[str, int] = {}

    async def news(self) -> list[dict[str, Any]]:
        """The lines since the last call, at first the last ones; with one that says so where some were missed."""
        found = await self._operator.logs(dict(self._seen))
        kept, missed = [], 0
        for line in found:
            before = self._seen.get(line["source"], 0)
            is_first = self._num_first is not None
            missed += 0 if is_first else max(0, line["number"] - before - 1)
            self._seen[line["source"]] = max(before, line["number"])
            if self._model is None or is_about(line, self._model):
                kept.append({key: line[key] for key in ("time_s", "level", "process", "text")})
        if self._num_first is not None:
            kept, self._num_first = kept[len(kept) - min(len(kept), self._num_first) :], None
        return [{"missed": missed}, *kept] if missed else kept


class _Stream(Response):
    """Lines as they come, until the reader goes or takes nothing."""

    def __init__(self, lines: Lines, state: Any) -> None:
        super().__init__(media_type="application/x-ndjson")
        self._lines = lines
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send lines; a reader that takes none for 10 s is cut off."""
        headers = [(key, value) for key, value in self.raw_headers if key != b"content-length"]
        self._state.log_readers = getattr(self._state, "log_readers", 0) + 1
        gone = asyncio.create_task(until_gone(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for body in self._bodies(gone):
                async with asyncio.timeout(_SEND_LIMIT_S):
                    await send({"type": "http.response.body", "body": body, "more_body": True})
        except TimeoutError:
            return  # without an end of the body the connection is closed
        finally:
            gone.cancel()
            self._state.log_readers -= 1

    async def _bodies(self, gone: asyncio.Task[None]) -> AsyncIterator[bytes]:
        while not gone.done():
            try:
                if news := await self._lines.news():
                    yield _written(news)
            except PoolError:
                pass  # the supervisor is busy, or the pool ends
            await asyncio.wait([gone], timeout=_LOOK_S)


def _written(lines: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)
