# SPDX-License-Identifier: Apache-2.0
"""Keeps a request out of steps while its grammar makes the next mask, so that no other request waits for that.

One whose masks are known to take long pauses between two tokens, where it is. One whose mask turns out to be late in
the middle of a step is preempted: vLLM drops the token that it gets in this step and computes it again when the mask
is there, as after any preemption.

Where a token that is computed again would be drawn with other random numbers, none is dropped: the request is in no
step before its mask is there. So it is with a seed in vLLM's first model runner, whose generators go on with each
draw. The second runner draws by the position of the token.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from vllm.sampling_params import SamplingType
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from tokenpool.host.engine.grammar_cost import PATIENCE_S, AheadGrammar

_NEVER = 1 << 62
CAN_HOLD = "drop_stale_output" in inspect.signature(Scheduler._preempt_request).parameters and hasattr(
    Scheduler, "_handle_blocked_waiting_request"
)
"""Whether masks may be late; not in vLLM 0.29."""


class GrammarHold:
    """Stands between an engine and its scheduler; on the host loop's thread only."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._dropped: WeakKeyDictionary[Request, int] = WeakKeyDictionary()  # in which step its last one was
        self._get_bitmask = scheduler.get_grammar_bitmask
        scheduler.get_grammar_bitmask = self._get_and_drop_late
        if CAN_HOLD:
            self._is_ready = scheduler._handle_blocked_waiting_request
            scheduler._handle_blocked_waiting_request = self._is_ready_with_mask

    def schedule(self, schedule: Callable[[], Any]) -> Any:
        """Call `schedule` so that it leaves out who waits for a mask."""
        end_s = time.monotonic() + PATIENCE_S
        running = [request for request in self._scheduler.running if self._pauses(request, end_s)]
        if not running:
            return schedule()
        before = [request.next_decode_eligible_step for request in running]
        for request in running:  # vLLM's own way to let a running request pause for some steps
            request.next_decode_eligible_step = _NEVER
        try:
            return schedule()
        finally:
            for request, step in zip(running, before, strict=True):
                request.next_decode_eligible_step = step

    def _pauses(self, request: Request, end_s: float) -> bool:
        """Whether a running request is to wait for its mask outside of steps."""
        grammar = _grammar_of(request)
        if grammar is None or request.is_prefill_chunk:
            return False
        if not grammar.is_slow:
            if not self._draws_once(request):
                return False
            grammar.wait(max(0.0, end_s - time.monotonic()))  # as its step would
        return grammar.is_late or request.num_output_placeholders > 0

    def _draws_once(self, request: Request) -> bool:
        params = request.sampling_params
        is_seeded = params is not None and params.sampling_type == SamplingType.RANDOM_SEED
        return is_seeded and not self._scheduler.use_v2_model_runner

    def _is_ready_with_mask(self, request: Request) -> bool:
        """Whether a waiting request may be scheduled; vLLM skips it in this step if not.

        Not while it waits for a mask, nor in the step after that of a token that was dropped, which is forgotten then.
        """
        if not self._is_ready(request):
            return False
        grammar = _grammar_of(request)
        if grammar is None or request.status != RequestStatus.PREEMPTED:
            return True
        return not grammar.is_late and self._scheduler.current_step > self._dropped.get(request, -1) + 1

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
        self._dropped[request] = scheduler.current_step


def _grammar_of(request: Request) -> AheadGrammar | None:
    structured = request.structured_output_request if request.use_structured_output else None
    grammar = structured._grammar if structured is not None else None
    return grammar if isinstance(grammar, AheadGrammar) else None
