# SPDX-License-Identifier: Apache-2.0
"""Texts of more tokens than a request may have are refused before all of their tokens are made."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.renderers.params import TokenizeParams

from tokenpool.serve.client import token_bounds
from tokenpool.serve.client.token_bounds import bound_texts, count_up_to

pytestmark = pytest.mark.vllm


class Words:
    """A tokenizer with a token for each word, or so many letters of it; notes how many letters it read."""

    def __init__(self, longest: int = 1) -> None:
        self.longest, self.num_read = longest, 0

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        self.num_read += len(text)
        return {"input_ids": [1] * sum(-(-len(word) // self.longest) for word in text.split(" ") if word)}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds of the tests: they need no megabytes."""
    monkeypatch.setattr(token_bounds, "LONG", 100)
    monkeypatch.setattr(token_bounds, "MAX_LISTED", 400)
    monkeypatch.setattr(token_bounds, "_PIECE_CHARS", 64)


def tokenize(tokenizer: Words, text: str, **params: Any) -> int:
    """The number of tokens that a bounded renderer makes of a text."""
    executor = ThreadPoolExecutor(1)
    renderer: Any = SimpleNamespace(tokenizer=tokenizer, _executor=executor)
    renderer._tokenize_prompt = lambda prompt, params: tokenizer(prompt["prompt"])
    bound_texts(renderer)
    given = TokenizeParams(**({"max_total_tokens": None} | params))

    async def ask() -> Any:
        return await renderer._tokenize_prompt_async({"prompt": text}, given)

    found = asyncio.run(ask())
    executor.shutdown()
    return len(found["input_ids"])


@pytest.mark.parametrize(
    ("params", "most"),
    [
        ({}, 400),
        ({"max_total_tokens": 150}, 150),
        ({"max_total_tokens": 150, "truncate_prompt_tokens": 8}, 400),
        ({"max_total_tokens": 900, "truncate_prompt_tokens": 8}, 900),
    ],
)
def test_a_text_of_too_many_tokens_is_read_only_so_far(params: dict[str, Any], most: int) -> None:
    """By what the request may use, or what an answer lists; the rest of the text costs nothing."""
    tokenizer = Words()
    with pytest.raises(VLLMValidationError, match=f"at most {most}"):
        tokenize(tokenizer, "a " * 1_000_000, **params)
    assert tokenizer.num_read < 10 * most + 1_000


@pytest.mark.parametrize(
    "params", [{}, {"max_total_tokens": 150}, {"max_total_tokens": 150, "truncate_prompt_tokens": 8}]
)
def test_a_long_text_of_few_tokens_is_let_through(params: dict[str, Any]) -> None:
    """However many letters it has."""
    assert 100 == tokenize(Words(longest=100), "a" * 10_000, **params)


def test_texts_that_are_not_long_are_read_once() -> None:
    """What is refused of them is vLLM's to say."""
    tokenizer = Words()
    assert 90 == tokenize(tokenizer, "a" * 90, max_total_tokens=10)
    assert tokenizer.num_read == 90


def test_a_text_that_fits_is_never_refused() -> None:
    """Random words and tokens: pieces that cut a word make more tokens of it, which does not count against it."""
    draw = random.Random(1)
    for _ in range(300):
        tokenizer = Words(draw.randint(1, 30))
        text = " ".join("a" * draw.randint(1, 40) for _ in range(draw.randint(1, 400)))
        num = len(tokenizer(text)["input_ids"])
        assert count_up_to(tokenizer, text, num) <= num
