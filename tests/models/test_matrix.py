# SPDX-License-Identifier: Apache-2.0
"""The page of models is that of its results; a difference between pool and plain vLLM is seen and nothing hides it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tests.models import page
from tests.models.forks import _do, _wait
from tests.models.table import KINDS
from tests.models.verdict import compare, distinct_tokens

pytestmark = pytest.mark.cpu


def result(tokens: list[int], logprobs: list[float], embedding: list[float] | None = None, preempted: int = 0) -> dict:
    """What a request gave."""
    return {"tokens": tokens, "logprobs": logprobs, "embedding": embedding or [], "preempted": preempted}


def entry(**fields: object) -> dict:
    """A kind that is pooled and equal."""
    made = {
        "plain": True,
        "class": "A",
        "pooled": True,
        "same": True,
        "equal": 4,
        "close": 0,
        "total": 4,
        "alone": False,
    }
    return {**made, "distinct": 30, "weight_evictions": 3, "kv_evictions": 2, **fields}


def test_the_page_is_that_of_the_results():
    """Whoever changes one writes the other: `python -m tests.models.page`."""
    told = json.loads(page.RESULTS.read_text())
    assert page.PAGE.read_text() == page.page(told), "run python -m tests.models.page"
    assert told["result"] == page.summary(told["kinds"])
    assert set(told["kinds"]) <= set(KINDS), "the page has kinds that are not in the table"


def test_there_are_a_hundred_kinds():
    """The table is as wide as it is said to be."""
    assert len(KINDS) >= 100


def test_each_difference_counts():
    """Of tokens, of logprobs, of vectors; a missing request, NaN and another shape are differences too."""
    want = {"a": result([1, 2], [-1.0, -2.0]), "b": result([], [], [0.5, 0.25])}
    same = compare(want, want)
    assert (2, 0, 2, 0.0, True) == (same.equal, same.close, same.total, same.largest, same.same)
    for other in (
        want | {"a": result([1, 3], [-1.0, -2.0])},
        want | {"a": result([1, 2], [-1.0, -2.5])},
        want | {"b": result([], [], [0.5, 0.26])},
        want | {"b": result([], [], [0.5, float("nan")])},
        want | {"b": result([], [], [0.5])},
        want | {"b": result([], [])},
        {"a": want["a"]},
    ):
        assert not compare(want, other).same
    near = compare(want, want | {"b": result([], [], [0.5, 0.25 + 1e-8])})
    assert (1, 1, True) == (near.equal, near.close, near.same)
    assert not compare({"a": result([], [])}, {"a": result([], [])}).same, "nothing is equal to nothing"
    assert not compare({}, {}).same


def test_a_preempted_request_counts_by_its_tokens():
    """What is computed again may round otherwise."""
    want, moved = {"a": result([1], [-1.0])}, {"a": result([1], [-1.1], preempted=1)}
    assert compare(want, moved).same
    assert not compare(want, {"a": result([2], [-1.0], preempted=1)}).same


def test_the_poorest_stream_is_told():
    """One that repeats a token is found beside others; vectors have no tokens."""
    assert 1 == distinct_tokens({"a": result([1, 2, 3], []), "b": result([7, 7], [])})
    assert distinct_tokens({"a": result([], [], [0.5])}) is None


def test_the_summary_and_the_page_tell_what_is_refused_and_what_differs():
    """Each kind stands where it belongs, with its reason."""
    kinds = list(KINDS)[:4]
    entries = dict(
        zip(
            kinds,
            (
                entry(),
                entry(same=False, equal=1, largest=0.5),
                entry(pooled=False, same=None, why="no | reason"),
                {"plain": False, "why": "KeyError: x"},
            ),
            strict=True,
        )
    )
    assert "result: kinds=4 plain=3 pooled=2 equal=1 refused=1" == page.summary(entries)
    told = {"vllm": "1", "transformers": "2", "torch": "3", "result": page.summary(entries), "kinds": entries}
    text = page.page(told)
    assert f"| {kinds[0]} | A | yes | yes | 4/4 | 3 / 2 |" in text
    assert "## Not equal" in text and f"| {kinds[1]} | 1 of 4 | 0.5 |" in text
    assert f"| {kinds[2]} | no \\| reason |" in text
    assert f"| {kinds[3]} | KeyError: x |" in text


@pytest.mark.parametrize(("work", "expected"), [("good", {"x": 1}), ("bad", {"error": "ValueError: no"})])
def test_a_piece_answers_whatever_happens(tmp_path: Path, work: str, expected: dict):
    """Its answer or its error, written whole."""

    def do(piece: dict) -> dict:
        if piece["name"] == "bad":
            raise ValueError("no")
        return {"x": 1}

    answer = tmp_path / "answer.json"
    pid = os.fork()
    if pid == 0:
        _do(do, {"name": work}, answer)
    assert 0 == _wait(pid, 60)
    assert expected == json.loads(answer.read_text())


def test_a_piece_that_hangs_is_ended(tmp_path: Path):
    """Its limit passes, and nothing of it stays."""
    pid = os.fork()
    if pid == 0:
        _do(lambda piece: time.sleep(600) or {}, {"name": "slow"}, tmp_path / "answer.json")
    assert _wait(pid, 0.3) is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
