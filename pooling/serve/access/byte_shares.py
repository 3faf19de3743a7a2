# SPDX-License-Identifier: Apache-2.0
"""A budget of bytes that tenants share without a fixed part for each. Imports no vLLM."""

from __future__ import annotations

import threading
from collections import Counter


class ByteShares:
    """Lets a tenant have at most as much as it leaves free.

    So one alone can have half of the budget, two a third each, and whoever comes next always finds some. Source:
    dynamic queue length thresholds (Choudhury and Hahne, 1998) with the factor 1. Of what has no owner, '', all may be
    taken. For any thread.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        """Taken by all."""
        self._own: Counter[str] = Counter()
        self._lock = threading.Lock()

    def fits(self, owner: str, num_bytes: int) -> bool:
        """Whether `owner` may have so many more."""
        with self._lock:
            return self._fits(owner, num_bytes)

    def take(self, owner: str, num_bytes: int) -> bool:
        """Take them, if they fit; returns whether they do."""
        with self._lock:
            if not self._fits(owner, num_bytes):
                return False
            self.num_bytes += num_bytes
            self._own[owner] += num_bytes
            return True

    def give_back(self, owner: str, num_bytes: int) -> None:
        """Of those that were taken."""
        with self._lock:
            self.num_bytes -= num_bytes
            self._own[owner] -= num_bytes
            if not self._own[owner]:
                del self._own[owner]

    def _fits(self, owner: str, num_bytes: int) -> bool:
        left = self.max_bytes - self.num_bytes - num_bytes
        if not owner or not self._own[owner]:
            return left >= 0
        return left >= self._own[owner] + num_bytes
