# SPDX-License-Identifier: Apache-2.0
"""Whether a request may come in: asked once per request, when its key, tenant and model are known.

In this order: may anybody wait for the model; did the tenant's requests kill hosts; do the tenant's limits leave room;
does the model's queue; then the request waits until the model is loaded, and for its turn in the line before it.
Imports no vLLM.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from tokenpool.serve.access.admission import Gate, Ticket, waits_for_tokens
from tokenpool.serve.access.blamed_tenants import REASON
from tokenpool.serve.access.held_stream import HeldStream
from tokenpool.serve.access.holding import Held
from tokenpool.serve.access.refused import RefusedError
from tokenpool.serve.access.tenant_call import CURRENT_CALL, Call
from tokenpool.serve.access.tenants import Account

_TRY_AGAIN_LATER = 1013
"""Close code of a websocket to a model that is not there."""


class Entered(Held, Protocol):
    """The model that a request is for."""

    gate: Gate
    inflight: int

    @property
    def goes_on(self) -> bool:
        """Whether what came in while it was ready goes on."""
        ...


@dataclass(frozen=True, slots=True)
class Asked:
    """What matters of a request."""

    scope: Scope
    path: str
    """As vLLM's app has it."""
    num_body_bytes: int
    sequences: int
    """Prompts times n."""
    is_stream: bool = False
    """Whether the answer is a stream of events; only known while the model is not ready."""

    @property
    def can_wait(self) -> bool:
        """Whether it is held in the line; what a websocket asks the engine for waits when it comes."""
        return self.scope["type"] == "http" and self.scope["method"] == "POST"

    @property
    def may_hold(self) -> bool:
        """Whether it waits for a model that is not loaded: what only looks does not."""
        return self.can_wait or self.scope["type"] == "websocket"


@dataclass(frozen=True, slots=True)
class Entry:
    """A request that has come in."""

    ticket: Ticket
    send: Send
    """Sends the answer."""


class Access:
    """Lets requests in."""

    def __init__(self, blame: Callable[[Scope, str], Response | None]) -> None:
        """`blame` gives the answer that refuses a request of a tenant whose requests killed hosts."""
        self._blame = blame

    @asynccontextmanager
    async def enter(
        self, model: Entered, account: Account | None, asked: Asked, receive: Receive, send: Send
    ) -> AsyncIterator[Entry | None]:
        """Have a request in for as long as the block runs; None if it was answered or its client has gone away while it
        waited.

        Raises RefusedError when it may not come in.
        """
        if not model.is_ready and not (model.holds and asked.may_hold):
            raise RefusedError(model.refusal(), close_code=_TRY_AGAIN_LATER)
        with account.exclusive() if account is not None else nullcontext():
            ticket, call = self._take_in(model, account, asked)
        stream = HeldStream(_dressed(send, call), asked.path)
        try:
            if await _wait(model, call, asked, receive, stream):
                token = CURRENT_CALL.set(call)
                try:
                    yield Entry(ticket, stream)
                finally:
                    CURRENT_CALL.reset(token)
            else:
                yield None
        finally:
            ticket.close()
            if call is not None:
                call.close()

    def _take_in(self, model: Entered, account: Account | None, asked: Asked) -> tuple[Ticket, Call | None]:
        if account is not None:
            if (refusal := self._blame(asked.scope, account.config.name)) is not None:
                account.refused[model.name, REASON] += 1
                raise RefusedError(refusal, close_code=_TRY_AGAIN_LATER)
            if (refusal := account.refusal(asked.scope, model.name, asked.sequences)) is not None:
                raise RefusedError(refusal, close_code=_TRY_AGAIN_LATER)
        held = None if model.is_ready else model.hold
        ticket = model.gate.admit(asked.scope, asked.path, account.config.name if account is not None else None, held)
        if isinstance(ticket, Response):
            if account is not None:
                account.refused[model.name, "queue"] += 1
            raise RefusedError(ticket, close_code=_TRY_AGAIN_LATER)
        if account is None:
            return ticket, None
        return ticket, account.begin(asked.scope, model.name, asked.num_body_bytes, asked.sequences)


def _dressed(send: Send, call: Call | None) -> Send:
    """`send` with the tenant's limits in the head of the answer."""
    if call is None:
        return send

    async def dress(message: Message) -> None:
        call.dress(message)
        await send(message)

    return dress


async def _wait(model: Entered, call: Call | None, asked: Asked, receive: Receive, stream: HeldStream) -> bool:
    """Wait until the model is loaded, and for the call's turn; False if the client was answered or has gone."""
    try:
        if not model.is_ready and not await _hold(model, call, asked, receive, stream):
            return False
        if call is None:
            return True
        if not await _in_line(model, call, asked, receive):
            return False
        if not model.goes_on:
            raise RefusedError(model.refusal())
        return True
    except RefusedError as refused:
        if not stream.has_begun:
            raise RefusedError(refused.response, close_code=_TRY_AGAIN_LATER) from refused
        await stream.refuse(refused.response, asked.scope, receive)
        return False


async def _hold(model: Entered, call: Call | None, asked: Asked, receive: Receive, stream: HeldStream) -> bool:
    """Wait until the model is loaded; False if the client has gone."""
    tenant = call.account.config.name if call is not None else ""
    return await model.hold.wait(model, receive, stream if asked.is_stream else None, tenant)


async def _in_line(model: Entered, call: Call, asked: Asked, receive: Receive) -> bool:
    """Wait for the call's turn; False if its client has gone away meanwhile."""
    line = model.gate.line
    if line is None:
        return True
    call.wait_in_line = line.more
    if not asked.can_wait:
        return True
    model.inflight += 1
    try:
        enter = line.enter if waits_for_tokens(asked.scope, asked.path) else line.enter_aside
        is_there = await enter(call, receive)
    finally:
        model.inflight -= 1
    return is_there
