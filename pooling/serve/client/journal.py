# SPDX-License-Identifier: Apache-2.0
"""What a frontend keeps of every unfinished request, so that another engine can go on with it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from copy import copy
from typing import Generic, TypeVar

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, EngineCoreRequest, FinishReason

from tokenpool.wire.continued_request import ContinuedRequest

Place = TypeVar("Place")

OPEN_PIECES = 4
"""Of one streamed input, that an engine may have and has not answered."""
_OF_PROMPT = ("prompt_logprobs", "prompt_logprob_token_ids")


class JournalEntry(Generic[Place]):
    """One unfinished request: as it was sent, what was delivered of it, and which engine has it.

    Each time it is sent it gets another id on the wire, so that what an earlier engine still says about it is not
    taken for an answer of the present one.
    """

    __slots__ = (
        "_delivered_before", "_heard", "_input_ended", "_is_session", "_num_open_inputs", "_pieces", "_sent",
        "delivered", "is_closed", "is_guilty", "is_released", "num_losses", "owner", "place", "request", "wire_id",
    )  # fmt: skip

    def __init__(self, request: EngineCoreRequest) -> None:
        self.request = request
        self.delivered: list[int] = []
        """Output tokens handed to the frontend so far."""
        self.place: Place | None = None
        """The engine that has it; None while it waits for one."""
        self.wire_id = request.request_id
        self.num_losses = 0
        """How many hosts died with it, as far as it may be the cause; see `suspects`."""
        self.owner: str | None = None
        """The tenant that it is for."""
        self.is_released = False
        """Whether it may go on although it is suspected."""
        self.is_guilty = False
        self.is_closed = False
        """Whether the journal has forgotten it."""
        self._delivered_before = 0
        self._sent = 0
        self._is_session = request.resumable
        self._num_open_inputs = 1
        self._input_ended = not request.resumable
        self._pieces: list[EngineCoreRequest] = []
        self._heard: asyncio.Future[None] | None = None

    @property
    def request_id(self) -> str:
        """Id in this frontend."""
        return self.request.request_id

    def more_input(self, request: EngineCoreRequest) -> None:
        """Take in a further piece of streamed input, each of which has an end of its own, or the end of all input.

        While no engine has the request they are kept, and go where the first one goes.
        """
        if request.resumable:
            self._num_open_inputs += 1
        else:
            self._input_ended = True
        if self.place is None:
            self._pieces.append(request)

    async def heard(self) -> None:
        """Wait while more than `OPEN_PIECES` of streamed input have no end: who sends faster than a model hears waits.

        What waits is counted, and bounded, where it comes from. Of one request one task at a time may wait: the one
        that sends the pieces.
        """
        while self._num_open_inputs > OPEN_PIECES and not self.is_closed:
            self._heard = asyncio.get_running_loop().create_future()
            await self._heard

    def wake(self) -> None:
        """Let `heard` look again."""
        if self._heard is not None and not self._heard.done():
            self._heard.set_result(None)

    @property
    def is_proven(self) -> bool:
        """Whether it has put out a token since it was sent last."""
        return len(self.delivered) > self._delivered_before

    @property
    def ended(self) -> bool:
        """Whether nothing more is to come of the request."""
        return self._input_ended and self._num_open_inputs <= 0

    def obstacle(self) -> str | None:
        """Why another engine could not go on with the request, or None if one can."""
        if self._is_session:
            return "its input is streamed, and what an engine has taken in of it is not kept"
        return None

    def messages(self, place: Place) -> list[EngineCoreRequest]:
        """What lets `place` start the request, with all its pieces so far, or go on with it after `delivered`."""
        pieces, self._pieces = self._pieces, []
        return [self._message(place), *pieces]

    def _message(self, place: Place) -> EngineCoreRequest:
        request = self.request
        self.place = place
        self.wire_id = f"{request.request_id}~{self._sent}" if self._sent else request.request_id
        self._sent += 1
        self._delivered_before = len(self.delivered)
        if self._sent == 1:
            return request
        fields = {name: getattr(request, name) for name in request.__struct_fields__}
        fields["request_id"] = self.wire_id
        if self.delivered and request.sampling_params is not None:
            fields["sampling_params"] = _without_prompt_logprobs(request.sampling_params)
        return ContinuedRequest(**fields, delivered_token_ids=list(self.delivered))

    def take(self, output: EngineCoreOutput) -> bool:
        """Record an output and make it one of the first engine's; returns whether the request has ended."""
        if self._sent > 1:
            output.request_id = self.request.request_id
            if self.delivered and output.events:
                # Queued and first scheduled it was long ago, as far as its latencies go.
                output.events = [e for e in output.events if e.type == EngineCoreEventType.PREEMPTED] or None
        self.delivered += output.new_token_ids
        if output.finish_reason is not None:
            self._num_open_inputs -= 1
            self.wake()
        return self.ended

    def lacks_result(self, output: EngineCoreOutput) -> bool:
        """Whether the request ends with this output in a way that AsyncLLM does not bear.

        So ends a pooling request without a result, of which its task would die, and streamed input that failed: the
        engine has dropped all pieces, and AsyncLLM would wait for the answers to those that it has not taken in.
        """
        if self._is_session:
            return output.finish_reason in (FinishReason.ABORT, FinishReason.ERROR)
        is_pooling = self.request.pooling_params is not None
        return is_pooling and output.finish_reason is not None and output.pooling_output is None


