# SPDX-License-Identifier: Apache-2.0
"""CURVE for engine sockets that leave the machine: encrypted, and only for who was told the frontend's public key.

The key travels with the call that attaches the frontend, and nowhere else. Both sides make a key pair of their own for
each connection.
"""

from __future__ import annotations

from typing import Any

import zmq

from tokenpool.wire.addresses import EngineAddresses


def secured(context: Any, addresses: EngineAddresses | None) -> Any:
    """A ZMQ context whose sockets use the keys of `addresses`; `context` itself if there are none."""
    if addresses is None or not addresses.server_key:
        return context
    return _CurveContext(context, addresses)


_NEVER_MS = 24 * 3600 * 1000
"""Until an engine tries again to reach a frontend: what was on a connection that broke is lost, so the frontend has to
ask for another one. ZMQ's own word for never, -1, lets the end of a context wait for ever (libzmq 4.3.5)."""


class _CurveContext:
    """Sets keys before the socket is bound or connected, which vLLM's `make_zmq_socket` does at once."""

    def __init__(self, context: Any, addresses: EngineAddresses) -> None:
        self._context = context
        self._addresses = addresses

    def socket(self, kind: int) -> Any:
        """A socket of the frontend's side if there is a secret key, else of the engine's."""
        made, addresses = self._context.socket(kind), self._addresses
        if addresses.secret_key:
            made.curve_server = True
            made.curve_secretkey = addresses.secret_key
            # A peer that is cut off sends nothing, not even the end of its connection.
            made.heartbeat_ivl = int(addresses.silence_s * 1e3 / 4)
            made.heartbeat_timeout = int(addresses.silence_s * 1e3 / 2)
        else:
            made.curve_publickey, made.curve_secretkey = zmq.curve_keypair()
            made.curve_serverkey = addresses.server_key
            made.reconnect_ivl = _NEVER_MS
        return made
