# SPDX-License-Identifier: Apache-2.0
"""Bounds lists of sampling parameters that cost the event loop or an engine step by their length.

vLLM turns each of `bad_words` into tokens on the event loop before it counts them, and an engine goes through
`stop_token_ids` at every token, and through every `logit_bias` of a batch whenever the batch changes. Log
probabilities of a prompt become objects, and then JSON, on the event loop: 0.5 s for 2,000 tokens with 20 each. What
is for extensions is copied, and encoded twice.
"""

from __future__ import annotations

from collections.abc import Mapping

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from tokenpool.serve.client.token_bounds import MAX_LISTED

MAX_BAD_CHARS = 1 << 14
"""Of all `bad_words` together; vLLM takes 1,024 tokens of them."""
MAX_STOP_IDS = 1 << 10
MAX_BIASES = 1 << 12
MAX_PROMPT_LOGPROBS = 1 << 16
"""Of all prompts of a call, where there are tenants: they take the event loop 0.2 s, and 1 s where bytes are tokens."""
MAX_EXTRA = 1 << 14
"""Values of `vllm_xargs` and `kv_transfer_params`, which may name the blocks of a long prompt."""
_ALL_TOKENS = 1 << 15  # of a small vocabulary; only --max-logprobs=-1 lets clients ask for all


def refuse_long_lists(params: SamplingParams) -> None:
    """Raise VLLMValidationError if a list is longer than it may be; O(its elements)."""
    bad_words = params.bad_words or ()
    _refuse("bad_words", "characters", sum(len(word) for word in bad_words if isinstance(word, str)), MAX_BAD_CHARS)
    _refuse("stop_token_ids", "tokens", len(params.stop_token_ids or ()), MAX_STOP_IDS)
    _refuse("logit_bias", "tokens", len(params.logit_bias or ()), MAX_BIASES)
    _refuse("allowed_token_ids", "tokens", len(params.allowed_token_ids or ()), MAX_LISTED)
    _refuse("vllm_xargs", "values or more", _count_values(params.extra_args), MAX_EXTRA)


def refuse_undrafted(params: SamplingParams) -> None:
    """Raise VLLMValidationError for what crashes a step of a model with a drafter.

    Its sampler takes the log probabilities of chosen tokens for those of all.
    """
    if params.logprob_token_ids is not None:
        message = "logprob_token_ids is not supported with speculative decoding: ask for logprobs instead."
        raise VLLMValidationError(message, parameter="logprob_token_ids")


def _count_values(value: object) -> int:
    """Values in lists and mappings, at any depth; what is beyond the bound is not looked at."""
    count, stack = 0, [value]
    while stack and count <= MAX_EXTRA:
        part = stack.pop()
        if isinstance(part, Mapping | list | tuple):
            count += len(part)
            stack.extend(part.values() if isinstance(part, Mapping) else part)
    return count


def _refuse(name: str, what: str, count: int, most: int) -> None:
    if count > most:
        message = f"{name} has {count} {what}, at most {most} are taken."
        raise VLLMValidationError(message, parameter=name, value=count)


def refuse_many_logprobs(request: EngineCoreRequest, num_sequences: int) -> None:
    """Raise VLLMValidationError if the log probabilities of a call's prompts are more than one answer may list.

    `num_sequences` is how many prompts like this one the call has.
    """
    params = request.sampling_params
    if params is None or params.prompt_logprobs is None:
        return
    prompt = request.prompt_token_ids if request.prompt_token_ids is not None else request.prompt_embeds
    num_each = params.prompt_logprobs + 1 if params.prompt_logprobs >= 0 else _ALL_TOKENS
    count = len(prompt if prompt is not None else ()) * num_each * max(params.n, num_sequences)
    if count > MAX_PROMPT_LOGPROBS:
        message = f"The prompts have {count} log probabilities, at most {MAX_PROMPT_LOGPROBS} are listed: "
        message += "ask for fewer, or send the prompts in parts."
        raise VLLMValidationError(message, parameter="prompt_logprobs", value=count)
