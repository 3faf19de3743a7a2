# SPDX-License-Identifier: Apache-2.0
"""What the requests of an engine wait for, told by the component that owns it.

A step helps a request that waits for memory or for its turn. It does not help one whose grammar is being compiled or
whose client has still to send something: a model with no other requests is not stepped, and not brought onto the
device, before that has changed. Whatever else vLLM makes a request wait for may need steps, so those models are
stepped now and then.
"""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import Request, RequestStatus


class WaitReason(StrEnum):
    """Why a request of an engine does not run."""

    TURN = "turn"
    """It runs, or is scheduled, as soon as its model steps and memory allows."""
    GRAMMAR = "grammar"
    """The grammar of its structured output is being compiled on another thread."""
    INPUT = "input"
    """Its client has not sent the rest of a streamed prompt."""
    KV = "kv"
    """Its KV is on its way from elsewhere."""
    OTHER = "other"
    """Something that only vLLM's scheduler knows."""


_NO_STEP_HELPS = frozenset({WaitReason.GRAMMAR, WaitReason.INPUT})


def wait_reason(scheduler: Any, request: Request) -> WaitReason:
    """What a request waits for; it may have come since vLLM's scheduler looked last."""
    status = request.status
    if status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR:
        asked = request.structured_output_request
        return WaitReason.TURN if asked is None or asked.is_grammar_ready else WaitReason.GRAMMAR
    if status == RequestStatus.WAITING_FOR_STREAMING_REQ:
        return WaitReason.INPUT
    if status == RequestStatus.WAITING_FOR_REMOTE_KVS:
        return WaitReason.KV
    return WaitReason.OTHER if scheduler._is_blocked_waiting_status(status) else WaitReason.TURN


def is_blocked(core: Any) -> bool:
    """Whether no step of the engine could help any of its requests; O(requests that are blocked)."""
    scheduler = core.scheduler
    if core.batch_queue or core.deferred or scheduler.has_finished_requests():
        return False
    return all(wait_reason(scheduler, request) in _NO_STEP_HELPS for request in scheduler.requests.values())


def is_paused(core: Any) -> bool:
    """Whether an operator has paused the engine: its waiting requests get nothing until it is resumed."""
    return core.scheduler._pause_state is not PauseState.UNPAUSED


def count_waits(core: Any) -> dict[str, int]:
    """Requests by what they wait for, those that run under `turn`; for state."""
    scheduler = core.scheduler
    return dict(Counter(wait_reason(scheduler, request).value for request in scheduler.requests.values()))
