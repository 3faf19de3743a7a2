# SPDX-License-Identifier: Apache-2.0
"""The trace of several hosts keeps them apart."""

from __future__ import annotations

import pytest

from tokenpool.wire.trace import TraceLog, chrome_traces

pytestmark = pytest.mark.cpu


def test_each_host_is_a_process_of_its_own() -> None:
    """Spans of a model on two hosts have the process of their host, which has its name."""
    logs = {"node-a": TraceLog(), "node-b": TraceLog()}
    for seconds, log in enumerate(logs.values(), 1):
        log.record("turn", "chat", 10.0, 10.0 + seconds, steps=3)
    events = chrome_traces({host: log.events() for host, log in logs.items()})["traceEvents"]

    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    spans = {names[e["pid"]]: (e["args"]["model"], e["dur"]) for e in events if e["ph"] == "X"}
    assert {"node-a": ("chat", 1e6), "node-b": ("chat", 2e6)} == spans
