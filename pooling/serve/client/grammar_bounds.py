# SPDX-License-Identifier: Apache-2.0
"""What a grammar or schema of a request may be at most, judged by its text alone, before anything compiles it.

Compilers of grammars unroll repetitions: what `^a{1,4000}$` costs grows with the square of the count, and with what is
repeated. So counts are bounded, and the sum of (count² x size of what is repeated) over a whole request. Imports no
vLLM.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

MAX_GRAMMAR_BYTES = 64 << 10
"""Characters of a grammar, a list of choices, or a schema with its keys; those of large tool sets are half of it."""
MAX_REPEATS = 1000
"""The largest count in `{m,n}`. `maxLength` and `maxItems` are not unrolled by the check and may be larger."""
MAX_UNROLLED = 4_000_000
"""Bound on the sum of count² x size, some seconds of work on a slow core; `.{1,1000}` has a quarter of it."""

_HUGE = 10**9
_REPEAT = r"\{\s*(\d+)\s*,?\s*(\d*)\s*\}"
_IN_REGEX = re.compile(rf"\\.|\[\^?\]?(?:\\.|[^\]\\])*+(?:\]|\Z)|{_REPEAT}|.", re.DOTALL)
_IN_GRAMMAR = re.compile(rf"\\.|{_REPEAT}|.", re.DOTALL)  # a bracket in quotes opens no class there
_TIMES = re.compile(r"~\s*(\d+)(?:\s*\.\.\s*(\d+))?")  # Lark's way to write a repetition
_PATTERN_KEYS = frozenset({"pattern", "regex", "grammar", "whitespace_pattern"})


def grammar_problem(constraint: Mapping[str, Any]) -> str | None:
    """Say what is too much in the fields of a request's structured output, or None; O(`MAX_GRAMMAR_BYTES`)."""
    patterns: list[tuple[str, str]] = []
    size = 0
    for key, text in _texts(constraint):
        size += len(text)
        if size > MAX_GRAMMAR_BYTES:
            return f"The grammar or schema is larger than {MAX_GRAMMAR_BYTES} characters: use a smaller one."
        if key:
            patterns.append((key, text))
    unrolled = 0
    for key, pattern in patterns:
        largest, work = _repetitions(pattern, is_grammar=key == "grammar")
        if largest > MAX_REPEATS:
            return f"A repetition in the `{key}` is above {MAX_REPEATS}: use a smaller one, or maxLength in a schema."
        unrolled += work
    if unrolled > MAX_UNROLLED:
        return (
            f"The repetitions of the grammar or schema unroll to {unrolled} steps, at most {MAX_UNROLLED} are "
            "allowed: use smaller or fewer ones, or maxLength in a schema."
        )
    return None


def _texts(constraint: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """All keys and texts of a constraint, each with the key that makes it a pattern, or none. Not recursive."""
    stack: list[tuple[str, Any]] = []
    for key, value in constraint.items():
        if key in ("json", "structural_tag") and isinstance(value, str):
            yield "", value  # counts, and so bounds what is parsed below
            try:
                stack.append((key, json.loads(value)))
            except (ValueError, RecursionError):
                continue  # the engine's own validation says what is wrong with it
        else:
            stack.append((key, value))
    while stack:
        key, value = stack.pop()
        if isinstance(value, str):
            yield (key if key in _PATTERN_KEYS else ""), value
        elif isinstance(value, dict):
            for name, below in value.items():
                yield ("pattern" if key == "patternProperties" else ""), str(name)
                stack.append((name, below))
        elif isinstance(value, list | tuple):
            yield "", "," * len(value)
            stack.extend(("", below) for below in value[:MAX_GRAMMAR_BYTES])
        elif value is not None:
            yield "", str(value)[:32]


def _repetitions(pattern: str, *, is_grammar: bool) -> tuple[int, int]:
    """The largest count in a pattern, and the sum of count² x size over its repetitions; O(characters)."""
    largest = work = 0
    if is_grammar:
        largest = max((_count(high or low) for low, high in _TIMES.findall(pattern)), default=0)
    if "{" not in pattern:
        return largest, work
    groups: list[int] = []
    size = last = 0  # of the open group before the last item, and of that item
    for match in (_IN_GRAMMAR if is_grammar else _IN_REGEX).finditer(pattern):
        token = match[0]
        if match[1] is not None:
            count = max(_count(match[1]), _count(match[2] or "0"))
            largest = max(largest, count)
            work = min(_HUGE, work + count * count * last)
            last = min(_HUGE, last * max(1, count))
        elif token == "(":
            groups.append(size + last)
            size = last = 0
        elif token == ")":
            last = max(1, size + last)
            size = groups.pop() if groups else 0
        else:
            size, last = min(_HUGE, size + last), 1
    return largest, work


def _count(digits: str) -> int:
    return int(digits) if len(digits) < 10 else _HUGE
