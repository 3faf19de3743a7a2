# SPDX-License-Identifier: Apache-2.0
"""Grammars that would take seconds to unroll are known by their text; those that people write pass."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tokenpool.serve.client.grammar_bounds import MAX_GRAMMAR_BYTES, MAX_REPEATS, grammar_problem

pytestmark = pytest.mark.cpu


def text(pattern: str) -> dict[str, Any]:
    return {"type": "string", "pattern": pattern}


def fields(count: int, schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {f"field_{i}": schema for i in range(count)}}


ORDINARY = [
    {"json": fields(40, {"type": "string", "maxLength": 100_000})},
    {"json": fields(30, text(r"^[A-Za-z0-9_-]{1,64}$"))},
    {"json": text(r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d{1,9})?Z$")},
    {"json": json.dumps(text("^.{0,1000}$"))},
    {"json": fields(1, {"enum": ["{2000}", "a{5,6000}"]})},
    {"json": {"properties": {"pattern": {"type": "integer"}}}},
    {"json": "{no json"},
    {"regex": r"(\+\d{1,3} )?[0-9]{3,14}"},
    {"regex": r"\{5000\}"},
    {"regex": "[{5000}]"},
    {"grammar": 'root ::= "a"{1,20} [0-9]{1000}'},
    {"choice": ["yes", "no"]},
    {"json_object": True},
    {"structural_tag": json.dumps({"structures": [{"begin": "<a>", "schema": text("^a{1,9}$"), "end": "</a>"}]})},
]
TOO_MUCH = [
    ({"json": text("^a{1,4000}$")}, "above 1000"),
    ({"json": text("^a{1,99999999999999999999}$")}, "above 1000"),
    ({"json": json.dumps(text("^a{1001}$"))}, "above 1000"),
    ({"json": text("^a{ 2000 , }$")}, "above 1000"),
    ({"json": {"type": "object", "patternProperties": {"^a{1,1001}$": {}}}}, "above 1000"),
    ({"json": fields(1500, text("^a{1,500}$"))}, ""),
    ({"json": fields(400, text("^a{1,500}$"))}, "unroll"),
    ({"json": text("^((a{1,100}){1,100}){1,100}$")}, "unroll"),
    ({"json": text("^(ab|cd|ef|gh|ij){1,1000}$")}, "unroll"),
    ({"json": {"anyOf": [{"items": [{"not": text("^(a{1,300}){1,300}$")}]}]}}, "unroll"),
    ({"regex": "a{1,20000}"}, "above 1000"),
    ({"regex": "(?:x[)]y){2000}"}, "above 1000"),
    ({"grammar": 'root ::= "a"{1,20000}'}, "above 1000"),
    ({"grammar": 'root ::= "[" "a"{1,20000}'}, "above 1000"),
    ({"grammar": "start: A ~ 1..5000"}, "above 1000"),
    ({"json_object": True, "whitespace_pattern": "[ ]{0,5000}"}, "above 1000"),
    ({"structural_tag": json.dumps({"format": {"type": "regex", "pattern": "a{5000}"}})}, "above 1000"),
    ({"grammar": "root ::= " + "a" * MAX_GRAMMAR_BYTES}, "larger than"),
    ({"json": {"enum": ["v" * 100] * 1000}}, "larger than"),
    ({"json": fields(10_000, {"type": "integer"})}, "larger than"),
    ({"choice": ["yes"] * 30_000}, "larger than"),
    ({"json": {"prefixItems": [[]] * 100_000}}, "larger than"),
]


@pytest.mark.parametrize("constraint", ORDINARY, ids=str)
def test_what_people_write_passes(constraint):
    """Lengths, patterns of some hundred characters, and braces that repeat nothing are allowed."""
    assert grammar_problem(constraint) is None


@pytest.mark.parametrize(("constraint", "words"), TOO_MUCH, ids=lambda value: str(value)[:60])
def test_what_unrolls_to_much_is_refused(constraint, words):
    """Counts, their products and sums, and sizes are bounded wherever a grammar can hold them."""
    problem = grammar_problem(constraint)
    assert problem is not None and words in problem


def test_the_bound_itself_passes():
    """The largest count that is allowed is the documented one."""
    assert grammar_problem({"regex": f"a{{{MAX_REPEATS}}}"}) is None
    assert grammar_problem({"regex": f"a{{{MAX_REPEATS + 1}}}"}) is not None


@pytest.mark.parametrize("piece", ["(", ")", "[", "\\", "{", "{1,", "a{1}", "[{", "{1}{1}", "((a{9}){9}"])
def test_any_text_is_judged(piece):
    """Unfinished and hostile patterns of the largest size have an answer, and no group is ever closed too often."""
    grammar_problem({"regex": piece * (MAX_GRAMMAR_BYTES // len(piece))})
