# SPDX-License-Identifier: Apache-2.0
"""One request of a tenant, and the sequences that an engine computes for it.

What a request costs is counted as the engine sees it: a list of prompts, or `n` answers, are as many sequences. Each
has its own place in front of the engine and in it, however many came with one HTTP request. Imports no vLLM.
"""

from __future__ import annotations

import asyncio
import math
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar
from typing import Any, Protocol

from starlette.datastructures import MutableHeaders
from starlette.types import Message

from tokenpool.policy.fairness import token_cost
from tokenpool.policy.rate_limit import TokenBucket
from tokenpool.tenant_config import TenantConfig

CURRENT_CALL: ContextVar[Call | None] = ContextVar("tokenpool_call", default=None)
"""The call that the running task works for; tasks that it starts have it too."""


def current_tenant() -> str:
    """The name of the tenant that the running task works for; empty if it works for none."""
    call = CURRENT_CALL.get()
    return call.account.config.name if call is not None else ""


class Seat(Protocol):
    """A sequence's place, given by the line in front of a model."""

    cost: float
    """The service that the sequence has had; see `policy.fairness`."""

    def begin(self) -> None:
        """It has its first token."""

    def close(self) -> None:
        """It is over; may be called twice."""


class Payer(Protocol):
    """What a call asks of its tenant's account."""

    config: TenantConfig
    usage: Any
    """By model: counts of prompt and completion tokens."""
    token_bucket: TokenBucket | None
    """Tokens per minute; None without a limit."""

    def salted(self, cache_salt: str | None) -> str | None:
        """The salt of the tenant's prefix cache."""

    def sequence_added(self, call: Call, num_live: int) -> None:
        """An engine computes one more sequence."""

    def call_ended(self, call: Call, seconds: float) -> None:
        """Nobody is busy with the call any more."""

    def limit_headers(self) -> dict[str, str]:
        """What is left of the limits."""

    async def pace(self, *, is_new: bool) -> None:
        """Wait for the limits per minute."""


