# SPDX-License-Identifier: Apache-2.0
"""Ranks of log probabilities without a compiler: torch would run it in a step, while all models of the host wait."""

from __future__ import annotations

from typing import Any

from tokenpool.patches.base import Patch, known

_MOST_VALUES = 1 << 25
"""Of a piece whose comparison is held in memory, a byte each."""


def _replacement(original: Any) -> Any:
    import torch

    def count_not_less(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """For each row of `x`, (rows, n), how many are not less than its value of `values`, (rows, 1); int64."""
        rows = max(1, _MOST_VALUES // max(1, x.shape[1]))
        pieces = zip(x.split(rows), values.split(rows), strict=True)
        return torch.cat([(piece >= value).sum(-1) for piece, value in pieces])

    return count_not_less


PATCH = Patch(
    name="token_ranks",
    target="vllm.v1.sample.ops.logprobs:batched_count_greater_than",
    hashes=known(
        v0_32_0="85869de0f00bb508e22b4995ea7d0db2be72aeb33f444922abfa6f9984ea24d6",
        v0_29_0="85f6567d21b23b98274c081523095c12e12c4bb09f0aea797f64235e55bb2d77",
    ),
    reason=(
        "the first request for log probabilities would have it compiled in its step, 8 to 23 s on two cores, in which "
        "no model of the host steps"
    ),
    removal="vLLM compiles it when an engine is built, or not at all",
    sites=("vllm.v1.sample.sampler:batched_count_greater_than",),
    replacement=_replacement,
)
