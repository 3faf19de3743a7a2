# SPDX-License-Identifier: Apache-2.0
"""Tells the frontend of a traced request what it waited for in the host: switches to its model, turns of others.

It goes with the request's last output, in the trace headers, which vLLM takes from the request and gives back.
"""

from __future__ import annotations

import json
from typing import Any

from tokenpool.host.engine.hosted_core import HostedEngineCore
from tokenpool.wire.trace import SINCE, WAITS, TraceLog

_MOST = 200
_DISORDER_S = 1.0
"""By how much an event may have ended before one that was recorded earlier."""


def tell_waits(core: HostedEngineCore, model: str, trace: TraceLog) -> None:
    """Let the last outputs of `core`'s traced requests say what they waited for."""
    update = core.scheduler.update_from_output

    def update_and_tell(*args: Any) -> Any:
        outputs = update(*args)
        for client_outputs in outputs.values():
            for output in client_outputs.outputs:
                headers = output.trace_headers
                if output.finish_reason is not None and headers and SINCE in headers:
                    waits = waits_of(model, trace, float(headers[SINCE]))
                    output.trace_headers = {**headers, WAITS: json.dumps(waits)}
        return outputs

    core.scheduler.update_from_output = update_and_tell


def waits_of(model: str, trace: TraceLog, since_s: float) -> list[tuple[str, float, float, str]]:
    """The switches to `model` and the turns of others that ended later than `since_s`, newest first, 200 at most.

    Each as (kind, start after `since_s`, seconds, model). Looks at the newest events only, since the loop waits for it.
    """
    found: list[tuple[str, float, float, str]] = []
    for event in trace.newest_first():
        end_s = event.start_s + event.duration_s
        if end_s < since_s - _DISORDER_S or len(found) == _MOST:
            break
        if end_s > since_s and (event.model == model) == (event.kind == "switch") and event.kind in ("switch", "turn"):
            found.append((event.kind, event.start_s - since_s, event.duration_s, event.model))
    return found
