# SPDX-License-Identifier: Apache-2.0
"""A host's sockets for calls: models are added and removed and the state is read; tokens never pass here."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from tokenpool.errors import HostError, text_of
from tokenpool.wire.coding import Call, coding_for
from tokenpool.wire.messages import Address, KeyRefusedError, Wire, connect, listen, serve

logger = logging.getLogger(__name__)

_HANDSHAKE_LIMIT_S = 10.0
"""For a peer to show that it knows the key, and to say what it wants."""
_SEND_LIMIT_S = 60.0
_CHANGE_S, _BUILD_S = 3600.0, 4 * 3600.0
_LIMITS_S = {
    "pulse": 5.0,
    "progress": 5.0,
    "metrics": 4.0,
    "trace": 60.0,
    "check": 60.0,
    # These wait for the builds before them. A host that hangs meanwhile is killed, which ends the call.
    "remove_model": _CHANGE_S,
    "set_budget": _CHANGE_S,
    "sleep": _CHANGE_S,
    "wake": _CHANGE_S,
    "attach_frontend": _CHANGE_S,
    "attach_at": _CHANGE_S,
    "detach_frontend": _CHANGE_S,
    "add_model": _BUILD_S,
    "add_packed": _BUILD_S,
}
_LIMIT_S = 30.0


def limit_of(method: str) -> float:
    """Seconds after which a call of `method` is given up, unless its caller says otherwise."""
    return _LIMITS_S.get(method, _LIMIT_S)


class ControlServer:
    """Answers calls on a Unix socket, or on (IP address, port), one thread per connection.

    Each call runs on the host loop's thread; `direct` methods run on the connection's own. A call that its caller has
    given up before it began is not run.
    """

    def __init__(self, address: Address, key: bytes, run_on_loop: Callable[[Callable[[], Any]], Any]) -> None:
        self._socket = listen(address)
        self._address = address
        self._coding = coding_for(address)
        self._key = key
        self._run_on_loop = run_on_loop

    @property
    def address(self) -> Address:
        """Where it listens."""
        return self._address if isinstance(self._address, str) else self._socket.getsockname()[:2]

    def serve(
        self, methods: Mapping[str, Callable[..., Any]], direct: Mapping[str, Callable[..., Any]] | None = None
    ) -> None:
        """Answer in the background until the process ends."""
        self._direct = direct or {}
        serve(self._socket, lambda sock: self._serve_one(sock, methods), "control")

    def _serve_one(self, sock: socket.socket, methods: Mapping[str, Callable[..., Any]]) -> None:
        with Wire(sock, _HANDSHAKE_LIMIT_S) as wire:
            try:
                wire.ask_proof(self._key)
                request = wire.receive()
            except (KeyRefusedError, OSError, EOFError) as error:  # whoever it is, only its own connection ends
                logger.warning("control connection failed: %s", text_of(error))
                return
            answer = self._answer(request, methods)
            wire.set_limit(_SEND_LIMIT_S)
            try:
                wire.send(answer)
            except OSError:
                logger.warning("nobody waits for the answer to a control call any more")

    def _answer(self, request: bytes, methods: Mapping[str, Callable[..., Any]]) -> bytes:
        name = "a call"
        try:
            call = self._coding.read_call(request)
            name = call.method
            if name in self._direct:
                result = self._direct[name](*call.args)
            else:
                result = _result_of(self._run_on_loop(_job(methods[name], call)), call)
        except BaseException as error:  # every failure is the caller's answer
            logger.debug("control call failed method=%s", name, exc_info=error)
            result = error if isinstance(error, Exception) else HostError(_text(error))
        try:
            return self._coding.pack_answer(result)
        except Exception as error:  # packing calls code of the result
            failed = isinstance(result, Exception)
            problem = _text(result) if failed else f"the answer to {name} cannot be sent: {_text(error)}"
            return self._coding.pack_answer(HostError(problem))


def _job(method: Callable[..., Any], call: Call) -> Callable[[], Any]:
    """The call, for the loop; its name is that of the method."""
    deadline_s = time.monotonic() + call.limit_s

    def job() -> Any:
        if time.monotonic() > deadline_s:
            raise HostError(f"{call.method} was given up after {call.limit_s:g} s, before it began")
        return method(*call.args)

    job.__name__ = call.method
    return job


def _result_of(future: Future[Any], call: Call) -> Any:
    try:
        return future.result(call.limit_s)
    except TimeoutError as error:
        if future.done():
            raise  # the method's own
        raise HostError(f"the host did not come to {call.method} within {call.limit_s:g} s") from error


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def call_host(address: Address, key: bytes, method: str, *args: Any, timeout_s: float | None = None) -> Any:
    """Call a host and return its answer; raises what the call raised, or HostError when none came in time.

    Blocks for as long as the call takes, at most `timeout_s` or what `limit_of` says; use a thread.
    """
    limit_s, coding = limit_of(method) if timeout_s is None else timeout_s, coding_for(address)
    request = coding.pack_call(Call(method, args, limit_s))
    try:
        with connect(address, limit_s) as wire:
            wire.prove(key)
            wire.send(request)
            answer = wire.receive()
    except TimeoutError as error:
        raise HostError(f"engine host does not answer {method} within {limit_s:g} s") from error
    except (OSError, EOFError, KeyRefusedError) as error:
        raise HostError(f"engine host does not answer {method}: {error or 'it ended'}") from error
    try:
        result = coding.read_answer(answer)
    except Exception as error:  # whatever the class of an answer raises when it is made here
        raise HostError(f"the answer to {method} cannot be read: {_text(error)}") from error
    if isinstance(result, Exception):
        raise result
    return result
