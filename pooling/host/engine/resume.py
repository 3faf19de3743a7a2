# SPDX-License-Identifier: Apache-2.0
"""Goes on with a request that another engine began, by building anew the state that vLLM's own preemption leaves.

vLLM computes a preempted request again from its prompt and its output tokens. All that counts output tokens, such as
penalties, min_tokens, max_tokens, stop tokens and logits processors, goes on as if nothing had happened. A request
whose first engine is gone is put into the same state; the scheduler then does the rest. What is restored here is what
a preempted request keeps: output tokens, the state of its grammar, and in the first model runner its entry in the
table of requests with its random generator. The second runner keeps nothing of a preempted request.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from vllm.sampling_params import SamplingType
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from tokenpool.errors import HostError

logger = logging.getLogger(__name__)

Draw = Callable[[torch.Generator], Any]


def restore_request(request: Request, delivered: list[int], manager: StructuredOutputManager) -> None:
    """Make a fresh `request` one that was preempted after it had output the tokens `delivered`.

    Waits for its grammar to be compiled. Called before the scheduler knows the request.
    """
    if not delivered:
        return
    if request.structured_output_request is None:
        request.append_output_token_ids(delivered)
    elif not _replay_grammar(request, delivered, manager):
        return  # the status is still that of a request without grammar, which the scheduler fails
    request.status = RequestStatus.PREEMPTED
    request.prefill_stats = None  # they went out with the first token


def _replay_grammar(request: Request, delivered: list[int], manager: StructuredOutputManager) -> bool:
    structured = request.structured_output_request
    pending = structured._grammar
    if isinstance(pending, Future) and pending.exception() is not None:
        return False
    for token_id in delivered:  # one by one: where reasoning ends depends on the pieces that the parser sees
        request.append_output_token_ids(token_id)
        if not _accept(manager, request, [token_id]):
            failed: Future[Any] = Future()
            failed.set_exception(HostError(f"the grammar refuses token {token_id}, which it allowed before"))
            structured.grammar = failed
            logger.error("request cannot be continued id=%s: its grammar refuses its tokens", request.request_id)
            return False
    return True


def _accept(manager: StructuredOutputManager, request: Request, token_ids: list[int]) -> bool:
    if hasattr(manager, "accept_tokens"):
        return manager.accept_tokens(request, token_ids)
    # vLLM 0.29: the scheduler does the steps itself.
    if not manager.should_advance(request, new_token_ids=token_ids):
        return True
    token_ids = manager.trim_reasoning_for_advance(request, token_ids)
    return not token_ids or request.structured_output_request.grammar.accept_tokens(request.request_id, token_ids)


def restore_in_worker(worker: Any, data: NewRequestData, output_token_ids: list[int]) -> None:
    """Enter a preempted request into the table of vLLM's first model runner; for `Executor.collective_rpc`."""
    runner = worker.model_runner
    params = data.sampling_params
    state = CachedRequestState(
        req_id=data.req_id,
        prompt_token_ids=data.prompt_token_ids,
        prompt_embeds=data.prompt_embeds,
        prompt_is_token_ids=data.prompt_is_token_ids,
        mm_features=data.mm_features,
        sampling_params=params,
        pooling_params=data.pooling_params,
        generator=None,
        block_ids=data.block_ids,
        num_computed_tokens=0,
        output_token_ids=output_token_ids,
        lora_request=data.lora_request,
    )
    if params is not None and params.sampling_type == SamplingType.RANDOM_SEED:
        state.generator = _ContinuedGenerator(state, runner)
    runner.requests[data.req_id] = state
    if runner.uses_mrope:
        runner._init_mrope_positions(state)
    if getattr(runner, "uses_xdrope_dim", 0):  # vLLM 0.29
        runner._init_xdrope_positions(state)


class _ContinuedGenerator(torch.Generator):
    """A request's random generator that has drawn what the request's output tokens took.

    vLLM draws for every request of a step, and takes that back by the generator's offset where the step computed only
    a part of the prompt. Generators of the CPU have no offset, and vLLM 0.32 crashes there; this one can do it.
    """

    def __new__(cls, state: CachedRequestState, runner: Any) -> _ContinuedGenerator:
        return super().__new__(cls, device=runner.device)

    def __init__(self, state: CachedRequestState, runner: Any) -> None:
        self._state = state
        self._draw = _draw_of(self, runner)
        self._renew()

    def get_offset(self) -> int:
        """Nothing that means anything; `set_offset` does not need it."""
        return 0

    def set_offset(self, offset: int) -> None:
        """Take back what was drawn since the last output token."""
        self._renew()

    def _renew(self) -> None:
        self.manual_seed(self._state.sampling_params.seed)
        for _ in self._state.output_token_ids:
            self._draw(self)


def _draw_of(generator: torch.Generator, runner: Any) -> Draw:
    """What the runner's sampler draws for one token, as the cheapest call that leaves a generator in the same state."""
    logits = torch.zeros(1, runner.input_batch.vocab_size, device=runner.device)

    def sample(used: torch.Generator) -> None:
        runner.sampler.topk_topp_sampler(logits.clone(), {0: used}, None, None)

    def draw_seed(used: torch.Generator) -> None:
        torch.randint(0, 2**31, (1,), generator=used, dtype=torch.long, device=used.device)

    def draw_noise(used: torch.Generator) -> None:
        logits[0].exponential_(generator=used)

    after = _state_after(sample, generator)
    for draw in (draw_seed, draw_noise):
        if torch.equal(_state_after(draw, generator), after):
            return draw
    return sample


def _state_after(draw: Draw, generator: torch.Generator) -> torch.Tensor:
    trial = torch.Generator(device=generator.device)
    trial.set_state(generator.get_state())
    draw(trial)
    return trial.get_state()
