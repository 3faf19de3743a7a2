# SPDX-License-Identifier: Apache-2.0
"""A request with what only the pool's frontends say of it: how far another engine got, and what time it is there."""

from __future__ import annotations

import time

from vllm.v1.engine import EngineCoreRequest

from tokenpool.wire.trace import SINCE


# What vLLM has is Any for mypy, which so does not see that this is a msgspec.Struct.
class ContinuedRequest(EngineCoreRequest, array_like=True, omit_defaults=True, gc=False):  # type: ignore[call-arg]
    """An EngineCoreRequest, as first sent, with the output tokens that its client has got already.

    On the wire it is vLLM's message with more fields at the end, which nobody but a frontend of the pool can set.
    """

    delivered_token_ids: list[int] = []  # noqa: RUF012 - msgspec gives each request its own
    sent_s: float = 0.0
    """The sender's wall clock at that moment, if it is on another machine; see `to_own_clock`."""


def stamped(request: EngineCoreRequest) -> ContinuedRequest:
    """The same request for another machine, whose clock may be another one."""
    fields = {name: getattr(request, name) for name in request.__struct_fields__}
    return ContinuedRequest(**fields | {"sent_s": time.time()})


def to_own_clock(request: ContinuedRequest) -> None:
    """Shift the times of a request that has just come from another machine: its age is what it was when it was sent."""
    if not request.sent_s:
        return
    behind_s, request.sent_s = time.time() - request.sent_s, 0.0
    request.arrival_time += behind_s
    headers = request.trace_headers
    if headers and SINCE in headers:
        request.trace_headers = {**headers, SINCE: repr(float(headers[SINCE]) + behind_s)}
