# SPDX-License-Identifier: Apache-2.0
"""The conformance battery itself: what it sends, what it compares, and what docs/http.md says of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.api.battery import CHAT, all_probes, chat
from tests.api.compare import DOCUMENT, Answer, _body, documented, shape
from tests.api.run import POOLS, compare

pytestmark = pytest.mark.cpu

PROBES = all_probes()
SAME = Answer("200", "content-type: application/json", "{}")


def test_the_battery_is_the_one_of_the_document():
    """It has the number of requests that docs/http.md tells, each under a name of its own."""
    assert f"sends {len(PROBES)} requests" in DOCUMENT.read_text()
    assert len(PROBES) == len({probe.name for probe in PROBES})


def test_every_row_of_the_document_is_about_a_request_of_the_battery():
    """A pattern that fits nothing would tell of a difference that nobody looks for."""
    rows = documented(POOLS)
    fitting = [any(row.covers(min(row.pools), probe, min(row.parts)) for probe in PROBES) for row in rows]
    assert [] == [row.requests for row, fits in zip(rows, fitting, strict=True) if not fits]


@pytest.mark.parametrize("part", ["status", "headers", "body"])
def test_a_difference_that_no_row_covers_is_counted(part, capsys):
    """A request without a row, which differs in any part, and rows whose difference is not there."""
    changed = {"status": "500", "headers": "x", "body": "x"}[part]
    other = Answer(**{name: getattr(SAME, name) for name in ("status", "headers", "body")} | {part: changed})
    probe = next(probe for probe in PROBES if probe.name == f"POST {CHAT}: seed 1")
    stale = compare([probe], [SAME], {"one": [SAME]})
    differing = compare([probe], [SAME], {"one": [other]})
    assert (1, 0) == (stale["same"], differing["same"])
    assert differing["undocumented"] == stale["undocumented"] + 1
    assert f"one: {probe.name}" in capsys.readouterr().out


def _stream(*pieces: list[str]) -> bytes:
    """The tokens of a chat in so many events."""
    events = []
    for number, tokens in enumerate(pieces):
        last = number == len(pieces) - 1
        choice: dict[str, Any] = {"index": 0, "delta": {"content": "".join(tokens)}, "finish_reason": None}
        if last:
            choice |= {"finish_reason": "length", "stop_reason": None}
        events.append({"object": "chat.completion.chunk", "choices": [choice]})
    return b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in events) + b"data: [DONE]\n\n"


def test_streams_are_alike_however_their_tokens_are_cut():
    """One event per token or all in the last one; other texts and other reasons to end differ."""
    probe = PROBES[0]
    bodies = [_body("text/event-stream", _stream(*cut), probe) for cut in ([["a"], ["b"], ["c"]], [["a", "b"], ["c"]],
                                                                           [["a", "b", "c"]])]  # fmt: skip
    assert 1 == len(set(bodies))
    assert bodies[0] != _body("text/event-stream", _stream(["a"], ["x"]), probe)
    assert bodies[0] != _body("text/event-stream", _stream(["a", "b", "c"]).replace(b"length", b"stop"), probe)


def test_logprobs_of_a_stream_are_alike_however_they_are_cut():
    """Their tokens are keys and come in lists as long as the event's text."""
    told = [{" a": -1.0}], [{" b": -2.0}]

    def stream(*pieces: list[Any]) -> bytes:
        events = [{"choices": [{"text": "x" * len(p), "logprobs": {"top_logprobs": p}}]} for p in pieces]
        return b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in events)

    bodies = stream(*told), stream(told[0] + told[1])
    assert 1 == len({_body("text/event-stream", body, PROBES[0]) for body in bodies})


def test_shapes_keep_what_has_to_be_the_same():
    """Roles, reasons and counts are compared by value, ids and times by type, equal neighbours of a list once."""
    assert {"role": "user", "id": "str", "n": ["number"]} == shape({"role": "user", "id": "x", "n": [1.5, 2]})
    assert shape(chat()) != shape(chat(model="other"))
