# SPDX-License-Identifier: Apache-2.0
"""An engine's input thread that can be told to end: vLLM's own ends with its process only.

vLLM's thread sleeps until a frontend sends something, and its sockets wait for ever for a frontend that never came to
take the engine's greeting. In the host an engine may be refused after it was built, or removed when its frontend is
gone already, and the process goes on.

Source: vllm/v1/engine/core.py, EngineCoreProc.process_input_sockets. It differs in the end, and leaves out the
data-parallel coordinator, which the pool refuses.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any, Protocol

import msgspec
import zmq
from vllm.utils.network_utils import make_zmq_socket
from vllm.v1.engine import EngineCoreRequest, EngineCoreRequestType
from vllm.v1.engine.core import FT_UTILITY_METHOD, MultiModalCacheMissError
from vllm.v1.request import Request
from vllm.v1.serial_utils import MsgpackDecoder

from tokenpool.errors import HostError
from tokenpool.host.engine.grammar_wait import pending_grammar
from tokenpool.wire.addresses import EngineAddresses
from tokenpool.wire.continued_request import ContinuedRequest, to_own_clock
from tokenpool.wire.curve import secured

_JOIN_LIMIT_S = 1.0


class Core(Protocol):
    """What is received for: a HostedEngineCore, of which these are not vLLM's."""

    _pool_addresses: EngineAddresses | None
    """Where the first frontend is."""

    def __getattr__(self, name: str) -> Any:
        """What EngineCoreProc has."""

    def make_request(self, request: EngineCoreRequest) -> tuple[Request, int]:
        """vLLM's request of a message."""

    def restore(self, request: Request, message: ContinuedRequest) -> None:
        """Put a request into the state in which its former engine had it."""


class InputReceiver:
    """Puts what the frontends send into the engine's inbox; made and run on that thread, stopped from another."""

    def __init__(self, core: Core) -> None:
        self._core = core
        oob = core.tensor_ipc_receiver
        self._decode_add = MsgpackDecoder(ContinuedRequest, oob_tensor_provider=oob).decode
        self._decode = MsgpackDecoder(oob_tensor_provider=oob).decode
        self._bell, self._rope = socket.socketpair()  # closing the rope wakes whoever polls the bell
        self._thread = threading.current_thread()
        self._jobs: deque[Callable[[], None]] = deque()
        self._sockets: dict[int, zmq.Socket[bytes]] = {}  # by client index
        self._late: dict[str, tuple[tuple[Request, int], ContinuedRequest]] = {}  # whose grammars are not there yet
        self._poller = zmq.Poller()
        self._context = zmq.Context()

    def attach(self, client_index: int, addresses: EngineAddresses) -> None:
        """Greet one more frontend and receive from it; `addresses` are its own. For any thread.

        Raises HostError, here and in `detach`, when the thread is busy for long; it does it afterwards.
        """
        self._run_there(lambda: self._greet(client_index, addresses.inputs[0], addresses))

    def detach(self, client_index: int) -> None:
        """Receive nothing from that frontend any more; what came before is in the inbox. For any thread."""
        self._run_there(lambda: self._forget(client_index))

    def _run_there(self, job: Callable[[], None]) -> None:
        done: Future[None] = Future()

        def run() -> None:
            try:
                job()
                done.set_result(None)
            except Exception as error:  # the caller's, not this thread's
                done.set_exception(error)

        self._jobs.append(run)
        try:
            self._rope.send(b"j")
        except OSError:  # stopped
            return
        try:
            done.result(_JOIN_LIMIT_S)
        except TimeoutError as error:
            if done.done():
                raise
            raise HostError(f"the engine's input thread has been busy for {_JOIN_LIMIT_S:g} s") from error

    def stop(self) -> None:
        """End the thread; what frontends send from now on is lost.

        Waits for it, because it refers to the engine, but not for one that still says good-bye to a frontend.
        """
        self._rope.close()
        self._thread.join(_JOIN_LIMIT_S)

    def run(self, addresses: list[str], identity: bytes, ready: threading.Event) -> None:
        """Greet the frontends at `addresses` and receive until `stop`."""
        self._identity = identity
        with self._bell, self._context, ExitStack() as stack:
            stack.callback(self._close)
            self._poller.register(self._bell, zmq.POLLIN)
            self._greeting = msgspec.msgpack.encode(self._core._make_ready_response())
            for index, address in enumerate(addresses):
                self._greet(index, address, self._core._pool_addresses)
            ready.set()
            while True:
                for source, _ in self._poller.poll():
                    if source != self._bell.fileno():
                        if source in self._sockets.values():
                            self._receive(*source.recv_multipart(copy=False))
                    elif self._bell.recv(64):
                        while self._jobs:
                            self._jobs.popleft()()
                    else:
                        return

    def _greet(self, client_index: int, address: str, keys: EngineAddresses | None) -> None:
        context = secured(self._context, keys)
        made = make_zmq_socket(context, address, zmq.DEALER, identity=self._identity, bind=False, linger=0)
        self._forget(client_index)
        self._sockets[client_index] = made
        made.send(self._greeting)  # a frontend cannot send before it has heard from us
        self._poller.register(made, zmq.POLLIN)

    def _forget(self, client_index: int) -> None:
        self._late = {key: late for key, late in self._late.items() if late[1].client_index != client_index}
        if made := self._sockets.pop(client_index, None):
            self._poller.unregister(made)
            made.close(0)

    def _close(self) -> None:
        for made in self._sockets.values():
            made.close(0)

    def _receive(self, kind: zmq.Frame, *frames: Any) -> None:
        core, request_type = self._core, EngineCoreRequestType(bytes(kind.buffer))
        if request_type == EngineCoreRequestType.ADD:
            message = self._decode_add(frames)
            to_own_clock(message)
            try:
                request: Any = core.make_request(message)
                if message.delivered_token_ids and (grammar := pending_grammar(request[0])) is not None:
                    self._restore_later(request, message, grammar)
                    return
                core.restore(request[0], message)
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
            for request_id in request:
                self._late.pop(request_id, None)
            core.aborts_queue.put_nowait(request)  # in both queues, as in vLLM: seen early, and in order
        core.input_queue.put_nowait((request_type, request))

    def _restore_later(self, request: tuple[Request, int], message: ContinuedRequest, grammar: Future[Any]) -> None:
        """Hand the request in when its grammar is there, and take what others send meanwhile."""
        self._late[message.request_id] = request, message

        def restore() -> None:
            if self._late.get(message.request_id, (None,))[0] is not request:
                return  # aborted
            del self._late[message.request_id]
            try:
                self._core.restore(request[0], message)
            except Exception:  # as in `_receive`
                self._core._handle_request_preproc_error(message)
            else:
                self._core.input_queue.put_nowait((EngineCoreRequestType.ADD, request))

        def call_there(_: Future[Any]) -> None:
            self._jobs.append(restore)
            with contextlib.suppress(OSError):  # stopped
                self._rope.send(b"j")

        grammar.add_done_callback(call_there)