class Call:
    """One request of a tenant, from when it is taken in until neither its client nor an engine is busy with it."""

    def __init__(self, account: Payer, model: str, reserved_tokens: float, sequences: int = 1) -> None:
        """`sequences` is what its body asks for."""
        self.account = account
        self.model = model
        """Name of the model in the pool."""
        self.sequences = sequences
        """What it counts for while its HTTP request goes on: what it asked for, or more if it came to have more."""
        self.is_paced = False
        """Whether each of its sequences waits for the tenant's limits per minute: those of a websocket do, which is
        open for as long as its client likes."""
        self.wait_in_line: Callable[[Call, bool], Awaitable[Seat]] | None = None
        """Waits for the place of one more sequence, which is one of many or alone; None where nothing waits."""
        self.spare: Seat | None = None
        """A place that no sequence has taken yet."""
        self.held_s = 0.0
        """How long it was held back before it went to the engine."""
        self.has_begun = False
        """Whether it has a token, or is over."""
        self.prompt_tokens = 0
        """Tokens of its prompts so far."""
        self.ended_s = math.inf
        """When its HTTP request ended, on the monotonic clock."""
        self._reserved_tokens = reserved_tokens
        self._started_s = time.monotonic()
        self._live: dict[str, weakref.ref[Any]] = {}  # the OutputProcessor of each sequence
        self._seats: dict[str, Seat] = {}
        self._costs: dict[str, float] = {}  # of those without a seat
        self._waiting: dict[str, asyncio.Task[None]] = {}
        self._num_waiting = 0
        self._tasks = 0
        self._num_seen = 0

    # -- its sequences -------------------------------------------------------------------------------

    def add_engine_request(self, request_id: str, prompt_tokens: int, processor: Any) -> None:
        """A sequence is made for this call; `processor` is the OutputProcessor that has its state."""
        self._give_back_reserve()
        if request_id not in self._live:
            self._num_seen += 1
            self._live[request_id] = weakref.ref(processor)
            self.account.sequence_added(self, len(self._live))
        self.prompt_tokens += prompt_tokens
        self.account.usage[self.model].prompt_tokens += prompt_tokens
        self._charge(request_id, prompt_tokens, 0)

    async def admit(self, request_id: str) -> None:
        """Wait until the engine may have the sequence."""
        if self.is_paced:
            await self.account.pace(is_new=self._num_seen > 1 and request_id not in self._seats)
        if request_id in self._seats:
            return  # more input for it
        seat, self.spare = self.spare, None
        if seat is None and self.wait_in_line is not None:
            of_many = self.sequences > 1 or self.has_others
            self._num_waiting += 1
            try:
                seat = await self.wait_in_line(self, of_many)
            finally:
                self._num_waiting -= 1
        if seat is not None and request_id in self._live:
            seat.cost += self._costs.pop(request_id, 0.0)
            self._seats[request_id] = seat
        elif seat is not None:  # it was aborted meanwhile
            seat.close()

    @property
    def has_others(self) -> bool:
        """Whether a sequence that comes now is a further one: others have a place, or wait for one."""
        return bool(self._seats) or self._num_waiting > 0

    def wait_beside(self, request_id: str, waits: Coroutine[Any, Any, None]) -> None:
        """Let a sequence wait while its call goes on, for as long as it is not over."""
        task = self._waiting[request_id] = asyncio.create_task(waits)
        task.add_done_callback(lambda _: self._waiting.pop(request_id, None))

    def put_out(self, request_id: str, num_tokens: int) -> None:
        """Tokens, or an embedding, have come from the engine."""
        self.account.usage[self.model].completion_tokens += num_tokens
        self._charge(request_id, 0, num_tokens)
        self.has_begun = True
        if seat := self._seats.get(request_id):
            seat.begin()

    def end(self, request_id: str) -> None:
        """A sequence is over, however it ended."""
        self._live.pop(request_id, None)
        self._costs.pop(request_id, None)
        if task := self._waiting.pop(request_id, None):
            task.cancel()
        if seat := self._seats.pop(request_id, None):
            seat.close()

    def _forget_gone(self) -> None:
        """Drop the sequences that no processor knows: they ended, or it did."""
        self._live = {
            request_id: ref
            for request_id, ref in self._live.items()
            if (processor := ref()) is not None and request_id in processor.request_states
        }

    # -- its end -------------------------------------------------------------------------------------

    def keep_for(self, task: asyncio.Future[Any]) -> None:
        """The call is not over before `task`, which works for it behind its client's back."""
        self._tasks += 1
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Future[Any]) -> None:
        self._tasks -= 1
        self._leave()

    def close(self) -> None:
        """Its HTTP request is over."""
        self._give_back_reserve()
        self.has_begun = True
        self.ended_s = time.monotonic()
        self.account.call_ended(self, self.ended_s - self._started_s)
        self._leave()

    def _leave(self) -> None:
        if self.ended_s == math.inf or self._tasks:
            return
        if self.spare is not None:
            self.spare.close()
            self.spare = None
        self._forget_gone()
        for request_id in self._seats.keys() - self._live.keys():
            self._seats.pop(request_id).close()

    @property
    def num_left(self) -> int:
        """What it counts for after its HTTP request has ended: a response with `background` goes on."""
        self._forget_gone()
        return max(len(self._live), 1 if self._tasks else 0)

    def dress(self, message: Message) -> None:
        """Put the limits and what is left of them into the headers of the answer."""
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in self.account.limit_headers().items():
                headers[name] = value

    def _charge(self, request_id: str, prompt_tokens: int, completion_tokens: int) -> None:
        cost = token_cost(prompt_tokens, completion_tokens)
        if seat := self._seats.get(request_id):
            seat.cost += cost
        else:
            self._costs[request_id] = self._costs.get(request_id, 0.0) + cost
        if bucket := self.account.token_bucket:
            bucket.take(time.monotonic(), prompt_tokens + completion_tokens)

    def _give_back_reserve(self) -> None:
        reserved, self._reserved_tokens = self._reserved_tokens, 0.0
        if reserved and (bucket := self.account.token_bucket):
            bucket.take(time.monotonic(), -reserved)
