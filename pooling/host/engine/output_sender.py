# SPDX-License-Identifier: Apache-2.0
"""Sends an engine's outputs from the thread that made them, instead of handing them to vLLM's output thread.

In vLLM the engine core mostly waits for its worker process, so an output thread gets the interpreter at once. In the
host the next model's step follows at once, and the thread would wait for the interpreter lock, up to many steps when
steps are short. Encoding costs some 20 us, sending is done by ZMQ's own thread.
"""

from __future__ import annotations

import threading
from typing import Any

import zmq
from vllm.utils.network_utils import make_zmq_socket
from vllm.v1.engine import EngineCoreOutputs, UtilityOutput
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.serial_utils import MsgpackEncoder

from tokenpool.process.affinity import unpinned
from tokenpool.wire.addresses import EngineAddresses
from tokenpool.wire.curve import secured

_LINGER_MS = 4000


class OutputSender:
    """Stands in for EngineCoreProc's `output_queue`; usable from any thread."""

    def __init__(self, addresses: EngineAddresses) -> None:
        self._lock = threading.Lock()
        self._encoder = MsgpackEncoder()
        with unpinned():
            self._context = zmq.Context()
        self._sockets: dict[int, zmq.Socket[bytes]] = {}  # by client index
        for index, address in enumerate(addresses.outputs):
            self._connect(index, address, addresses)

    def attach(self, client_index: int, addresses: EngineAddresses) -> None:
        """Send one more frontend what is for it; `addresses` are its own."""
        with self._lock:
            self._drop(client_index)
            self._connect(client_index, addresses.outputs[0], addresses)

    def detach(self, client_index: int) -> None:
        """Send that frontend nothing any more."""
        with self._lock:
            self._drop(client_index)

    def _connect(self, client_index: int, address: str, keys: EngineAddresses) -> None:
        with unpinned():
            context = secured(self._context, keys)
            self._sockets[client_index] = make_zmq_socket(context, address, zmq.PUSH, linger=_LINGER_MS)

    def _drop(self, client_index: int) -> None:
        if socket := self._sockets.pop(client_index, None):
            socket.close(0)

    def put_nowait(self, item: Any) -> None:
        """Send (client index, EngineCoreOutputs), or with ENGINE_CORE_DEAD tell all clients and close.

        What is for a frontend that is gone is dropped.
        """
        with self._lock:
            if item == EngineCoreProc.ENGINE_CORE_DEAD:
                for socket in self._sockets.values():
                    socket.send(item)
                self._close(_LINGER_MS)
            elif client := self._sockets.get(item[0]):
                outputs = item[1]
                outputs.engine_index = 0
                client.send_multipart(self._encode(outputs), copy=False)

    def _encode(self, outputs: EngineCoreOutputs) -> Any:
        """Encode outputs; what no message can carry of a utility call's answer is told to its caller."""
        try:
            return self._encoder.encode(outputs)
        except Exception as error:  # of any type's making
            if outputs.utility_output is None:
                raise
            call_id, message = outputs.utility_output.call_id, f"its answer cannot be sent: {error}"
            outputs.utility_output = UtilityOutput(call_id, failure_message=message)
            return self._encoder.encode(outputs)

    def close(self) -> None:
        """Close without a word, for an engine that nobody knows; a context left to the collector blocks for ever."""
        with self._lock:
            self._close(0)

    def _close(self, linger_ms: int) -> None:
        for socket in self._sockets.values():
            socket.close(linger_ms)
        self._sockets = {}
        self._context.term()
