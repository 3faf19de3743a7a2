# SPDX-License-Identifier: Apache-2.0
"""What a controller decided and why: a bounded list, totals by action, and one log line each."""

from __future__ import annotations

import logging
from collections import Counter, deque
from dataclasses import asdict, dataclass
from typing import Any

logger = logging.getLogger(__name__)

_KEEP = 1000


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision or one thing that happened to the cluster."""

    seq: int
    at_s: float
    """Wall time."""
    epoch: int
    revision: int
    action: str
    reason: str
    model: str | None = None
    host: str | None = None


class DecisionLog:
    """The last 1,000 decisions, and how many there were of each action since this controller started."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self._kept: deque[Decision] = deque(maxlen=_KEEP)

    def add(self, decision: Decision) -> None:
        """Keep and log one."""
        self._kept.append(decision)
        self.totals[decision.action] += 1
        named = {"model": decision.model, "host": decision.host}
        about = "".join(f" {key}={value}" for key, value in named.items() if value)
        logger.info("%s%s epoch=%d: %s", decision.action, about, decision.epoch, decision.reason)

    def last(self, limit: int | None = None) -> list[dict[str, Any]]:
        """The newest `limit` decisions, oldest first, as plain values."""
        kept = list(self._kept)
        return [asdict(decision) for decision in (kept if limit is None else kept[-limit:] if limit else [])]
