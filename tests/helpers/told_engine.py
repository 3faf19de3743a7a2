# SPDX-License-Identifier: Apache-2.0
"""The engine's end of vLLM's engine protocol, for tests of the frontend's end: it says what it is told to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineCoreRequestType,
    FinishReason,
    UtilityOutput,
)
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult

from tokenpool.wire.addresses import EngineAddresses
from tokenpool.wire.continued_request import ContinuedRequest, to_own_clock
from tokenpool.wire.curve import secured

_LIMIT_S = 30
_ANSWERS = {
    "is_sleeping": False,
    "add_lora": True,
    "remove_lora": True,
    "export_kv": {"keys": [], "given_up": False},
    "import_kv": 0,
}


def make_request(request_id: str, *, resumable: bool = False, **params: Any) -> EngineCoreRequest:
    """A request as AsyncLLM sends it."""
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=[3, 4, 5],
        mm_features=None,
        sampling_params=SamplingParams(**{"max_tokens": 5, **params}),
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        resumable=resumable,
    )


class ToldEngine:
    """Greets at once, answers utility calls, and keeps what it is sent until the test asks for it."""

    def __init__(self, at: Path | EngineAddresses) -> None:
        """Its frontend listens beside that path, or at those addresses."""
        if isinstance(at, Path):
            at = EngineAddresses((f"ipc://{at}.in",), (f"ipc://{at}.out",))
        self.addresses = at
        self.calls: list[str] = []
        self.answers: dict[str, Any] = dict(_ANSWERS)
        self.on_call: Callable[[str], Any] = lambda method: None
        """Told of a utility call before it is answered."""
        self._context = zmq.asyncio.Context()
        self._input = secured(self._context, at).socket(zmq.DEALER)
        self._input.setsockopt(zmq.IDENTITY, b"\x00\x00")
        self._input.connect(self.addresses.inputs[0])
        self._output = secured(self._context, at).socket(zmq.PUSH)
        self._output.connect(self.addresses.outputs[0])
        self._encode = MsgpackEncoder().encode
        self._added: asyncio.Queue[ContinuedRequest] = asyncio.Queue()
        self._aborted: asyncio.Queue[list[str]] = asyncio.Queue()
        self._input.send(b"")
        self._receiver = asyncio.create_task(self._receive())

    async def added(self) -> ContinuedRequest:
        """The next request."""
        return await asyncio.wait_for(self._added.get(), _LIMIT_S)

    async def aborted(self) -> list[str]:
        """The ids of the next message that ends requests."""
        return await asyncio.wait_for(self._aborted.get(), _LIMIT_S)

    def say(
        self,
        tokens: Mapping[str, list[int]],
        *,
        finished: Collection[str] = (),
        why: FinishReason = FinishReason.LENGTH,
    ) -> None:
        """Send tokens by request."""
        ended = dict.fromkeys(finished, why)
        outputs = [EngineCoreOutput(name, ids, finish_reason=ended.get(name)) for name, ids in tokens.items()]
        self._send(EngineCoreOutputs(outputs=outputs))

    def die(self) -> None:
        """Send vLLM's last word."""
        self._output.send(EngineCoreProc.ENGINE_CORE_DEAD)

    def close(self) -> None:
        """Close the sockets."""
        self._receiver.cancel()
        self._context.destroy(linger=0)

    def _send(self, outputs: EngineCoreOutputs) -> None:
        self._output.send_multipart(self._encode(outputs))

    async def _receive(self) -> None:
        decode_add, decode = MsgpackDecoder(ContinuedRequest).decode, MsgpackDecoder().decode
        while True:
            kind, *frames = await self._input.recv_multipart()
            kind = EngineCoreRequestType(kind)
            if kind == EngineCoreRequestType.ADD:
                self._added.put_nowait(message := decode_add(frames))
                to_own_clock(message)
            elif kind == EngineCoreRequestType.ABORT:
                self._aborted.put_nowait(decode(frames))
            elif kind == EngineCoreRequestType.UTILITY:
                _, call_id, method, _ = decode(frames)
                self.calls.append(method)
                self.on_call(method)
                answer = UtilityOutput(call_id, result=UtilityResult(self.answers[method]))
                self._send(EngineCoreOutputs(utility_output=answer))
