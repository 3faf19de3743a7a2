# SPDX-License-Identifier: Apache-2.0
"""Prompts whose KV a simulated host keeps, so that those which begin alike need no prefill for what they share."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile

BLOCK_TOKENS = 512
"""Tokens of a block that a trace names. Source: Mooncake's traces."""


class PrefixCache:
    """KV of blocks by model and name, the least recently used go first.

    It lies in host memory, as tokenpool's does, and survives changes of model: a hit is copied to the device. With
    `is_on_device` a hit costs no copy: an instance of its own, whose weights never leave, keeps it there.
    """

    def __init__(self, capacity_bytes: float, *, is_on_device: bool = False) -> None:
        self.is_on_device = is_on_device
        self.hit_tokens = self.asked_tokens = 0
        """Prompt tokens that were found, and all of the prompts that were computed; whoever asks counts."""
        self._left_bytes = capacity_bytes
        self._capacity_bytes = capacity_bytes
        self._held: OrderedDict[tuple[str, int], float] = OrderedDict()

    def resize(self, capacity_bytes: float) -> None:
        """Weights took memory, or gave it back: they go first."""
        self._left_bytes += capacity_bytes - self._capacity_bytes
        self._capacity_bytes = capacity_bytes
        self._give_way(0.0)

    def find(self, model: str, blocks: Sequence[int], num_tokens: int) -> int:
        """Tokens at the begin of a prompt of `num_tokens` that need no prefill; one at least is left to compute."""
        held = self._held
        found = list(takewhile(lambda block: (model, block) in held, blocks[: (num_tokens - 1) // BLOCK_TOKENS]))
        for block in reversed(found):  # so that ends of prompts go before their begins
            held.move_to_end((model, block))
        return BLOCK_TOKENS * len(found)

    def keep(self, model: str, blocks: Sequence[int], num_tokens: int, bytes_per_token: float) -> None:
        """The KV of a prompt of `num_tokens` is there; whole blocks of it are kept."""
        nbytes = BLOCK_TOKENS * bytes_per_token
        if nbytes > self._capacity_bytes:
            return
        for block in reversed(blocks[: num_tokens // BLOCK_TOKENS]):
            if (model, block) in self._held:
                self._held.move_to_end((model, block))
                continue
            self._give_way(nbytes)
            self._held[model, block] = nbytes
            self._left_bytes -= nbytes

    def clear(self) -> None:
        """All is lost."""
        self._held.clear()
        self._left_bytes = self._capacity_bytes

    def _give_way(self, nbytes: float) -> None:
        while self._left_bytes < nbytes and self._held:
            _, freed = self._held.popitem(last=False)
            self._left_bytes += freed


def unshared_tokens(requests: Sequence[tuple[str, Sequence[int], int]]) -> list[int]:
    """Prompt tokens that no cache can have when each of `requests` comes: model, names of blocks, length.

    A bound: every block that came before is taken to be kept for ever, wherever it was computed.
    """
    cache, found = PrefixCache(math.inf), []
    for model, blocks, num_tokens in requests:
        found.append(num_tokens - cache.find(model, blocks, num_tokens))
        cache.keep(model, blocks, num_tokens, 0.0)
    return found
