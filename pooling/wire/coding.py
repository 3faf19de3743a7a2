# SPDX-License-Identifier: Apache-2.0
"""How calls and their answers become bytes.

On a Unix socket they are pickled: it lies in a folder that only its user reaches, and configs of vLLM travel on it.
On a TCP port they are plain values in msgpack, for whoever has a pickle read has code run: the key alone must not be
what keeps others from that.
"""

from __future__ import annotations

import pickle
from typing import Any, Protocol

import msgspec

from tokenpool.errors import HostError
from tokenpool.wire.messages import Address


class Call(msgspec.Struct, array_like=True, frozen=True):
    """A method's name, its arguments, and the seconds after which its caller gives it up."""

    method: str
    args: tuple[Any, ...]
    limit_s: float


class Answer(msgspec.Struct, array_like=True, frozen=True):
    """What a call returned, or the words of what it raised."""

    result: Any = None
    error: str | None = None


class Coding(Protocol):
    """Either way; both methods that read raise what is wrong with the bytes."""

    def pack_call(self, call: Call) -> bytes:
        """The call as bytes; raises what cannot be sent."""
        ...

    def read_call(self, content: bytes) -> Call:
        """The call."""
        ...

    def pack_answer(self, result: Any) -> bytes:
        """The result, or the exception that the call raised, as bytes; raises what cannot be sent."""
        ...

    def read_answer(self, content: bytes) -> Any:
        """The result, or the exception."""
        ...


class Pickled:
    """For Unix sockets: any values and exceptions."""

    def pack_call(self, call: Call) -> bytes:
        """See Coding."""
        return pickle.dumps((call.method, call.args, call.limit_s))

    def read_call(self, content: bytes) -> Call:
        """See Coding."""
        return Call(*pickle.loads(content))

    def pack_answer(self, result: Any) -> bytes:
        """See Coding."""
        packed = pickle.dumps(result)
        if isinstance(result, Exception):
            pickle.loads(packed)  # some can be pickled and not made again
        return packed

    def read_answer(self, content: bytes) -> Any:
        """See Coding."""
        return pickle.loads(content)


class Packed:
    """For TCP ports: strings, bytes, numbers, None, and lists and mappings of them; tuples arrive as lists.

    Of an exception only its words arrive, in a HostError.
    """

    def pack_call(self, call: Call) -> bytes:
        """See Coding."""
        return msgspec.msgpack.encode(call)

    def read_call(self, content: bytes) -> Call:
        """See Coding."""
        return msgspec.msgpack.decode(content, type=Call)

    def pack_answer(self, result: Any) -> bytes:
        """See Coding."""
        answer = Answer(error=_text(result)) if isinstance(result, Exception) else Answer(result)
        return msgspec.msgpack.encode(answer)

    def read_answer(self, content: bytes) -> Any:
        """See Coding."""
        answer = msgspec.msgpack.decode(content, type=Answer)
        return answer.result if answer.error is None else HostError(answer.error)


def coding_for(address: Address) -> Coding:
    """The one that is used at an address."""
    return Pickled() if isinstance(address, str) else Packed()


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, HostError) else f"{type(error).__name__}: {error}"
