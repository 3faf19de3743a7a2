# SPDX-License-Identifier: Apache-2.0
"""What of two answers has to be the same, and what docs/http.md says may differ."""

from __future__ import annotations

import http.client
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tests.api.battery import Probe

DOCUMENT = Path(__file__).parents[2] / "docs" / "http.md"
LIMIT_S = 60.0
"""For one answer."""
_SAME_HEADERS = frozenset({"content-type", "allow", "www-authenticate"})
_PRESENT_HEADERS = frozenset({"x-request-id", "retry-after", "location"})
_SAME_VALUES = frozenset(
    {"object", "type", "code", "param", "finish_reason", "stop_reason", "role", "text", "content", "model",
     "prompt_tokens", "completion_tokens", "total_tokens", "input_tokens", "output_tokens", "count", "tokens", "status"}
)  # fmt: skip
"""Keys of JSON whose scalar values are compared; of others only the type is."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said, as far as it is compared; each part is text."""

    status: str
    headers: str
    body: str

    def differences(self, other: Answer) -> dict[str, tuple[str, str]]:
        """The parts that differ, this one's and the other's."""
        parts = {part: (getattr(self, part), getattr(other, part)) for part in ("status", "headers", "body")}
        return {part: values for part, values in parts.items() if values[0] != values[1]}


def ask(port: int, probe: Probe) -> Answer:
    """Send a request to a server on this machine."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    try:
        connection.putrequest(probe.method, probe.path, skip_accept_encoding=True)
        for name, value in probe.headers.items():
            connection.putheader(name, value)
        if probe.body is not None:
            connection.putheader("Content-Length", str(len(probe.body)))
        connection.endheaders(probe.body)
        response = connection.getresponse()
        content = b"" if response.status == 101 else response.read()
    except (OSError, http.client.HTTPException) as error:
        return Answer("no answer", "", type(error).__name__)
    finally:
        connection.close()
    kind = response.getheader("content-type", "")
    return Answer(str(response.status), _headers(response), _body(kind, content, probe))


def _headers(response: http.client.HTTPResponse) -> str:
    kept = []
    for given, value in response.getheaders():
        name = given.lower()
        if name in _SAME_HEADERS or name.startswith("access-control-"):
            kept.append(f"{name}: {value}")
        elif name in _PRESENT_HEADERS:
            kept.append(f"{name}: …")
    return "; ".join(sorted(kept))


def _body(kind: str, content: bytes, probe: Probe) -> str:
    if kind.startswith("text/event-stream"):
        return _events(content)
    if not kind.startswith("application/json") or probe.path == "/openapi.json":
        return "something" if content else "nothing"
    try:
        return json.dumps(shape(json.loads(content)), sort_keys=True)
    except ValueError:
        return "no JSON"


def _events(content: bytes) -> str:
    """The texts joined, and the events in the order of their kinds, those of one kind merged.

    How many tokens are in one event depends on when they came.
    """
    merged: dict[str, Any] = {}
    texts: list[str] = []
    kind = ""
    for line in content.decode().splitlines():
        name, _, data = line.partition(": ")
        if name == "event":
            kind = data
        elif data.startswith("{"):
            value = json.loads(data)
            texts += _take_texts(value)
            key = f"{name} {kind} {value.get('object', '')}"
            merged[key] = _merge(merged.get(key), _without_pieces(shape(value)))
        elif line:
            merged.setdefault(line, None)
    told = [f"{key} {json.dumps(value, sort_keys=True)}" for key, value in merged.items()]
    return f"{''.join(texts)!r} {told}"


def _without_pieces(value: Any, key: str = "") -> Any:
    """A shape without what is told of each token of an event: scalars in lists, and all lists of logprobs."""
    if isinstance(value, dict):
        inside = {name: "logprobs" if key == "logprobs" else name for name in value}
        return {name: _without_pieces(entry, inside[name]) for name, entry in value.items()}
    if isinstance(value, list):
        kept = [_without_pieces(entry, key) for entry in value if isinstance(entry, dict) and key != "logprobs"]
        return kept if kept or not value else ["piece"]
    return value


def _merge(one: Any, two: Any) -> Any:
    """Two shapes as one: all their keys, and what is not null of either."""
    if isinstance(one, dict) and isinstance(two, dict):
        return {key: _merge(one.get(key), two.get(key)) for key in one.keys() | two.keys()}
    if isinstance(one, list) and isinstance(two, list):
        return [_merge(a, b) for a, b in itertools.zip_longest(one, two)]
    return one if two in (None, "NoneType", []) else two


def _take_texts(value: Any) -> list[str]:
    """Take the pieces of text, which are cut at other places each time, out of an event."""
    found: list[str] = []
    if isinstance(value, list):
        for entry in value:
            found += _take_texts(entry)
    elif isinstance(value, dict):
        for key, entry in value.items():
            if key in ("text", "content", "delta") and isinstance(entry, str):
                found.append(entry)
                value[key] = "text"
            else:
                found += _take_texts(entry)
    return found


def shape(value: Any, key: str = "") -> Any:
    """A JSON value with the types of its scalars in place of them, but for those that have to be the same.

    Neighbours of a list that have one shape stand once.
    """
    if isinstance(value, dict):
        return {name: shape(entry, name) for name, entry in value.items() if name != "pool"}
    if isinstance(value, list):
        shapes = [shape(entry, key) for entry in value]
        return [entry for index, entry in enumerate(shapes) if not index or entry != shapes[index - 1]]
    if key in _SAME_VALUES and not isinstance(value, float):
        return value
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


@dataclass(frozen=True, slots=True)
class Documented:
    """A row of the table of differences."""

    requests: str
    """A pattern of the names of requests."""
    pools: frozenset[str]
    parts: frozenset[str]

    def covers(self, pool: str, probe: Probe, part: str) -> bool:
        """Whether it tells of this difference."""
        return pool in self.pools and part in self.parts and fnmatchcase(probe.name, self.requests)


def documented(pools: Sequence[str]) -> list[Documented]:
    """The rows of the table in docs/http.md: request, pools, what differs, and two columns for people."""
    rows = []
    for line in DOCUMENT.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| `") or len(cells) != 5:
            continue
        named = pools if cells[1] == "all" else cells[1].split(", ")
        assert set(named) <= set(pools), f"{cells[1]!r} are no pools of the battery"
        for pattern in re.findall("`([^`]+)`", cells[0]):
            # A bracket of a name stands for itself.
            rows.append(Documented(pattern.replace("[", "[[]"), frozenset(named), frozenset(cells[2].split(", "))))
    assert rows, f"no table of differences in {DOCUMENT}"
    return rows


def report(name: str, differences: Mapping[str, tuple[str, str]]) -> str:
    """A difference for people, long parts cut around where they part."""
    lines = [name]
    for part, (plain, pool) in differences.items():
        start = next(
            (i for i, (a, b) in enumerate(zip(plain, pool, strict=False)) if a != b), min(len(plain), len(pool))
        )
        start = max(0, start - 40)
        for who, told in (("plain", plain), ("pool ", pool)):
            lines.append(f"    {part} {who} …{told[start : start + 160]!r}")
    return "\n".join(lines)
