# SPDX-License-Identifier: Apache-2.0
"""A model's life as users see it, in one table; the same words in `/v1/models`, on the status page, in `top`, metrics.

    cold ──► loading ──► ready ──► draining ──► cold, or gone
     ▲          │  ▲       │▲
     └──────────┤  │       ▼│
                ▼  │   unavailable
              failed

Where the weights of a model are, on disk, in host memory or on the device, is another matter: see `memory/states.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Life(StrEnum):
    """What a client may expect of a model."""

    COLD = "cold"
    """Known, and nothing of it is built; the first request has it built, and waits for that."""
    LOADING = "loading"
    """Being built, or about to be; requests wait."""
    READY = "ready"
    """It takes requests, wherever its weights are."""
    UNAVAILABLE = "unavailable"
    """Its host died or hangs; what was accepted waits for the next one, new requests are refused."""
    DRAINING = "draining"
    """It finishes what it has. One that is removed refuses new requests, one that gets cold keeps them waiting."""
    FAILED = "failed"
    """It could not be built, or removed, for a reason that is told; that is tried again."""


MOVES: Mapping[Life, frozenset[Life]] = {
    Life.COLD: frozenset({Life.LOADING, Life.DRAINING, Life.FAILED}),
    Life.LOADING: frozenset({Life.READY, Life.COLD, Life.UNAVAILABLE, Life.DRAINING, Life.FAILED}),
    Life.READY: frozenset({Life.UNAVAILABLE, Life.LOADING, Life.DRAINING, Life.FAILED}),
    Life.UNAVAILABLE: frozenset({Life.READY, Life.LOADING, Life.COLD, Life.DRAINING, Life.FAILED}),
    Life.DRAINING: frozenset({Life.COLD, Life.READY, Life.FAILED}),
    Life.FAILED: frozenset({Life.LOADING, Life.READY, Life.UNAVAILABLE, Life.COLD, Life.DRAINING}),
}
"""From each state those that may follow; a model that is removed is `draining` before it is gone."""


def check_move(old: Life, new: Life) -> None:
    """Raise AssertionError unless the table has this change, or it is none."""
    assert new is old or new in MOVES[old], f"a model that is {old} cannot become {new}"
