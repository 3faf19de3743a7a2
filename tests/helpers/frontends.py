# SPDX-License-Identifier: Apache-2.0
"""Connections to each of two frontends behind one port, and streams that go on while frontends and hosts die."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx

from tests.helpers.server import PoolServerProcess, poll

NUM_TOKENS = 24
BODY = {"model": "qwen2", "prompt": [5] * 20, "max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0}


def frontends(server: PoolServerProcess) -> list[int]:
    """Pids of both frontends, in order, once both are there."""
    found = poll(lambda: server.state()["frontends"], until=lambda found: len(found) == 2)
    return [frontend["pid"] for frontend in found]


@contextmanager
def clients(server: PoolServerProcess, key: str | None = None) -> Iterator[list[httpx.Client]]:
    """A client per frontend with a connection to it: the other one is held still while it is made. `key` is its key."""
    headers = server.headers(key or server.api_key)
    pids = frontends(server)
    with ExitStack() as stack:
        made = []
        for pid in pids:
            limits = httpx.Limits(max_connections=1, keepalive_expiry=60)
            client = httpx.Client(base_url=server.base_url, headers=headers, timeout=60, limits=limits)
            made.append(stack.enter_context(client))
            others = [other for other in pids if other != pid]
            for other in others:
                os.kill(other, signal.SIGSTOP)
            try:
                assert client.get("/health").status_code == 200
            finally:
                for other in others:
                    os.kill(other, signal.SIGCONT)
        yield made


def complete(client: httpx.Client, **changes: Any) -> list[int]:
    answer = client.post("/v1/completions", json=BODY | {"return_token_ids": True} | changes)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]


class Stream:
    """A streamed completion whose first token has come."""

    def __init__(self, client: httpx.Client, stack: ExitStack) -> None:
        body = BODY | {"stream": True, "return_token_ids": True, "max_tokens": 400}
        answer = stack.enter_context(client.stream("POST", "/v1/completions", json=body))
        assert answer.status_code == 200, answer.read()
        self._lines = answer.iter_lines()
        self.tokens = self._next()

    def _next(self) -> list[int]:
        for line in self._lines:
            if line.startswith("data: {"):
                return json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"]
        return []

    def rest(self) -> list[int]:
        """All tokens, once the stream has ended."""
        while tokens := self._next():
            self.tokens += tokens
        return self.tokens
