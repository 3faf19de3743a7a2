# SPDX-License-Identifier: Apache-2.0
"""Lists of sampling parameters are bounded before anything is computed of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from tokenpool.serve.access.tenant_call import CURRENT_CALL
from tokenpool.serve.client.sampling_bounds import (
    MAX_BAD_CHARS,
    MAX_BIASES,
    MAX_EXTRA,
    MAX_LISTED,
    MAX_PROMPT_LOGPROBS,
    MAX_STOP_IDS,
    refuse_long_lists,
    refuse_many_logprobs,
)
from tokenpool.serve.client.structured_check import InputProcessor, _CheckedInputProcessor

pytestmark = pytest.mark.vllm


def lists(more: int) -> list[dict[str, Any]]:
    """Each list with so many elements more than it may have."""
    return [
        {"bad_words": ["a" * (MAX_BAD_CHARS + more)]},
        {"bad_words": [f"{i:0100}" for i in range(MAX_BAD_CHARS // 100)] + ["a" * (MAX_BAD_CHARS % 100 + more)]},
        {"stop_token_ids": list(range(MAX_STOP_IDS + more))},
        {"logit_bias": {token: 1.0 for token in range(MAX_BIASES + more)}},
        {"allowed_token_ids": [5] * (MAX_LISTED + more)},
        {"extra_args": {f"k{i}": 1 for i in range(MAX_EXTRA + more)}},
        {"extra_args": {"kv_transfer_params": {"blocks": [[7] * (MAX_EXTRA - 3 + more)]}}},
    ]


@pytest.mark.parametrize("given", lists(0))
def test_as_many_as_are_allowed_are_taken(given: dict[str, Any]) -> None:
    """And none at all."""
    refuse_long_lists(SamplingParams(**given))
    refuse_long_lists(SamplingParams())


@pytest.mark.parametrize("given", lists(1))
def test_more_are_refused_before_vllm_looks_at_them(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, and with both numbers; wherever the request came from."""
    monkeypatch.setattr(InputProcessor, "_validate_params", lambda *args: pytest.fail("vLLM has looked"))
    processor = _CheckedInputProcessor.__new__(_CheckedInputProcessor)
    processor.unchecked = SimpleNamespace(_validate_params=lambda *args: pytest.fail("vLLM has looked"))  # type: ignore
    name = next(iter(given)).replace("extra_args", "vllm_xargs")
    with pytest.raises(VLLMValidationError, match=rf"{name} has \d+ .*, at most \d+ are taken"):
        processor._validate_params(SamplingParams(**given), ())


def request(num_prompt: int, **params: Any) -> Any:
    """A request with a prompt of so many tokens."""
    return SimpleNamespace(
        prompt_token_ids=[5] * num_prompt, prompt_embeds=None, sampling_params=SamplingParams(**params)
    )


@pytest.mark.parametrize(
    ("num_prompt", "params", "sequences", "is_refused"),
    [
        (MAX_PROMPT_LOGPROBS // 2, {"prompt_logprobs": 1}, 1, False),
        (MAX_PROMPT_LOGPROBS // 2 + 1, {"prompt_logprobs": 1}, 1, True),
        (MAX_PROMPT_LOGPROBS // 8, {"prompt_logprobs": 1}, 4, False),
        (MAX_PROMPT_LOGPROBS // 8 + 1, {"prompt_logprobs": 1}, 4, True),
        (MAX_PROMPT_LOGPROBS // 8 + 1, {"prompt_logprobs": 1, "n": 4}, 1, True),
        (MAX_PROMPT_LOGPROBS, {"prompt_logprobs": 0}, 1, False),
        (100, {"prompt_logprobs": -1}, 1, True),
        (MAX_PROMPT_LOGPROBS, {"logprobs": 20}, 64, False),
    ],
)
def test_log_probabilities_of_prompts_are_bounded(num_prompt, params, sequences, is_refused) -> None:
    """By all that one answer lists: tokens of the prompts times alternatives; those of answers come one by one."""
    if is_refused:
        with pytest.raises(VLLMValidationError, match="at most 65536 are listed"):
            refuse_many_logprobs(request(num_prompt, **params), sequences)
    else:
        refuse_many_logprobs(request(num_prompt, **params), sequences)


def test_the_call_tells_how_many_prompts_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one body are listed in one answer; without tenants nobody waits for them but their client."""
    made = request(MAX_PROMPT_LOGPROBS, prompt_logprobs=1)
    monkeypatch.setattr(InputProcessor, "process_inputs", lambda self, *args, **options: made)
    processor = _CheckedInputProcessor.__new__(_CheckedInputProcessor)
    assert processor.process_inputs() is made
    made = request(MAX_PROMPT_LOGPROBS // 8, prompt_logprobs=1)
    call: Any = SimpleNamespace(sequences=4)
    token = CURRENT_CALL.set(call)
    try:
        assert processor.process_inputs() is made
        call.sequences = 5
        with pytest.raises(VLLMValidationError):
            processor.process_inputs()
    finally:
        CURRENT_CALL.reset(token)


@pytest.mark.parametrize("drafter", [None, "ngram"])
def test_a_drafted_model_lists_no_chosen_tokens(drafter: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sampler would crash the step for all that are in it; other models list them."""
    monkeypatch.setattr(InputProcessor, "_validate_params", lambda *args: "taken")
    processor: Any = _CheckedInputProcessor.__new__(_CheckedInputProcessor)
    processor.speculative_config = drafter
    params = SamplingParams(logprobs=2, logprob_token_ids=[5, 6])
    if drafter is None:
        assert "taken" == processor._validate_params(params, ())
    else:
        with pytest.raises(VLLMValidationError, match="speculative"):
            processor._validate_params(params, ())
        assert "taken" == processor._validate_params(SamplingParams(logprobs=2), ())