def _without_prompt_logprobs(params: SamplingParams) -> SamplingParams:
    """Ask for no logprobs of the prompt: they came with the first token, and would forbid the prefix cache."""
    wanted = [name for name in _OF_PROMPT if getattr(params, name, None) is not None]
    if wanted:
        params = copy(params)
        params.skip_reading_prefix_cache = None
        for name in wanted:
            setattr(params, name, None)
    return params


class Journal(Generic[Place]):
    """The unfinished requests of one model in one frontend, in the order they came."""

    def __init__(self) -> None:
        self._entries: dict[str, JournalEntry[Place]] = {}
        self._on_wire: dict[str, JournalEntry[Place]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[JournalEntry[Place]]:
        return iter(list(self._entries.values()))

    def open(self, request: EngineCoreRequest) -> tuple[JournalEntry[Place], bool]:
        """Enter a request; returns its entry and whether it is new, and not more input of one that is there."""
        entry = self._entries.get(request.request_id)
        if entry is None:
            self._entries[request.request_id] = entry = JournalEntry(request)
            return entry, True
        entry.more_input(request)
        return entry, False

    def get(self, request_id: str) -> JournalEntry[Place] | None:
        """The entry of an unfinished request."""
        return self._entries.get(request_id)

    def at(self, place: Place | None) -> list[JournalEntry[Place]]:
        """The requests that `place` has; with None those that wait for an engine."""
        return [entry for entry in self._entries.values() if entry.place is place]

    def send(self, entry: JournalEntry[Place], place: Place) -> list[EngineCoreRequest]:
        """Give a request to `place` with the messages that are returned."""
        self._on_wire.pop(entry.wire_id, None)
        messages = entry.messages(place)
        self._on_wire[entry.wire_id] = entry
        return messages

    def hold(self, entry: JournalEntry[Place]) -> None:
        """Take a request from the engine that has it: it waits, and nothing that engine says of it counts."""
        self._on_wire.pop(entry.wire_id, None)
        entry.place = None

    def close(self, request_id: str) -> JournalEntry[Place] | None:
        """Forget a request; returns what was known of it."""
        entry = self._entries.pop(request_id, None)
        if entry is not None:
            entry.is_closed = True
            entry.wake()
            self._on_wire.pop(entry.wire_id, None)
        return entry

    def clear(self) -> None:
        """Forget all: nobody goes on with them."""
        for entry in self:
            self.close(entry.request_id)

    def take(
        self, outputs: list[EngineCoreOutput], place: Place
    ) -> tuple[list[EngineCoreOutput], list[str], list[str]]:
        """Record what `place` says; returns the outputs that count and the ids of requests that ended with them.

        The ids that come last are those of requests that ended without a result, see `lacks_result`.
        """
        kept, ended, without_result = [], [], []
        for output in outputs:
            entry = self._on_wire.get(output.request_id)
            if entry is None or entry.place is not place:
                continue  # aborted, moved elsewhere, or ended: the engine did not know yet
            is_lost = entry.lacks_result(output)
            if is_lost:
                without_result.append(entry.request_id)
            else:
                kept.append(output)
            if entry.take(output) or is_lost:
                self.close(entry.request_id)
                ended.append(entry.request_id)
        return kept, ended, without_result
