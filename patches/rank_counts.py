# SPDX-License-Identifier: Apache-2.0
"""Counts the ranks of tokens without compiling a kernel for it in the middle of a step."""

from __future__ import annotations

from typing import Any

import torch

from tokenpool.patches.base import Patch, known

ROWS = 64
"""Counted at a time: their comparison takes a byte for each token of the vocabulary."""


def _replacement(original: Any) -> Any:
    def batched_count_greater_than(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        counts = [(rows >= least).sum(-1) for rows, least in zip(x.split(ROWS), values.split(ROWS), strict=True)]
        return counts[0] if len(counts) == 1 else torch.cat(counts)

    return batched_count_greater_than


PATCH = Patch(
    name="rank_counts",
    target="vllm.v1.sample.sampler:batched_count_greater_than",
    hashes=known(v0_32_0="85869de0f00bb508e22b4995ea7d0db2be72aeb33f444922abfa6f9984ea24d6"),
    absent_in=("0.29.0",),
    reason=(
        "torch.compile builds its kernel when the first request asks for log probabilities, and again for other "
        "vocabularies: seconds on the engines' thread, in which no model of the host steps"
    ),
    removal="vLLM compiles it when the engine is built",
    sites=("vllm.v1.sample.sampler:batched_count_greater_than",),
    replacement=_replacement,
)
