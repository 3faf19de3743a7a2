# SPDX-License-Identifier: Apache-2.0
"""What a stub model must write and say: pure functions of its name, its weights and the tokens so far.

The fingerprint of a token names the model and all tokens up to it. It is what lies in the KV cache for that token. The
next token is a function of the bytes that a step reads: all weights, and the KV of the whole context, or of a window.
So a byte that is stale, moved or another's changes the stream, and the right stream needs no engine to compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MASK = (1 << 64) - 1
VOCAB = 1024
FIRST_TOKEN = 3
_STEP, _TOKEN, _GROUP = 6364136223846793005, 1442695040888963407, 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a stub model is, apart from where its bytes lie."""

    name: str
    checkpoint: int
    """Which of the checkpoints it has; models of one checkpoint say the same but under another key."""
    weights_sum: int
    """Sum of all its weights, read as unsigned 64-bit numbers."""
    windows: tuple[int | None, ...]
    """Per group of layers, how many tokens back it reads; None = all."""

    @property
    def key(self) -> int:
        """Start of the model's fingerprints."""
        return int.from_bytes(self.name.encode()[:8].ljust(8, b"."), "little")


def extend(fingerprints: list[int], key: int, tokens: Sequence[int]) -> None:
    """Append the fingerprints of those of `tokens` that have none yet."""
    last = fingerprints[-1] if fingerprints else key
    for token in tokens[len(fingerprints) :]:
        last = (last * _STEP + token * _TOKEN + 1) & MASK
        fingerprints.append(last)


def of_group(fingerprints: np.ndarray, group: int) -> np.ndarray:
    """What a group of layers keeps for tokens with these fingerprints, uint64 of the same shape."""
    return fingerprints ^ np.uint64(group * _GROUP & MASK)


def next_token(weights_sum: int, kv: Sequence[np.ndarray]) -> int:
    """The token that follows a context, given the KV that each group reads of it."""
    x = weights_sum
    for values in kv:
        x = (x * _STEP + int(values.sum(dtype=np.uint64)) + len(values)) & MASK
    x ^= x >> 29
    x = (x * _GROUP) & MASK
    return FIRST_TOKEN + (x >> 32) % (VOCAB - FIRST_TOKEN)


def read_by(window: int | None, length: int) -> int:
    """The first position of a context of `length` tokens that a group with this window reads."""
    return 0 if window is None else max(0, length - window)


def stream(facts: ModelFacts, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The tokens that `facts` says after `prompt`."""
    tokens, fingerprints = list(prompt), []
    while len(tokens) < len(prompt) + num_tokens:
        extend(fingerprints, facts.key, tokens)
        values = np.array(fingerprints, np.uint64)
        kv = [of_group(values[read_by(w, len(values)) :], group) for group, w in enumerate(facts.windows)]
        tokens.append(next_token(facts.weights_sum, kv))
    return tokens[len(prompt) :]
