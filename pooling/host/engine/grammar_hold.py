# SPDX-License-Identifier: Apache-2.0
"""Keeps a request out of steps while its grammar makes the next mask, so that no other request waits for that.

One whose masks are known to take long pauses between two tokens, where it is. One whose mask turns out to be late in
the middle of a step is preempted: vLLM drops the token that it gets in this step and computes it again when the mask
is there, as after any preemption.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from vllm.v1.request import Request, RequestStatus

from tokenpool.host.engine.grammar_cost import AheadGrammar

_NEVER = 1 << 62


class GrammarHold:
    """Stands between an engine and its scheduler; on the host loop's thread only."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._late: dict[str, tuple[Request, int]] = {}  # preempted by `_drop_late`, and in which step
        self._get_bitmask = scheduler.get_grammar_bitmask
        scheduler.get_grammar_bitmask = self._get_and_drop_late

    def schedule(self, schedule: Callable[[], Any]) -> Any:
        """Call `schedule` so that it leaves out who waits for a mask."""
        running = [request for request in self._scheduler.running if _pauses(request)]
        waiting = self._waiting()
        if not running and not waiting:
            return schedule()
        before = [request.next_decode_eligible_step for request in running]
        for request in running:  # vLLM's own way to let a running request pause for some steps
            request.next_decode_eligible_step = _NEVER
        queue = self._scheduler.waiting
        for request in waiting:
            queue.remove_request(request)
        try:
            return schedule()
        finally:
            for request, step in zip(running, before, strict=True):
                request.next_decode_eligible_step = step
            for request in reversed(waiting):
                queue.prepend_request(request)

    def _waiting(self) -> list[Request]:
        """Preempted requests whose masks are not there, or that were in the step before: its token is forgotten."""
        found, scheduler = [], self._scheduler
        for request_id, (request, step) in list(self._late.items()):
            grammar = _grammar_of(request)
            is_waiting = request.status == RequestStatus.PREEMPTED and request in scheduler.waiting
            if is_waiting and grammar is not None and (grammar.is_late or scheduler.current_step <= step):
                found.append(request)
            else:
                del self._late[request_id]
        return found

    def _get_and_drop_late(self, scheduler_output: Any) -> Any:
        output = self._get_bitmask(scheduler_output)
        if output is not None:
            for request_id in output.structured_output_request_ids:
                request = self._scheduler.requests[request_id]
                grammar = _grammar_of(request)
                if grammar is not None and grammar.was_late:
                    grammar.was_late = False
                    self._drop_late(request)
        return output

    def _drop_late(self, request: Request) -> None:
        scheduler = self._scheduler
        if request.status != RequestStatus.RUNNING:
            return  # of a step in flight: it was preempted since
        scheduler.running.remove(request)
        scheduler._preempt_request(request, time.monotonic(), drop_stale_output=True)
        scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
        self._late[request.request_id] = request, scheduler.current_step


def _pauses(request: Request) -> bool:
    """Whether a running request is to wait for its mask outside of steps."""
    grammar = _grammar_of(request) if request.use_structured_output else None
    if grammar is None or not grammar.is_slow or request.is_prefill_chunk:
        return False
    return grammar.is_late or request.num_output_placeholders > 0


def _grammar_of(request: Request) -> AheadGrammar | None:
    structured = request.structured_output_request
    grammar = structured._grammar if structured is not None else None
    return grammar if isinstance(grammar, AheadGrammar) else None
