# SPDX-License-Identifier: Apache-2.0
"""One connection to one engine: vLLM's engine protocol (ZMQ, msgpack) from greeting to close."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping
from http import HTTPStatus
from typing import Any

import zmq
import zmq.asyncio
from vllm.exceptions import GracefulHTTPError
from vllm.utils.network_utils import make_zmq_socket
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, EngineCoreRequestType
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.core_client import _process_utility_output
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from zmq.utils.monitor import parse_monitor_message

from tokenpool.errors import HostError
from tokenpool.policy.routing import HostQueue, Told
from tokenpool.wire.addresses import EngineAddresses
from tokenpool.wire.continued_request import stamped
from tokenpool.wire.curve import secured
from tokenpool.wire.utility_calls import reason_of

logger = logging.getLogger(__name__)

_GREETING_LIMIT_S = 120.0
_FAR_GREETING_LIMIT_S = 15.0
"""On another machine the engine is attached by then, and does not try again to connect."""


class CallRefusedError(GracefulHTTPError, ValueError):
    """The engine does not do what an operator asks of it; the message says why."""


class LinkClosedError(HostError):
    """The engine is gone, or was left, before it answered."""


class EngineLink:
    """An engine that has greeted; made by `connect`, used on that event loop. Sending does not block or fail."""

    def __init__(
        self,
        host: str,
        context: zmq.asyncio.Context,
        addresses: EngineAddresses,
        client_index: int,
        *,
        on_outputs: Callable[[EngineLink, EngineCoreOutputs], None],
        on_end: Callable[[EngineLink], None],
    ) -> None:
        self.host = host
        self.load = 0
        """Unfinished requests there; kept by the owner."""
        self.greeting = b""
        """vLLM's EngineCoreReadyResponse, encoded."""
        self.connected_s = 0.0
        """When it greeted, on the monotonic clock."""
        self._told: Told | None = None
        self._client_index = client_index
        self._on_outputs = on_outputs
        self._on_end = on_end
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._call_ids = itertools.count()
        self._encoder = MsgpackEncoder()
        self._engine = b""
        self._tasks: list[asyncio.Task[None]] = []
        context = secured(context, addresses)
        self.is_broken = False
        """Whether its connection ended by itself: the engine may live, what was on the way is lost."""
        self._is_remote = not addresses.outputs[0].startswith("ipc:")
        self._clock_behind_s = math.inf
        self._input = make_zmq_socket(context, addresses.inputs[0], zmq.ROUTER, bind=True, linger=0)
        try:
            self._output = make_zmq_socket(context, addresses.outputs[0], zmq.PULL, linger=0)
        except BaseException:
            self._input.close()
            raise
        sockets = (self._input, self._output) if self._is_remote else ()
        self._connections = [_Connection(made) for made in sockets]

    @property
    def queue(self) -> HostQueue:
        """What is known of the engine, for a request that could go there."""
        return self._told.queue(self.load, time.monotonic()) if self._told is not None else HostQueue(self.load)

    def learn(self, load: Mapping[str, Any]) -> None:
        """Take in the model's entry in the host's answer to `load`."""
        self._told = Told(load, self.load, time.monotonic())

    async def connect(self) -> None:
        """Wait for the engine's greeting; raises HostError, with all closed, when none comes."""
        try:
            async with asyncio.timeout(_FAR_GREETING_LIMIT_S if self._is_remote else _GREETING_LIMIT_S):
                self._engine, self.greeting = await self._input.recv_multipart()
                for connection in self._connections:
                    await connection.begun()
        except BaseException as error:
            was_closed = self.closed
            self.close()
            if was_closed:  # by somebody else, which ends the wait as a cancellation does
                raise LinkClosedError(f"the engine on host {self.host!r} is gone") from error
            if isinstance(error, TimeoutError):
                raise HostError(f"no engine on host {self.host!r} said it is ready") from error
            raise
        self.connected_s = time.monotonic()
        self._tasks = [asyncio.create_task(work) for work in (self._receive(), *map(self._watch, self._connections))]

    @property
    def closed(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._input.closed

    def add(self, request: EngineCoreRequest) -> None:
        """Send a request."""
        request.client_index = self._client_index
        self._send(EngineCoreRequestType.ADD, stamped(request) if self._is_remote else request)

    def abort(self, wire_ids: list[str]) -> None:
        """Tell the engine to drop requests."""
        self._send(EngineCoreRequestType.ABORT, wire_ids)

    async def call(self, method: str, *args: Any) -> Any:
        """Call a utility method of the engine; raises what it says, CallRefusedError or LinkClosedError."""
        if self.closed:
            raise LinkClosedError(f"the engine on host {self.host!r} is gone")
        call_id = next(self._call_ids)
        answer = self._calls[call_id] = asyncio.get_running_loop().create_future()
        self._send(EngineCoreRequestType.UTILITY, (self._client_index, call_id, method, args))
        try:
            return await answer
        except Exception as error:  # of vLLM's making, with what the engine says
            if reason := reason_of(str(error)):
                raise CallRefusedError(reason, HTTPStatus.BAD_REQUEST) from None
            raise
        finally:
            self._calls.pop(call_id, None)  # there still if the caller has given up

    def close(self) -> None:
        """Close the sockets; calls without an answer fail. What the engine still sends is lost."""
        for task in self._tasks:
            task.cancel()
        for connection in self._connections:
            connection.close()
        self._input.close()
        self._output.close()
        calls, self._calls = self._calls, {}
        for answer in calls.values():
            if not answer.done():
                answer.set_exception(LinkClosedError(f"the engine on host {self.host!r} is gone"))

    def _send(self, kind: EngineCoreRequestType, content: Any) -> None:
        if self.closed:
            return  # whoever closed it sees to what it had
        # Without awaiting: the socket keeps the order, and has no limit at which it would wait.
        self._input.send_multipart((self._engine, kind.value, *self._encoder.encode(content)), copy=False)

    async def _receive(self) -> None:
        decode = MsgpackDecoder(EngineCoreOutputs).decode
        try:
            while True:
                frames = await self._output.recv_multipart(copy=False)
                if len(frames) == 1 and frames[0].buffer == EngineCoreProc.ENGINE_CORE_DEAD:
                    break
                outputs: EngineCoreOutputs = decode(frames)
                if self._is_remote:
                    self._to_own_clock(outputs)
                if outputs.utility_output is None:
                    self._on_outputs(self, outputs)
                elif outputs.utility_output.call_id in self._calls:
                    _process_utility_output(outputs.utility_output, self._calls)
        except Exception:  # whatever cannot be read, this engine cannot be listened to any more
            logger.exception("cannot read what the engine on host %s sends", self.host)
        self._on_end(self)

    async def _watch(self, connection: _Connection) -> None:
        """Notice that a connection ends that leaves the machine: the engine does not begin another one by itself."""
        await connection.ended()
        self.is_broken = True
        self._on_end(self)
        self.close()

    def _to_own_clock(self, outputs: EngineCoreOutputs) -> None:
        """Shift times of another machine's monotonic clock, up to the shortest way that a message took."""
        self._clock_behind_s = behind_s = min(self._clock_behind_s, time.monotonic() - outputs.timestamp)
        outputs.timestamp += behind_s
        for output in outputs.outputs:
            for event in output.events or ():
                event.timestamp += behind_s


async def call_all(links: Collection[EngineLink], method: str, *args: Any) -> list[Any]:
    """Call engines; returns what those answer that are not gone meanwhile, raises the first error."""
    answers = await asyncio.gather(*(link.call(method, *args) for link in links), return_exceptions=True)
    answers = [answer for answer in answers if not isinstance(answer, LinkClosedError)]
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return answers


class _Connection:
    """The connection of a peer with the right key to a socket that listens; others are refused, and end soon."""

    EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED

    def __init__(self, listening: zmq.asyncio.Socket) -> None:
        self._listening = listening
        self._monitor = listening.get_monitor_socket(self.EVENTS)
        self._open: set[int] = set()

    def close(self) -> None:
        """Hear no more of it.

        The socket must not be monitored any more when nobody reads: for its next event ZMQ's own thread would wait for
        ever, and with it all connections of the context (libzmq 4.3.5, `socket_base_t::monitor_event`).
        """
        if not self._monitor.closed:
            self._listening.disable_monitor()
            self._monitor.close()

    async def begun(self) -> None:
        """Wait until the peer is there."""
        while await self._next() != zmq.EVENT_HANDSHAKE_SUCCEEDED:
            pass

    async def ended(self) -> None:
        """Wait until it is gone, which ZMQ does not tell apart from the end of one that was refused."""
        while self._open:
            await self._next()

    async def _next(self) -> int:
        told = parse_monitor_message(await self._monitor.recv_multipart())
        if told["event"] == zmq.EVENT_ACCEPTED:
            self._open.add(told["value"])
        elif told["event"] == zmq.EVENT_DISCONNECTED:
            self._open.discard(told["value"])
        event: int = told["event"]
        return event
