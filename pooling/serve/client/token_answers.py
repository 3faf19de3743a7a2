# SPDX-License-Identifier: Apache-2.0
"""Bounds how many tokens an answer of `/tokenize` lists: it is made on the event loop, a token at a time."""

from __future__ import annotations

from typing import Any

from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.exceptions import VLLMValidationError

MAX_LISTED = 1 << 18
"""Tokens of an answer; as many take the event loop some 60 ms."""


class _BoundedTokenization(ServingTokenization):
    """Refuses a text with more tokens than are listed."""

    def _extract_prompt_components(self, prompt: Any) -> Any:
        found = super()._extract_prompt_components(prompt)
        if found.token_ids is not None and len(found.token_ids) > MAX_LISTED:
            message = f"The text has {len(found.token_ids)} tokens, at most {MAX_LISTED} are listed: send it in parts."
            raise VLLMValidationError(message, parameter="prompt")
        return found


def bound_token_answers(serving: ServingTokenization | None) -> None:
    """Bound what a model's tokenization, if it has one, answers."""
    if serving is not None:
        serving.__class__ = _BoundedTokenization
