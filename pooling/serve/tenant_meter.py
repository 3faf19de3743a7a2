# SPDX-License-Identifier: Apache-2.0
"""Counts tenants' tokens where vLLM's frontend meets its engine, so that no route has to be known.

Every request of every route ends in `AsyncLLM.add_request`, which registers it with the `OutputProcessor` in the task
that serves the call; every token comes through that object too.
"""

from __future__ import annotations

from typing import Any

from vllm.utils import length_from_prompt_token_ids_or_embeds
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest

from tokenpool.serve.tenants import CURRENT_CALL

_PRIORITY_STEP = 1 << 20
"""Above all that a client may give as `priority`: it orders the tenant's own requests only."""


def meter(engine: AsyncLLM) -> None:
    """Count what `engine` is asked and what it puts out, on the account of the call that it is for."""
    engine.output_processor.__class__ = _MeteredOutputProcessor
    engine.output_processor.by_priority = engine.scheduler_config.policy == "priority"


class _MeteredOutputProcessor(OutputProcessor):
    """Requests outside of a tenant's call are left alone.

    A request that was held back keeps the time at which it came, so that its due times are those that its client
    knows. Where the model schedules by priority, that of the tenant goes before what the client asks for.
    """

    by_priority: bool

    def add_request(
        self,
        request: EngineCoreRequest,
        prompt: str | None,
        parent_req: ParentRequest | None = None,
        request_index: int = 0,
        queue: RequestOutputCollector | None = None,
    ) -> None:
        call = CURRENT_CALL.get()
        is_new = request.request_id not in self.request_states
        if call is not None and self.by_priority:
            own = max(-_PRIORITY_STEP // 2, min(_PRIORITY_STEP // 2 - 1, request.priority))
            request.priority = own - call.account.config.priority * _PRIORITY_STEP  # in vLLM the smaller goes first
        if call is not None and not call.has_begun:
            request.arrival_time -= call.held_s
        super().add_request(request, prompt, parent_req, request_index, queue)
        if call is None or not (is_new or request.resumable):  # the last word of a streamed input has no prompt
            return
        num_tokens = length_from_prompt_token_ids_or_embeds(request.prompt_token_ids, request.prompt_embeds)
        call.add_engine_request(request.request_id, 0 if request_index else num_tokens, self)
        self.request_states[request.request_id].tokenpool_call = call

    def process_outputs(
        self, engine_core_outputs: list[EngineCoreOutput], *args: Any, **options: Any
    ) -> OutputProcessorOutput:
        for output in engine_core_outputs:
            call = getattr(self.request_states.get(output.request_id), "tokenpool_call", None)
            if call is not None:
                call.put_out(len(output.new_token_ids))
        return super().process_outputs(engine_core_outputs, *args, **options)
