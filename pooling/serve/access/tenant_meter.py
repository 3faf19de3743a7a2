# SPDX-License-Identifier: Apache-2.0
"""Counts tenants' tokens where vLLM's frontend meets its engine, so that no route has to be known.

Every request of every route ends in `AsyncLLM.add_request`, which registers it with the `OutputProcessor` in the task
that serves the call and then gives it to the engine's client, where it waits for its place; every token comes through
the processor too.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.utils import length_from_prompt_token_ids_or_embeds
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest

from tokenpool.serve.access.tenant_call import CURRENT_CALL, Call

_PRIORITY_STEP = 1 << 20
"""Above all that a client may give as `priority`: it orders the tenant's own requests only."""


def meter(engine: AsyncLLM) -> None:
    """Count what `engine` is asked and what it puts out, on the account of the call that it is for."""
    processor = engine.output_processor
    processor.__class__ = _MeteredOutputProcessor
    processor.by_priority = engine.scheduler_config.policy == "priority"
    processor.calls, processor.unsent = {}, set()
    core = engine.engine_core
    core.add_request_async = partial(_send, core.add_request_async, processor)


async def _send(
    send: Callable[[EngineCoreRequest], Awaitable[None]], processor: _MeteredOutputProcessor, request: EngineCoreRequest
) -> None:
    """Give a request to the engine when its call has a place for it; not at all if it has ended before.

    vLLM gives the sequences of `n` one after another and then begins to answer: further ones wait beside it, or a
    stream would not begin before the last of them has its place.
    """
    call, request_id = CURRENT_CALL.get(), request.request_id
    is_new = request_id in processor.unsent
    processor.unsent.discard(request_id)
    if call is None or not (is_new or request.resumable):
        await send(request)
        return
    state = processor.request_states.get(request_id)
    if is_new and state is not None and state.parent_req is not None and call.has_others:
        call.wait_beside(request_id, _send_later(send, processor, request, call))
        return
    try:
        await call.admit(request_id)
    except BaseException:
        if is_new and state is not None and state.parent_req is None:  # those of n > 1 vLLM aborts by itself
            processor.abort_requests([request_id], internal=True)
        raise
    if request_id in processor.request_states or not is_new:
        await send(request)


async def _send_later(
    send: Callable[[EngineCoreRequest], Awaitable[None]],
    processor: _MeteredOutputProcessor,
    request: EngineCoreRequest,
    call: Call,
) -> None:
    """The same for a sequence that nobody waits for; whoever reads the answers is told what fails."""
    try:
        await call.admit(request.request_id)
        if request.request_id in processor.request_states:
            await send(request)
    except Exception as error:
        state = processor.request_states.get(request.request_id)
        if state is not None and state.queue is not None:
            state.queue.put(error)


class _MeteredOutputProcessor(OutputProcessor):
    """Requests outside of a tenant's call are left alone.

    A request that was held back keeps the time at which it came, so that its due times are those that its client
    knows. Where the model schedules by priority, that of the tenant goes before what the client asks for. The salt of
    its prefix cache is the tenant's from here on: before a host is chosen by it, and for all caches that know blocks by
    their hashes.
    """

    by_priority: bool
    calls: dict[str, Call]
    """Whose each unfinished request is."""
    unsent: set[str]
    """Those of them that have not been on their way to the engine yet."""

    def add_request(
        self,
        request: EngineCoreRequest,
        prompt: str | None,
        parent_req: ParentRequest | None = None,
        request_index: int = 0,
        queue: RequestOutputCollector | None = None,
    ) -> None:
        call, request_id = CURRENT_CALL.get(), request.request_id
        is_new = request_id not in self.request_states
        if call is not None and not is_new and self._is_of_others(request_id, call):
            raise VLLMValidationError(f"The request id {request_id!r} is in use.", parameter="request_id")
        if call is not None:
            request.cache_salt = call.account.salted(request.cache_salt)
        if call is not None and self.by_priority:
            own = max(-_PRIORITY_STEP // 2, min(_PRIORITY_STEP // 2 - 1, request.priority))
            request.priority = own - call.account.config.priority * _PRIORITY_STEP  # in vLLM the smaller goes first
        if call is not None and not call.has_begun:
            request.arrival_time -= call.held_s
        super().add_request(request, prompt, parent_req, request_index, queue)
        if request_id not in self.request_states:  # the last word of a streamed input that had ended
            self._ended(request_id)
        if call is None or not (is_new or request.resumable):  # the last word has no prompt
            return
        num_tokens = length_from_prompt_token_ids_or_embeds(request.prompt_token_ids, request.prompt_embeds)
        call.add_engine_request(request_id, 0 if request_index else num_tokens, self)
        self.calls[request_id] = call
        if is_new:
            self.unsent.add(request_id)

    def process_outputs(
        self, engine_core_outputs: list[EngineCoreOutput], *args: Any, **options: Any
    ) -> OutputProcessorOutput:
        for output in engine_core_outputs:
            if (call := self.calls.get(output.request_id)) is not None:
                call.put_out(output.request_id, len(output.new_token_ids))
        processed = super().process_outputs(engine_core_outputs, *args, **options)
        for output in engine_core_outputs:
            if output.request_id not in self.request_states:
                self._ended(output.request_id)
        return processed

    def abort_requests(self, request_ids: Iterable[str], internal: bool) -> list[str]:
        if (call := CURRENT_CALL.get()) is not None and not internal:  # by ids that clients choose, and any may name
            known = [request_id for name in request_ids for request_id in self.external_req_ids.get(name, ())]
            request_ids = [request_id for request_id in known if not self._is_of_others(request_id, call)]
            internal = True
        aborted = super().abort_requests(request_ids, internal)
        for request_id in aborted:
            self._ended(request_id)
        return aborted

    def _is_of_others(self, request_id: str, call: Call) -> bool:
        other = self.calls.get(request_id)
        return other is not None and other.account is not call.account

    def _ended(self, request_id: str) -> None:
        self.unsent.discard(request_id)
        if (call := self.calls.pop(request_id, None)) is not None:
            call.end(request_id)
