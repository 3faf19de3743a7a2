# SPDX-License-Identifier: Apache-2.0
"""Tells when the client of a request, or of a websocket, has gone away."""

from __future__ import annotations

from starlette.types import Receive


async def until_gone(receive: Receive) -> None:
    """Return when the client has gone; what it sends meanwhile is dropped, unless `receive` keeps it."""
    while not (await receive())["type"].endswith(".disconnect"):
        pass
