# SPDX-License-Identifier: Apache-2.0
"""How deep a body is nested is told from its bytes, as a parser would see it, without recursion."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serve.gateway.test_router import post, two
from tokenpool.serve.http import request_body
from tokenpool.serve.http.request_body import MAX_CONTAINERS, MAX_DEPTH, MAX_VALUES, fault_of, replay

pytestmark = pytest.mark.cpu

JSON = "application/json"


def fault(body: bytes, content_type: str = JSON) -> str | None:
    return asyncio.run(fault_of(body, content_type))


def is_too_deep(body: bytes, content_type: str = JSON) -> bool:
    return "nested deeper" in (fault(body, content_type) or "")


def nested(depth: int, opening: str = "[", closing: str = "]", inner: str = "") -> bytes:
    return (opening * depth + inner + closing * depth).encode()


def depth_of(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth_of, value), default=0)
    return 0


def counts_of(value: Any) -> tuple[int, int]:
    """Arrays and objects in a value, and commas outside of its texts."""
    if not isinstance(value, list | dict):
        return 0, 0
    inner = [counts_of(each) for each in (value.values() if isinstance(value, dict) else value)]
    return 1 + sum(each[0] for each in inner), max(0, len(inner) - 1) + sum(each[1] for each in inner)


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
@given(
    values,
    st.integers(1, 6),
    st.sampled_from(["utf-8", "utf-16", "utf-32", "utf-16-le"]),
    st.booleans(),
    st.integers(1, 40),
)
def test_it_agrees_with_a_parser(value, limit, encoding, ascii_only, piece_bytes):
    """Whatever texts hold, however they are encoded and cut, the answers are those of walking the parsed value."""
    body = json.dumps(value, ensure_ascii=ascii_only).encode(encoding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request_body, "_PIECE_BYTES", piece_bytes)
        patch.setattr(request_body, "MAX_DEPTH", limit)
        assert (depth_of(value) > limit) == is_too_deep(body)
        patch.setattr(request_body, "MAX_DEPTH", 1000)
        patch.setattr(request_body, "MAX_CONTAINERS", limit)
        patch.setattr(request_body, "MAX_VALUES", 1000)
        assert (counts_of(value)[0] > limit) == ("arrays and objects" in (fault(body) or ""))
        patch.setattr(request_body, "MAX_CONTAINERS", 1000)
        patch.setattr(request_body, "MAX_VALUES", limit)
        assert (counts_of(value)[1] >= limit) == ("values" in (fault(body) or ""))


@pytest.mark.parametrize("quote", [b'"', b'"\\"', b'\\"', b'"\\'])
def test_hostile_texts_cost_linear_time(quote):
    """A megabyte of quotes that never close ends at once: quadratic work would take hours."""
    is_too_deep(b"[" * 200 + quote * 500_000, JSON)
    assert is_too_deep(b"[" * 200 + b'"' + b"]" * 200, JSON)


def test_flat_brackets_are_not_deep_but_may_be_too_many():
    """Empty arrays side by side are two levels; as many as would keep a parser busy are refused."""
    assert fault(b"[" + b"[]," * (MAX_CONTAINERS - 2) + b"[]]") is None
    assert f"more than {MAX_CONTAINERS} arrays and objects" in (fault(b"[" + b"[]," * MAX_CONTAINERS + b"[]]") or "")
    assert fault(b'["' + b"[{" * MAX_CONTAINERS + b'"]') is None


def test_numbers_may_be_many_but_not_any():
    """A prompt of a million tokens is a body; texts of commas are none of them."""
    assert fault(b"[" + b"1," * (MAX_VALUES - 1) + b"1]") is None
    assert "more than 1000000 values" in (fault(b"[" + b"1," * MAX_VALUES + b"1]") or "")
    assert fault(b'["' + b"," * MAX_VALUES + b'"]') is None


@pytest.mark.parametrize(
    "body", [b"[]        " * (1 << 18), b'{"x":"' + b"[" * 200 + b'\\"' * (1 << 20), b'"' + b"a" * (8 << 20) + b'"']
)
def test_others_have_a_turn_while_a_body_is_looked_at(body):
    """The event loop runs on between pieces of a large body, whether it is refused or not."""

    async def main() -> None:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        await fault_of(body, JSON)
        counting.cancel()
        assert turns > 1

    asyncio.run(main())


def test_a_form_is_replayed_in_pieces():
    """The app's own parser of forms gives others a turn, too: what it gets together is the body."""

    async def main() -> None:
        async def receive() -> Any:
            return {"type": "http.disconnect"}

        body = bytes(range(256)) * 1000
        replayed, messages = replay(body, receive, "multipart/form-data; boundary=x"), []
        while not messages or messages[-1]["type"] == "http.request":
            messages.append(await replayed())
        assert body == b"".join(message["body"] for message in messages[:-1])
        assert [True] * (len(messages) - 2) + [False] == [message["more_body"] for message in messages[:-1]]
        assert len(messages) > 3

    asyncio.run(main())


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
