# SPDX-License-Identifier: Apache-2.0
"""An engine's input thread that can be told to end: vLLM's own ends with its process only.

vLLM's thread sleeps until a frontend sends something, and its sockets wait for ever for a frontend that never came to
take the engine's greeting. In the host an engine may be refused after it was built, or removed when its frontend is
gone already, and the process goes on.

Source: vllm/v1/engine/core.py, EngineCoreProc.process_input_sockets. It differs in the end, and leaves out the
data-parallel coordinator, which the pool refuses.
"""

from __future__ import annotations

import socket
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import msgspec
import zmq
from vllm.utils.network_utils import make_zmq_socket
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core import FT_UTILITY_METHOD, MultiModalCacheMissError
from vllm.v1.serial_utils import MsgpackDecoder

from tokenpool.host.curve import secured
from tokenpool.host.resume import ContinuedRequest

if TYPE_CHECKING:
    from tokenpool.host.hosted_core import HostedEngineCore

_JOIN_LIMIT_S = 1.0


class InputReceiver:
    """Puts what the frontends send into the engine's inbox; made and run on that thread, stopped from another."""

    def __init__(self, core: HostedEngineCore) -> None:
        self._core = core
        oob = core.tensor_ipc_receiver
        self._decode_add = MsgpackDecoder(ContinuedRequest, oob_tensor_provider=oob).decode
        self._decode = MsgpackDecoder(oob_tensor_provider=oob).decode
        self._bell, self._rope = socket.socketpair()  # closing the rope wakes whoever polls the bell
        self._thread = threading.current_thread()

    def stop(self) -> None:
        """End the thread; what frontends send from now on is lost.

        Waits for it, because it refers to the engine, but not for one that still says good-bye to a frontend.
        """
        self._rope.close()
        self._thread.join(_JOIN_LIMIT_S)

    def run(self, addresses: list[str], identity: bytes, ready: threading.Event) -> None:
        """Greet the frontends at `addresses` and receive until `stop`."""
        with self._bell, zmq.Context() as context, ExitStack() as stack:
            poller = zmq.Poller()
            poller.register(self._bell, zmq.POLLIN)
            greeting = msgspec.msgpack.encode(self._core._make_ready_response())
            keyed = secured(context, self._core._pool_addresses)
            for address in addresses:
                made = make_zmq_socket(keyed, address, zmq.DEALER, identity=identity, bind=False, linger=0)
                stack.enter_context(made)
                made.send(greeting)  # a frontend cannot send before it has heard from us
                poller.register(made, zmq.POLLIN)
            ready.set()
            while True:
                for source, _ in poller.poll():
                    if source == self._bell.fileno():
                        return
                    self._receive(*source.recv_multipart(copy=False))

    def _receive(self, kind: zmq.Frame, *frames: Any) -> None:
        core, request_type = self._core, EngineCoreRequestType(bytes(kind.buffer))
        if request_type == EngineCoreRequestType.ADD:
            message = self._decode_add(frames)
            try:
                request: Any = core.preprocess_add_request(message)
            except MultiModalCacheMissError as error:
                core._handle_mm_cache_miss(message, error)
                return
            except Exception:  # the client is told and the exception logged
                core._handle_request_preproc_error(message)
                return
        else:
            request = self._decode(frames)
        if request_type == EngineCoreRequestType.UTILITY and request[2] == FT_UTILITY_METHOD:
            client_index, call_id, _, args = request
            core.ft_sentinel.handle_command(client_index, call_id, args[0])
            return
        if request_type == EngineCoreRequestType.ABORT:
            core.aborts_queue.put_nowait(request)  # in both queues, as in vLLM: seen early, and in order
        core.input_queue.put_nowait((request_type, request))
