# SPDX-License-Identifier: Apache-2.0
"""Bounds how much audio waits in a frontend for realtime transcription.

vLLM keeps what a client appends until it is transcribed, however much that is: one that never commits, or sends faster
than a model hears, fills the memory. What has no room is refused with an error event, and the socket stays open.
"""

from __future__ import annotations

import asyncio
from typing import Any

from vllm.entrypoints.speech_to_text.realtime import api_router
from vllm.entrypoints.speech_to_text.realtime.connection import RealtimeConnection

from tokenpool.serve.access.byte_shares import ByteShares
from tokenpool.serve.access.tenant_call import current_tenant

MAX_BYTES_OF_ONE = 600 * 16_000 * 4
"""Of a connection: ten minutes at 16 kHz, as samples of four bytes."""
MAX_BYTES = 256 << 20
"""Of all connections of a frontend; tenants leave room for others."""

WAITING = ByteShares(MAX_BYTES)
_ITEM_BYTES = 256
"""Of an array beside its samples: a client may send few at a time."""
_FIELDS = {
    ("session.update", "model"): str,
    ("input_audio_buffer.append", "audio"): str,
    ("input_audio_buffer.commit", "final"): bool,
}
"""What types fields of events have."""


class AudioQueue(asyncio.Queue[Any]):
    """Arrays of samples that wait, and the None that ends them."""

    def __init__(self, owner: str) -> None:
        super().__init__()
        self._owner = owner
        self.num_bytes = 0
        self._ends = False  # the last of what waits is an end, and another one would say nothing more

    def has_room(self, num_bytes: int) -> bool:
        """Whether so many more may wait."""
        return self.num_bytes + num_bytes <= MAX_BYTES_OF_ONE and WAITING.fits(self._owner, num_bytes)

    def clear(self) -> None:
        """Nobody will hear what waits."""
        while not self.empty():
            self.get_nowait()

    def _put(self, item: Any) -> None:
        if item is None:
            if not self._ends or self.empty():
                super()._put(item)
            self._ends = True
            return
        size = item.nbytes + _ITEM_BYTES
        if not WAITING.take(self._owner, size):
            raise ValueError("too much audio waits")
        self.num_bytes += size
        self._ends = False
        super()._put(item)

    def _get(self) -> Any:
        item = super()._get()
        if item is not None:
            size = item.nbytes + _ITEM_BYTES
            WAITING.give_back(self._owner, size)
            self.num_bytes -= size
        return item


class BoundedConnection(RealtimeConnection):
    """Refuses audio for which there is no room."""

    def __init__(self, websocket: Any, serving: Any) -> None:
        super().__init__(websocket, serving)
        self.audio_queue = AudioQueue(current_tenant())

    async def handle_event(self, event: Any) -> None:
        """See RealtimeConnection."""
        if (problem := _problem(event)) is not None:
            await self.send_error(problem, "invalid_event")
            return
        audio = event.get("audio") if event.get("type") == "input_audio_buffer.append" else None
        if isinstance(audio, str) and not self.audio_queue.has_room(_size_of(audio)):
            message = "Too much audio waits to be transcribed: commit what was sent, and send the rest later."
            await self.send_error(message, "too_much_audio")
            return
        await super().handle_event(event)

    async def cleanup(self) -> None:
        """See RealtimeConnection."""
        await super().cleanup()
        self.audio_queue.clear()


def _size_of(audio: str) -> int:
    """Bytes of the samples in a text of base64, two of PCM become four, and of the array that has them."""
    return len(audio) * 3 // 4 // 2 * 4 + _ITEM_BYTES


def _problem(event: Any) -> str | None:
    """What is wrong with an event, for which vLLM would log a stack."""
    if not isinstance(event, dict):
        return "An event is a JSON object with a type."
    for (kind, field), types in _FIELDS.items():
        if event.get("type") == kind and field in event and not isinstance(event[field], types):
            return f"The field {field} of an event {kind} is no {types.__name__}."
    if event.get("type") == "input_audio_buffer.append" and "audio" not in event:
        return "An event input_audio_buffer.append has no field audio."
    return None


def bound_realtime() -> None:
    """Bound the realtime connections of all models of this process; a second call finds nothing to change."""
    api_router.RealtimeConnection = BoundedConnection
