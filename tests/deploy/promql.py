# SPDX-License-Identifier: Apache-2.0
"""A small reader of PromQL: which series, labels and functions an expression names, and whether it can be read at all.

It knows the part of the language that the dashboards and alerts use, and refuses everything else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

FUNCTIONS = {"absent", "deriv", "histogram_quantile", "increase", "label_values", "rate", "vector"}
AGGREGATIONS = {"max", "min", "sum"}
CLAUSES = {"by", "on", "group_left"}
OPERATORS = {"and", "or", "unless"}
_TOKEN = re.compile(
    r"\s*(?:(?P<name>[A-Za-z_:][\w:]*)|(?P<number>\d+(?:\.\d+)?)|(?P<braces>\{[^{}]*\})|(?P<window>\[[^\[\]]*\])"
    r"|(?P<sign>==|!=|<=|>=|[()<>*/+,-]))"
)
_MATCHER = re.compile(r'(\w+)(=|!=|=~|!~)"([^"]*)"')
_WINDOW = re.compile(r"\[(\d+[smhd]|\$__rate_interval)\]")


def problems(expr: str, series: Mapping[str, Sequence[str]], extra_labels: Sequence[str]) -> list[str]:
    """What is wrong with an expression; `series` gives the labels of each series that exists."""
    found: list[str] = []
    known = {label for labels in series.values() for label in labels} | set(extra_labels)
    depth, position, current, is_label_list, previous = 0, 0, None, False, ""
    while position < len(expr.rstrip()):
        match = _TOKEN.match(expr, position)
        if match is None:
            return [*found, f"cannot be read at: {expr[position:]!r}"]
        position = match.end()
        kind, text = match.lastgroup, match[match.lastgroup or 0]
        if kind == "name" and is_label_list:
            found += [] if text in known else [f"unknown label {text}"]
        elif kind == "name" and text in series:
            current = text
        elif kind == "name" and text not in FUNCTIONS | AGGREGATIONS | CLAUSES | OPERATORS and previous != ",":
            found.append(f"unknown series or function {text}")
        elif kind == "braces":
            found += _matchers(text, (*series.get(current or "", ()), *extra_labels))
        elif kind == "window":
            found += [] if _WINDOW.fullmatch(text) else [f"bad window {text}"]
        elif text == "(":
            depth += 1
            is_label_list = previous in CLAUSES
        elif text == ")":
            depth, is_label_list = depth - 1, False
            found += ["a ) too much"] if depth < 0 else []
        previous = text
    return [*found, "a ) is missing"] if depth > 0 else found


def _matchers(text: str, labels: Sequence[str]) -> list[str]:
    found = []
    for part in text[1:-1].split('",'):
        matcher = part if part.endswith('"') else part + '"'
        match = _MATCHER.fullmatch(matcher)
        if match is None:
            found.append(f"bad matcher {matcher}")
        elif match[1] not in labels:
            found.append(f"no label {match[1]}")
    return found
