# SPDX-License-Identifier: Apache-2.0
"""Counts an engine's tokens, and those on time and late against its SLO."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from tokenpool.config import SLO


class TokenClock:
    """Token i of a request is due at arrival + ttft + i * tpot; clocks are wall time, as vLLM's arrival times are."""

    def __init__(self, slo: SLO | None) -> None:
        self._slo = slo
        self._requests: dict[str, tuple[float, int]] = {}  # id -> (arrival, tokens delivered)
        self.tokens = 0
        self.on_time = 0
        self.late = 0

    def start(self, request_id: str, arrival_s: float) -> None:
        """A request has come in."""
        if self._slo is not None:
            self._requests[request_id] = (arrival_s, 0)

    def forget(self, request_id: str) -> None:
        """A request ends without further tokens."""
        self._requests.pop(request_id, None)

    def count(self, outputs: Iterable[Any]) -> None:
        """Count the new tokens of one step's `EngineCoreOutput`s, delivered now."""
        now = time.time()
        for output in outputs:
            num_new = len(output.new_token_ids)
            self.tokens += num_new
            entry = self._requests.get(output.request_id)
            if entry is None or self._slo is None:
                continue
            arrival, first = entry
            due = arrival + self._slo.ttft_s + first * self._slo.tpot_s
            on_time = sum(now <= due + i * self._slo.tpot_s for i in range(num_new))
            self.on_time += on_time
            self.late += num_new - on_time
            if output.finished:
                del self._requests[output.request_id]
            else:
                self._requests[output.request_id] = (arrival, first + num_new)
