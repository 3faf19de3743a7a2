# SPDX-License-Identifier: Apache-2.0
"""Texts of single tokens are those of the tokenizer, which is asked once for each."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from vllm.tokenizers import get_tokenizer
from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens
from vllm.tokenizers.hf import ThreadSafeHFTokenizerMixin, maybe_make_thread_pool

from tokenpool.demo.tiny_models import make_tiny_model
from tokenpool.serve.client.token_texts import remember_tokens

pytestmark = pytest.mark.vllm


class Told(ThreadSafeHFTokenizerMixin):
    """Notes what it is asked."""

    def __init__(self) -> None:
        self.asked: Counter[Any] = Counter()

    def decode(self, token_ids: Any, **options: Any) -> str:
        self.asked[str(token_ids), *options] += 1
        return "" if token_ids == [3] else f"{token_ids}{options}"


def test_a_token_is_decoded_once() -> None:
    """Also one without a text; lists of several, and calls with options, are the tokenizer's."""
    tokenizer, plain = Told(), Told()
    remember_tokens(tokenizer)
    asked: list[tuple[Any, dict[str, Any]]] = [
        ([5], {}), ([3], {}), ([5, 3], {}), ([], {}), (5, {}), ([5], {"skip_special_tokens": True}), ([True], {}),
        ((5,), {}),
    ]  # fmt: skip
    for _ in range(3):
        for token_ids, options in asked:
            assert tokenizer.decode(token_ids, **options) == plain.decode(token_ids, **options)
    assert {key for key, count in tokenizer.asked.items() if count == 1} == {("[5]",), ("[3]",)}
    assert all(count == 3 for key, count in tokenizer.asked.items() if key not in {("[5]",), ("[3]",)})


def test_log_probabilities_have_the_texts_that_they_had(tmp_path: Path) -> None:
    """Of each token of a real tokenizer; copies of it work too."""
    tokenizer: Any = get_tokenizer(str(make_tiny_model("llama", tmp_path / "llama")))
    ids = list(range(len(tokenizer)))
    expected = convert_ids_list_to_tokens(tokenizer, ids)
    pool: Any = maybe_make_thread_pool(tokenizer, 2)
    remember_tokens(pool)
    assert convert_ids_list_to_tokens(pool, ids) == expected == convert_ids_list_to_tokens(pool, ids)
    assert len(pool.token_texts) == len(ids)
    assert convert_ids_list_to_tokens(copy.deepcopy(pool), ids[:50]) == expected[:50]


def test_another_tokenizer_stays_as_it_is() -> None:
    """Nobody knows whether its tokens change."""
    tokenizer = object()
    remember_tokens(tokenizer)
    assert type(tokenizer) is object
