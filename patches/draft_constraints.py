# SPDX-License-Identifier: Apache-2.0
"""On the CPU, the sampling parameters of a request reach its drafts; vLLM's kernel there puts them nowhere."""

from __future__ import annotations

from typing import Any

import torch

from tokenpool.patches.base import Patch, known


def _replacement(original: Any) -> Any:
    def expand_batch_to_tokens(
        x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> torch.Tensor:
        if x.device.type != "cpu":
            return original(x, cu_num_tokens, num_tokens, replace_from, replace_to)
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
        return x.masked_fill(x == replace_from, replace_to).repeat_interleave(counts)

    return expand_batch_to_tokens


_TARGET = "vllm.v1.sample.rejection_sampler:expand_batch_to_tokens"

PATCH = Patch(
    name="draft_constraints",
    target=_TARGET,
    hashes=known(
        v0_32_0="ef896c2fe058ae7033bbb8916d1917c91e5f3724a66adf5a7e168e544449384d",
        v0_29_0="66705fcbad69285d9d91eda5272cea54e4aabf0f58e2db24e5eba1282bf03848",
    ),
    reason=(
        "on the CPU its kernel writes into a copy, and temperature, top-k and top-p of drafts are what was in memory: "
        "in a batch with a sampled request all get wrong tokens, greedy ones too"
    ),
    removal="vLLM's CPU kernel for it writes to its output",
    sites=(_TARGET,),
    replacement=_replacement,
)
