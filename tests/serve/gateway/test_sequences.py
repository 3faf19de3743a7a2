# SPDX-License-Identifier: Apache-2.0
"""The sequences of a request are known from its body, on every route that takes several prompts or answers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpool.serve.access.sequences import count_sequences

pytestmark = pytest.mark.cpu

TURN = {"role": "user", "content": ["several", "parts"]}


@pytest.mark.parametrize(
    ("count", "body"),
    [
        (1, {"prompt": "hello"}),
        (1, {"prompt": [1, 2, 3]}),
        (2, {"prompt": ["a", "b"]}),
        (3, {"prompt": [[1], [2], [3]]}),
        (16_384, {"prompt": ["a"] * 1024, "n": 16}),
        (2, {"prompt_embeds": ["a", "b"]}),
        (4, {"messages": [TURN] * 9, "n": 4}),
        (3, {"messages": [[TURN], [TURN, TURN], [TURN]]}),
        (6, {"messages": [[TURN], [TURN]], "n": "3"}),
        (3, {"messages": [TURN], "n": 3.0}),
        (1, {"input": "hello"}),
        (1, {"input": [1, 2, 3]}),
        (1, {"input": [TURN, TURN]}),
        (2, {"input": ["a", "b"]}),
        (2, {"input": [[1, 2], [3]]}),
        (5, {"query": "q", "documents": ["d"] * 5}),
        (5, {"queries": "q", "documents": [{"content": []}] * 5}),
        (5, {"text_1": ["a"] * 5, "text_2": ["b"] * 5}),
        (7, {"query": "q", "items": [[1]] * 7}),
        (2, {"texts": ["a", "b"]}),
        (2, {"questions": {"a": {}, "b": {}}, "state": "s"}),
        (8, {"token_ids": [1, 2], "sampling_params": {"n": 8}}),
        (1, {"prompt": [], "n": 0}),
        (1, {"prompt": None, "n": None}),
        (1, {"n": -5, "prompt": "a"}),
        (1, {"n": [2], "prompt": "a"}),
        (1, {}),
        (1, []),
        (1, 7),
    ],
)
def test_a_body_tells_how_many(count, body):
    """Prompts times `n`; one list of token ids or of messages is one prompt."""
    assert count == count_sequences(json.dumps(body).encode())


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"n": 1e999}', b'{"n": NaN}', b"[" * 100_000, b'{"n": "' + b"9" * 9999 + b'"}']
)
def test_what_vllm_refuses_counts_once(body):
    """What cannot be read is refused by the app, and costs one sequence here."""
    assert 1 == count_sequences(body)


def test_encodings_that_vllm_reads_count_too():
    """UTF-16, a byte order mark and NaN change nothing."""
    body = {"prompt": ["a", "b"], "n": 2}
    text = json.dumps(body)
    assert [4] * 3 == [count_sequences(raw) for raw in (text.encode("utf-16"), text.encode("utf-8-sig"), text.encode())]
    assert 4 == count_sequences(json.dumps(body | {"temperature": float("nan")}).encode())


NAMES = st.sampled_from(["prompt", "n", "input", "sampling_params"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)


@settings(max_examples=200, derandomize=True)
@given(st.recursive(SCALARS, lambda below: st.lists(below, max_size=4) | st.dictionaries(NAMES, below)))
def test_any_body_has_a_count(body):
    """Whatever a client sends, the count is 1 or more."""
    assert count_sequences(json.dumps(body).encode()) >= 1
