# SPDX-License-Identifier: Apache-2.0
"""Whether a request may come in: asked once per request, when its key, tenant and model are known.

In this order: is the model there; did the tenant's requests kill hosts; do the tenant's limits leave room; does the
model's queue; and then the request waits for its turn in the line before the model. Imports no vLLM.
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
from tokenpool.serve.access.refused import RefusedError
from tokenpool.serve.access.tenant_call import CURRENT_CALL, Call
from tokenpool.serve.access.tenants import Account

_TRY_AGAIN_LATER = 1013
"""Close code of a websocket to a model that is not there."""


class Entered(Protocol):
    """The model that a request is for."""

    name: str
    gate: Gate
    inflight: int

    @property
    def is_resident(self) -> bool:
        """Whether it takes requests."""
        ...

    def refusal(self) -> Response:
        """The answer while it does not."""
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

    @property
    def can_wait(self) -> bool:
        """Whether it is held in the line; what a websocket asks the engine for waits when it comes."""
        return self.scope["type"] == "http" and self.scope["method"] == "POST"


@dataclass(frozen=True, slots=True)
class Entry:
    """A request that has come in."""

    ticket: Ticket
    call: Call | None
    """On its tenant's account; None in a pool without tenants."""

    def dressed(self, send: Send) -> Send:
        """`send` with the tenant's limits in the head of the answer."""
        call = self.call
        if call is None:
            return send

        async def dress(message: Message) -> None:
            call.dress(message)
            await send(message)

        return dress


class Access:
    """Lets requests in."""

    def __init__(self, blame: Callable[[Scope, str], Response | None]) -> None:
        """`blame` gives the answer that refuses a request of a tenant whose requests killed hosts."""
        self._blame = blame

    @asynccontextmanager
    async def enter(
        self, model: Entered, account: Account | None, asked: Asked, receive: Receive
    ) -> AsyncIterator[Entry | None]:
        """Have a request in for as long as the block runs; None if its client has gone away while it waited.

        Raises RefusedError when it may not come in.
        """
        if not model.is_resident:
            raise RefusedError(model.refusal(), close_code=_TRY_AGAIN_LATER)
        with account.exclusive() if account is not None else nullcontext():
            ticket, call = self._take_in(model, account, asked)
        try:
            if call is None or await _hold(model, call, asked, receive):
                token = CURRENT_CALL.set(call)
                try:
                    yield Entry(ticket, call)
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
                raise RefusedError(refusal)
            if (refusal := account.refusal(asked.scope, model.name, asked.sequences)) is not None:
                raise RefusedError(refusal)
        ticket = model.gate.admit(asked.scope, asked.path, account.config.name if account is not None else None)
        if isinstance(ticket, Response):
            if account is not None:
                account.refused[model.name, "queue"] += 1
            raise RefusedError(ticket)
        if account is None:
            return ticket, None
        return ticket, account.begin(asked.scope, model.name, asked.num_body_bytes, asked.sequences)


async def _hold(model: Entered, call: Call, asked: Asked, receive: Receive) -> bool:
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
    if is_there and not model.is_resident:
        raise RefusedError(model.refusal())
    return is_there
