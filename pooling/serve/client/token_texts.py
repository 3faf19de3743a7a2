# SPDX-License-Identifier: Apache-2.0
"""Remembers the texts of single tokens.

vLLM decodes each token of the log probabilities by itself, on the event loop: 20 for each token of an answer, or of a
prompt. A call of the tokenizer takes 12 us, a look into a dictionary a hundredth of that.
"""

from __future__ import annotations

from typing import Any

from vllm.tokenizers.hf import ThreadSafeHFTokenizerMixin


class _Remembering:
    """Decodes lists of one token from memory; as many texts as there are tokens."""

    token_texts: dict[int, str]

    def decode(self, token_ids: Any, *args: Any, **options: Any) -> Any:
        """See the tokenizer."""
        if args or options or type(token_ids) is not list or len(token_ids) != 1 or type(token_ids[0]) is not int:
            return super().decode(token_ids, *args, **options)  # type: ignore[misc]
        text = self.token_texts.get(token_ids[0])
        if text is None:
            text = self.token_texts[token_ids[0]] = super().decode(token_ids)  # type: ignore[misc]
        return text


def remember_tokens(tokenizer: Any) -> None:
    """Let a tokenizer of a frontend, whose tokens do not change any more, remember texts; others stay as they are."""
    if isinstance(tokenizer, ThreadSafeHFTokenizerMixin):
        remembering: Any = tokenizer
        remembering.__class__ = type("RememberingTokenizer", (_Remembering, type(tokenizer)), {})
        remembering.token_texts = {}
