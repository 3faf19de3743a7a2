# SPDX-License-Identifier: Apache-2.0
"""What a simulation serves: requests for models, and what each model costs on a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class SimRequest(NamedTuple):
    """One request, with the length that its answer is going to have."""

    arrival_s: float
    """Seconds since the begin of the workload."""
    model: str
    input_len: int
    """Prompt tokens, at least 1."""
    output_len: int
    """Tokens of the answer, at least 1; the first comes from the prefill."""
    blocks: tuple[int, ...] = ()
    """Names of the blocks of its prompt, of `prefixes.BLOCK_TOKENS` each, the last may be shorter: prompts of a model
    whose names begin alike begin alike. Empty = it shares nothing, or nobody knows."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival, and the kind of each model that may be asked for."""

    requests: Sequence[SimRequest]
    kinds: Mapping[str, str]
    """Model name -> kind, the key of its costs such as `qwen2.5-7b`; models without a request may be in it."""


class ModelCosts(NamedTuple):
    """What one kind of model takes on one kind of device (or group of `num_gpus` of them).

    prefill of a batch   prefill_s + prefill_per_token_s * sum(len) + prefill_per_token2_s * sum(len ** 2)
    decode step          step_s + step_per_request_s * requests + step_per_token_s * sum(context)
    """

    weight_bytes: int
    """On one device; with `num_gpus` > 1 the share of each."""
    kv_bytes_per_token: float
    """On one device."""
    prefill_s: float
    prefill_per_token_s: float
    prefill_per_token2_s: float
    step_s: float
    step_per_request_s: float
    step_per_token_s: float
    num_gpus: int = 1
    """Devices that one instance takes (tensor parallel)."""

    def prefill(self, num_tokens: int, squares: int) -> float:
        """Seconds of one prefill step; `squares` is the sum of len ** 2 over its prompts."""
        return self.prefill_s + self.prefill_per_token_s * num_tokens + self.prefill_per_token2_s * squares

    def step(self, num_requests: int, context_tokens: float) -> float:
        """Seconds of one decode step."""
        return self.step_s + self.step_per_request_s * num_requests + self.step_per_token_s * context_tokens
