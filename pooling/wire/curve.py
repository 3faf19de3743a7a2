# SPDX-License-Identifier: Apache-2.0
"""CURVE for engine sockets that leave the machine: encrypted, and only for who was told the frontend's public key.

The key travels with the order to load the model, and nowhere else. The engine makes a key pair of its own per socket.
"""

from __future__ import annotations

from typing import Any

import zmq

from tokenpool.wire.addresses import EngineAddresses


def secured(context: Any, addresses: EngineAddresses | None) -> Any:
    """A ZMQ context whose sockets use the keys of `addresses`; `context` itself if there are none."""
    if addresses is None or not addresses.server_key:
        return context
    return _CurveContext(context, addresses.server_key, addresses.secret_key)


class _CurveContext:
    """Sets keys before the socket is bound or connected, which vLLM's `make_zmq_socket` does at once."""

    def __init__(self, context: Any, server_key: bytes, secret_key: bytes) -> None:
        self._context = context
        self._server_key = server_key
        self._secret_key = secret_key

    def socket(self, kind: int) -> Any:
        """A socket of the frontend's side if there is a secret key, else of the engine's."""
        made = self._context.socket(kind)
        if self._secret_key:
            made.curve_server = True
            made.curve_secretkey = self._secret_key
        else:
            made.curve_publickey, made.curve_secretkey = zmq.curve_keypair()
            made.curve_serverkey = self._server_key
        return made
