# SPDX-License-Identifier: Apache-2.0
"""Compares what a kind gave in the pool with what it gave in plain vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

NOISE = 1e-6
"""Vectors and scores that differ by less are those of another order of adding."""
FEW_TOKENS = 5
"""A stream with fewer different ones has collapsed: it would be equal whatever became of its KV."""

Results = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a comparison came to."""

    equal: int
    """Requests with the same tokens and logprobs, or the same vector."""
    close: int
    """Further requests with the same tokens whose logprobs, or whose vector, differ by no more than `NOISE`."""
    total: int
    largest: float
    """Largest difference of a logprob or of an entry of a vector, where tokens are the same."""

    @property
    def same(self) -> bool:
        """Whether all requests are equal or close."""
        return self.equal + self.close == self.total > 0


def compare(want: Results, got: Results) -> Verdict:
    """Compare request by request; one that was preempted counts by its tokens."""
    equal = close = 0
    largest = 0.0
    for name, wanted in want.items():
        found = got.get(name)
        if found is None or wanted["tokens"] != found["tokens"] or not (wanted["tokens"] or wanted["embedding"]):
            continue
        difference = max(_difference(wanted[key], found[key]) for key in ("logprobs", "embedding"))
        largest = max(largest, difference)
        equal += difference == 0 or bool(found["preempted"] or wanted["preempted"])
        close += 0 < difference <= NOISE
    return Verdict(equal, close, len(want), largest)


def _difference(want: list[Any], got: list[Any]) -> float:
    wanted, found = np.asarray(want, np.float64), np.asarray(got, np.float64)
    if wanted.shape != found.shape or np.isnan(found).any():
        return float("inf")
    return float(np.abs(wanted - found).max()) if wanted.size else 0.0


def distinct_tokens(results: Results) -> int | None:
    """Different tokens of the stream that has the fewest; None if there are only vectors."""
    counts = [len(set(result["tokens"])) for result in results.values() if result["tokens"]]
    return min(counts) if counts else None
