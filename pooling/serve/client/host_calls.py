# SPDX-License-Identifier: Apache-2.0
"""Calls to other processes of the pool from an event loop, on threads that no other work needs, for a limited time.

A process that does not answer must not hold up what else runs on the threads of `asyncio.to_thread`. And a change may
take hours, in which it waits for what this process says by further calls: that a frontend has joined, or has drained, a
model. So no call waits for the thread of another, but for questions, whose answers wait for no call of whoever asks.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from tokenpool.errors import HostError
from tokenpool.wire.control import call_host
from tokenpool.wire.messages import Address

QUESTIONS = frozenset(
    {"ask_hosts", "asleep", "check", "decisions", "host_metrics", "load", "loads", "logs", "metrics", "progress",
     "report", "state", "trace"}
)  # fmt: skip
"""What clients may ask for as often as they like."""
_FOR_QUESTIONS = ThreadPoolExecutor(32, thread_name_prefix="pool-question")


async def call_beside(address: Address, key: bytes, method: str, *args: Any, timeout_s: float | None = None) -> Any:
    """See call_host. A caller that is cancelled leaves a thread behind until the call's own limit."""
    call = partial(call_host, address, key, method, *args, timeout_s=timeout_s)
    if method in QUESTIONS:
        return await asyncio.get_running_loop().run_in_executor(_FOR_QUESTIONS, call)
    answer: Future[Any] = Future()
    try:
        threading.Thread(target=_answer, args=(answer, call), name=f"pool-call {method}", daemon=True).start()
    except RuntimeError as error:
        raise HostError(f"{method} cannot be called: {error}") from error
    return await asyncio.wrap_future(answer)


def _answer(answer: Future[Any], call: partial[Any]) -> None:
    if not answer.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:  # the caller's, whatever it is
        answer.set_exception(error)
    else:
        answer.set_result(result)
