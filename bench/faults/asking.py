# SPDX-License-Identifier: Apache-2.0
"""Requests for one token at a server that lives, each on a connection of its own, and why some were not answered."""

from __future__ import annotations

import asyncio
import itertools
import time
from http.client import HTTPException
from urllib.error import HTTPError

from bench.parts.common import Server

_LIMIT_S, _GAP_S = 60.0, 0.05


class Asker:
    """Asks for a token of one model after the other."""

    def __init__(self, server: Server) -> None:
        self.asked = 0
        self.refusals: list[str] = []
        """Of each that was not answered: when it was asked after `run` began, where, and what came instead."""
        self._server = server

    async def run(self) -> None:
        """Ask until it is cancelled."""
        started_s = time.monotonic()
        for model in itertools.cycle(sorted(self._server.models)):
            asked_s = time.monotonic()
            try:
                body = {"model": model, "prompt": [5, 6, 7], "max_tokens": 1}
                await asyncio.to_thread(self._server.get, "/v1/completions", body=body, limit_s=_LIMIT_S)
            except (OSError, HTTPException, ValueError) as error:  # ValueError: half an answer
                when = f"after {asked_s - started_s:.2f} s, for {time.monotonic() - asked_s:.2f} s"
                self.refusals.append(f"{when}, port {self._server.port}, {model}: {_told(error)}")
            self.asked += 1
            await asyncio.sleep(_GAP_S)


def _told(error: Exception) -> str:
    """Status and body, or why there was none."""
    if isinstance(error, HTTPError):
        return f"status {error.code}: {error.read(500).decode(errors='replace')}"
    return f"{type(error).__name__}: {error}"
