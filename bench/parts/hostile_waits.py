# SPDX-License-Identifier: Apache-2.0
"""Bodies that are let in, and whose cost comes after that: texts for the tokenizer, and grammars between steps."""

from __future__ import annotations

import json
from collections.abc import Callable

from bench.parts.hostile_bodies import CHAT, COMPLETIONS, MODEL, TOKENIZE, Body, Draw, chat, completion

_MIB = 1 << 20


def long_texts(draw: Draw) -> Body:
    """Texts of many megabytes, which become tokens for seconds and whose tokens nobody wants."""
    word = draw.choice(["a", "a b ", "\n", "word ", "é", "🙂", "a1-", "\t \t"])
    size = draw.choice([2, 8, 8, 16]) * _MIB
    text = word * (size // len(word.encode()))
    path, body = draw.choice(
        [
            (TOKENIZE, {"model": MODEL, "prompt": text}),
            (TOKENIZE, {"model": MODEL, "prompt": text, "return_token_strs": True}),
            (TOKENIZE, chat(messages=[{"role": "user", "content": text}])),
            ("/v1/messages/count_tokens", chat(messages=[{"role": "user", "content": text}])),
            (COMPLETIONS, completion(prompt=text)),
            (COMPLETIONS, completion(prompt=text, truncate_prompt_tokens=8)),
            (CHAT, chat(messages=[{"role": "user", "content": text}], truncate_prompt_tokens=8)),
        ]
    )
    return path, json.dumps(body, ensure_ascii=False).encode()


def slow_grammars(draw: Draw) -> Body:
    """Small forms of an answer for which the engine computes longer with each token."""
    inner, most = draw.choice([".", ".", "[^x]", "(a|.)", "\\w?."]), draw.choice([8, 15, 20, 20])
    pattern = f"{inner}{{1,{most}}}"
    for _ in range(draw.choice([1, 2, 2])):
        pattern = f"({pattern}){{1,{most}}}"
    schema = {"type": "string", "pattern": f"^{pattern}$"}
    form = draw.choice([{"regex": pattern}, {"regex": pattern}, {"json": schema}])
    path, body = draw.choice([(CHAT, chat()), (COMPLETIONS, completion())])
    more = {"structured_outputs": form, "max_tokens": draw.choice([20, 60, 200]), "ignore_eos": True}
    return path, json.dumps(body | more | {"stream": draw.random() < 0.5}).encode()


def long_ids(draw: Draw) -> Body:
    """An id that would go to the engine, and come back with each of many tokens."""
    path, body = draw.choice([(CHAT, chat()), (COMPLETIONS, completion())])
    size = draw.choice([1_000, 100_000, 4 * _MIB])
    more = {"request_id": "x" * size, "stream": True, "max_tokens": 200, "ignore_eos": True}
    return path, json.dumps(body | more).encode()


WAITS: dict[str, Callable[[Draw], Body]] = {
    "long_texts": long_texts,
    "slow_grammars": slow_grammars,
    "long_ids": long_ids,
}
"""Kinds whose cost comes later."""
