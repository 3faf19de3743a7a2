# SPDX-License-Identifier: Apache-2.0
"""Bounds how many tokens are made of texts.

vLLM makes all tokens of a text and counts them then. Eight megabytes take it ten seconds of a core and a gigabyte of
memory, and the event loop stands still while the tokens become a list. Here the tokens of a long text are counted in
pieces, up to as many as the request may have. An answer of `/tokenize` is made on the event loop, a token at a time: it
is bounded too.
"""

from __future__ import annotations

from typing import Any

from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.exceptions import VLLMValidationError
from vllm.renderers.base import BaseRenderer
from vllm.renderers.params import TokenizeParams
from vllm.utils.async_utils import make_async

from tokenpool.serve.client.text_lanes import LONG

MAX_LISTED = 1 << 18
"""Tokens of an answer; as many take the event loop some 60 ms."""

_PIECE_CHARS = 1 << 15
_MORE_BY_A_CUT = 16
"""Tokens that a piece may have beyond its part of the text: a cut goes through a word, or a run of spaces."""
_SURE_PART = 2
"""A text of at most so many characters for each token that it may have is not worth counting twice."""


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


def bound_texts(renderer: BaseRenderer[Any]) -> None:
    """Let a renderer refuse what has too many tokens for its request, or for the longest list of them."""
    tokenize: Any = renderer._tokenize_prompt

    def bounded(prompt: Any, params: TokenizeParams) -> Any:
        text, most = prompt["prompt"], _most_tokens(params)
        if len(text) >= LONG and len(text) > _SURE_PART * most and count_up_to(renderer.tokenizer, text, most) > most:
            message = (
                f"The text of {len(text)} characters has more tokens than a request may have here, at most {most}."
            )
            raise VLLMValidationError(message, parameter="input_tokens", value=len(text))
        return tokenize(prompt, params)

    any_renderer: Any = renderer
    any_renderer._tokenize_prompt = bounded  # pooling tasks call it in a thread
    any_renderer._tokenize_prompt_async = make_async(bounded, executor=renderer._executor)


def _most_tokens(params: TokenizeParams) -> int:
    """What a prompt may have before it is cut to size; without a cut, what the model takes."""
    most = params.max_input_tokens
    if most is None or params.truncate_prompt_tokens is not None:
        return max(MAX_LISTED, most or 0)
    return most


def count_up_to(tokenizer: Any, text: str, most: int) -> int:
    """Count a text's tokens until there are more than `most`; never more than it has."""
    count = 0
    for start in range(0, len(text), _PIECE_CHARS):
        piece = tokenizer(text[start : start + _PIECE_CHARS], add_special_tokens=False, truncation=False)
        count += max(0, len(piece["input_ids"]) - _MORE_BY_A_CUT)
        if count > most:
            break
    return count
