# SPDX-License-Identifier: Apache-2.0
"""How deep a body is nested is told from its bytes, as a parser would see it, without recursion."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serve.test_router import post, two
from tokenpool.serve import request_body
from tokenpool.serve.request_body import MAX_DEPTH, is_too_deep

pytestmark = pytest.mark.cpu

JSON = "application/json"


def nested(depth: int, opening: str = "[", closing: str = "]", inner: str = "") -> bytes:
    return (opening * depth + inner + closing * depth).encode()


def depth_of(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth_of, value), default=0)
    return 0


@pytest.mark.parametrize(("opening", "closing", "inner"), [("[", "]", ""), ('{"a":', "}", "1"), ('[{"a":', "}]", "0")])
def test_the_limit_is_exact(opening, closing, inner):
    """MAX_DEPTH levels pass, one more does not; pairs of brackets count as two levels."""
    levels = opening.count("[") + opening.count("{")
    most = MAX_DEPTH // levels
    assert not is_too_deep(nested(most, opening, closing, inner), JSON)
    assert is_too_deep(nested(most + 1, opening, closing, inner), JSON)
    assert not is_too_deep(b"[" + b",".join([nested(MAX_DEPTH - 1)] * 50) + b"]", JSON)


values = st.recursive(
    st.none() | st.integers() | st.text(alphabet='[]{}"\\a\n\u00e9'),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(alphabet='[]{}"\\a'), inner, max_size=4),
    max_leaves=40,
)


@settings(max_examples=300)
@given(values, st.integers(1, 6), st.sampled_from(["utf-8", "utf-16", "utf-32", "utf-16-le"]), st.booleans())
def test_it_agrees_with_a_parser(value, limit, encoding, ascii_only):
    """Whatever the texts hold and however they are encoded, the answer is that of walking the parsed value."""
    body = json.dumps(value, ensure_ascii=ascii_only).encode(encoding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request_body, "MAX_DEPTH", limit)
        assert (depth_of(value) > limit) == is_too_deep(body, JSON)


@pytest.mark.parametrize("quote", [b'"', b'"\\"', b'\\"', b'"\\'])
def test_hostile_texts_cost_linear_time(quote):
    """A megabyte of quotes that never close ends at once: quadratic work would take hours."""
    is_too_deep(b"[" * 200 + quote * 500_000, JSON)
    assert is_too_deep(b"[" * 200 + b'"' + b"]" * 200, JSON)


def test_flat_brackets_are_not_deep():
    """A million empty arrays side by side are two levels."""
    assert not is_too_deep(b"[" + b"[]," * 1_000_000 + b"[]]", JSON)


def test_forms_are_not_json():
    """The files of a form may hold any bytes."""
    assert not is_too_deep(nested(1000), "multipart/form-data; boundary=x")
    assert is_too_deep(nested(1000), "")


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 1000, 200_000])
def test_the_router_refuses_deep_bodies(depth):
    """400 in OpenAI's shape, before any app sees the body."""
    answer = post(two(), content=b'{"model": "a", "x": ' + nested(depth) + b"}")

    assert 400 == answer.status_code
    assert f"nested deeper than {MAX_DEPTH} levels" in answer.json()["error"]["message"]
