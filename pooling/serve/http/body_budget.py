# SPDX-License-Identifier: Apache-2.0
"""Reads the bodies of requests, and bounds how many bytes of them a frontend has at a time. Imports no vLLM.

A body counts until its request is over: vLLM keeps it as long. What a tenant's limits refuse is refused before its body
is read, and bodies that are being read count as requests of the tenant.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from tokenpool.process.heap import HeapTrimmer
from tokenpool.serve.access.auth import error_response
from tokenpool.serve.access.byte_shares import ByteShares
from tokenpool.serve.access.refused import RefusedError
from tokenpool.serve.access.tenants import Account

LARGEST_BODIES = 16
"""How many bodies of the largest size a frontend has at a time; small ones may be more."""
_RETRY_AFTER_S = 2


class BodyBudget:
    """The bodies of one frontend; lives on its event loop."""

    def __init__(self, max_request_bytes: int) -> None:
        self.max_request_bytes = max_request_bytes
        self.shares = ByteShares(LARGEST_BODIES * max_request_bytes)
        """All bodies that are there; a tenant leaves room for others."""
        self._being_read: Counter[str] = Counter()  # by tenant
        self._trimmer = HeapTrimmer()

    @contextmanager
    def body(self, owner: str = "") -> Iterator[Body]:
        """One request's body, of a tenant by its name, which is gone at the end of the block."""
        body = Body(self, owner)
        try:
            yield body
        finally:
            self.shares.give_back(owner, body.num_bytes)
            self._trimmer.freed(body.num_bytes)

    @contextmanager
    def reading(self, scope: Scope, account: Account | None, model: str) -> Iterator[None]:
        """A body is read in the block; raises RefusedError if it has to wait for the tenant's others.

        `model` is its model's name, or empty if it is not known.
        """
        if account is None:
            yield
            return
        name = account.config.name
        if (refusal := account.refusal(scope, model, being_read=self._being_read[name])) is not None:
            raise RefusedError(refusal)
        self._being_read[name] += 1
        try:
            yield
        finally:
            self._being_read[name] -= 1


class Body:
    """The body of one request."""

    def __init__(self, budget: BodyBudget, owner: str = "") -> None:
        self.num_bytes = 0
        """What it takes of the budget."""
        self._budget, self._owner = budget, owner

    async def read(self, headers: Headers, receive: Receive) -> bytes | None:
        """Return the whole body, or None if the client went away. One chunk is returned without a copy.

        Raises RefusedError: 413 if it is larger than any may be, 503 if others leave too little room for it.
        """
        announced = headers.get("content-length", "")
        # 18 digits: beyond any limit, and int() refuses very long ones.
        if announced.isascii() and announced.isdigit():
            self._check_size(num_bytes := int(announced.lstrip("0")[:18] or 0))
            if not self._budget.shares.fits(self._owner, num_bytes):
                raise self._no_room()
        chunks: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            if chunk := message.get("body", b""):
                self._check_size(self.num_bytes + len(chunk))
                if not self._budget.shares.take(self._owner, len(chunk)):
                    raise self._no_room()
                chunks.append(chunk)
                self.num_bytes += len(chunk)
            if not message.get("more_body", False):
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _check_size(self, num_bytes: int) -> None:
        limit = self._budget.max_request_bytes
        if num_bytes > limit:
            message = f"The request body is larger than the limit of {limit} bytes."
            raise RefusedError(error_response(413, "RequestTooLargeError", message))

    def _no_room(self) -> RefusedError:
        shares = self._budget.shares
        message = (
            f"The bodies of other requests take {shares.num_bytes} of {shares.max_bytes} bytes here, which leaves "
            f"too little room for this one; retry after {_RETRY_AFTER_S} s."
        )
        headers = {"retry-after": str(_RETRY_AFTER_S)}
        return RefusedError(error_response(503, "ServiceUnavailableError", message, None, headers))
