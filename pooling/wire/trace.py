# SPDX-License-Identifier: Apache-2.0
"""What the device did when: turns, switches and copies of the recent past, as a Chrome/Perfetto trace."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

_HOST_TRACK = 0

SINCE = "tokenpool-since"
"""Trace header of a request: when it came, in wall-clock seconds. Requests without it are not looked at."""
WAITS = "tokenpool-waits"
"""Trace header of the last output: a list of [kind, seconds from `SINCE` to its start, seconds, model] in JSON."""


class Event(NamedTuple):
    """One span on a model's track; times are wall-clock seconds."""

    start_s: float
    duration_s: float
    kind: str
    """`turn`, `switch`, or a kind of copy or eviction, such as `weights_in`."""
    model: str
    details: dict[str, Any]


class TraceLog:
    """The last `capacity` events; written on the host loop's thread, a few per switch, none per step."""

    def __init__(self, capacity: int = 20_000) -> None:
        self._events: deque[Event] = deque(maxlen=capacity)

    def record(self, kind: str, model: str, start_s: float, end_s: float, **details: Any) -> None:
        """Add one span."""
        self._events.append(Event(start_s, max(0.0, end_s - start_s), kind, model, details))

    def events(self, since_s: float = 0.0) -> list[Event]:
        """The kept events that ended at `since_s` or later, in the order in which they were recorded."""
        return [event for event in self._events if event.start_s + event.duration_s >= since_s]

    def newest_first(self) -> Iterator[Event]:
        """The kept events, the last recorded one first."""
        return reversed(self._events)


def chrome_trace(events: Iterable[Event]) -> dict[str, Any]:
    """Events in the Trace Event Format of chrome://tracing and Perfetto, one track per model.

    Some 4 us per event, so it is no work for the host loop's thread when the log is full.
    Source: "Trace Event Format", complete events (`ph: X`), times in microseconds.
    """
    return chrome_traces({"tokenpool host": events})


def chrome_traces(events_of: Mapping[str, Iterable[Event]]) -> dict[str, Any]:
    """The events of several hosts in one trace: each host is a process of its own, in the order given."""
    parts = [_of_host(pid, host, list(events)) for pid, (host, events) in enumerate(events_of.items(), 1)]
    return {"traceEvents": [entry for part in parts for entry in part], "displayTimeUnit": "ms"}


def _of_host(pid: int, host: str, events: list[Event]) -> list[dict[str, Any]]:
    tracks: dict[str, int] = {}
    for event in events:
        tracks.setdefault(event.model, len(tracks) + _HOST_TRACK + 1)
    named = [_metadata("process_name", pid, _HOST_TRACK, host)]
    named += [_metadata("thread_name", pid, track, model) for model, track in tracks.items()]
    spans = [
        {
            "name": event.kind,
            "cat": "turn" if event.kind == "turn" else "switch",
            "ph": "X",
            "ts": round(event.start_s * 1e6, 1),
            "dur": round(event.duration_s * 1e6, 1),
            "pid": pid,
            "tid": tracks[event.model],
            "args": {"model": event.model, **event.details},
        }
        for event in events
    ]
    return named + spans


def _metadata(name: str, pid: int, track: int, value: str) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": pid, "tid": track, "args": {"name": value}}
