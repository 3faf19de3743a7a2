# SPDX-License-Identifier: Apache-2.0
"""What `/tokenize` answers is bounded, and refused before an answer is made of it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.serve.tokenize.protocol import TokenizeCompletionRequest
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.exceptions import VLLMValidationError

from tokenpool.serve.client import token_bounds
from tokenpool.serve.client.token_bounds import bound_token_answers

pytestmark = pytest.mark.vllm


def tokenize(monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> Any:
    """Ask for a text of so many tokens, of which ten may be listed."""

    async def nothing(*args: Any) -> None:
        return None

    async def preprocess(*args: Any, **options: Any) -> list[Any]:
        return [{"type": "token", "prompt_token_ids": [5] * num_tokens}]

    monkeypatch.setattr(token_bounds, "MAX_LISTED", 10)
    serving = ServingTokenization.__new__(ServingTokenization)
    serving._check_model, serving._maybe_get_adapters = nothing, lambda request: None  # type: ignore[assignment]
    serving.online_renderer, serving.request_logger = SimpleNamespace(preprocess_completion=preprocess), None
    serving.model_config = SimpleNamespace(max_model_len=8, is_encoder_decoder=False)
    bound_token_answers(serving)
    request = TokenizeCompletionRequest(model="m", prompt="x")
    return asyncio.run(serving.create_tokenize(request, SimpleNamespace(headers={}, state=SimpleNamespace())))


def test_as_many_tokens_as_are_allowed_are_listed(monkeypatch):
    """All of them."""
    assert [5] * 10 == tokenize(monkeypatch, 10).tokens


def test_more_tokens_are_refused(monkeypatch):
    """The error tells both numbers."""
    with pytest.raises(VLLMValidationError, match="has 11 tokens, at most 10"):
        tokenize(monkeypatch, 11)


def test_a_model_without_tokenization_has_nothing_to_bound():
    """A model may have no such route."""
    bound_token_answers(None)
