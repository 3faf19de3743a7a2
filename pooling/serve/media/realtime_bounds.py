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


class AudioQueue(asyncio.Queue[Any]):
    """Arrays of samples that wait, and the None that ends them."""

    def __init__(self, owner: str) -> None:
        super().__init__()
        self._owner = owner
        self.num_bytes = 0

    def has_room(self, num_bytes: int) -> bool:
        """Whether so many more may wait."""
        return self.num_bytes + num_bytes <= MAX_BYTES_OF_ONE and WAITING.fits(self._owner, num_bytes)

    def clear(self) -> None:
        """Nobody will hear what waits."""
        while not self.empty():
            self.get_nowait()

    def _put(self, item: Any) -> None:
        size = 0 if item is None else item.nbytes
        if size and not WAITING.take(self._owner, size):
            raise ValueError("too much audio waits")
        self.num_bytes += size
        super()._put(item)

    def _get(self) -> Any:
        item = super()._get()
        if item is not None:
            WAITING.give_back(self._owner, item.nbytes)
            self.num_bytes -= item.nbytes
        return item


class BoundedConnection(RealtimeConnection):
    """Refuses audio for which there is no room."""

    def __init__(self, websocket: Any, serving: Any) -> None:
        super().__init__(websocket, serving)
        self.audio_queue = AudioQueue(current_tenant())

    async def handle_event(self, event: Any) -> None:
        """See RealtimeConnection."""
        if not isinstance(event, dict):
            await self.send_error("An event is a JSON object with a type.", "invalid_event")
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
    """Bytes of the samples in a text of base64: two of PCM become four."""
    return len(audio) * 3 // 4 // 2 * 4


def bound_realtime() -> None:
    """Bound the realtime connections of all models of this process; a second call finds nothing to change."""
    api_router.RealtimeConnection = BoundedConnection
