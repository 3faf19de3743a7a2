# SPDX-License-Identifier: Apache-2.0
"""A request whose grammar computes long waits for it outside of steps; the others' steps go on."""

from __future__ import annotations

import random
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest

from tests.helpers.cases import greedy, make_cases
from tests.helpers.plain import Case
from tests.helpers.v2_runner import async_scheduling_allowed
from tokenpool.host.engine.grammar_hold import CAN_HOLD

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not CAN_HOLD, reason="this vLLM cannot drop a token of a step: its steps wait for late masks"),
]

PAGE = 256 << 10
REGEX = "(red|green|blue){20,30}"
GREEDY: dict[str, Any] = {"temperature": 0.0}
SEEDED: dict[str, Any] = {"temperature": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return make_cases(tmp_path_factory.mktemp("models"), ("llama",), greedy(2, 60))


class Masks:
    """Lets the masks of all grammars through, or keeps some waiting until `num_steps` steps have run meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, is_kept: Any) -> None:
        from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

        self.gate, self.num_made, self.kept = threading.Event(), 0, 0
        fill = XgrammarGrammar.fill_bitmask

        def fill_late(grammar: Any, bitmask: Any, index: int) -> None:
            self.num_made += 1
            if self.num_made > 1 and is_kept(self.num_made):
                self.kept += 1
                assert self.gate.wait(60)
                self.gate.clear()
                self._compute()
            fill(grammar, bitmask, index)

        monkeypatch.setattr(XgrammarGrammar, "fill_bitmask", fill_late)

    @staticmethod
    def _compute() -> None:
        """So long that the grammar counts as slow."""
        from tokenpool.host.engine.grammar_cost import SLOW_S

        end_s = time.thread_time() + 1.2 * SLOW_S
        while time.thread_time() < end_s:
            pass


def _ask(pooled: Any, request_id: str, **params: Any) -> None:
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams
    from vllm.v1.engine import EngineCoreRequest, EngineCoreRequestType

    from tests.helpers.pooled import _Collected

    core = pooled.host.models["llama"].core
    sampling = SamplingParams(**params, structured_outputs=StructuredOutputsParams(regex=REGEX))
    sampling.structured_outputs._backend = "xgrammar"
    message = EngineCoreRequest(
        request_id=request_id, prompt_token_ids=[5, 6, 7], mm_features=None, sampling_params=sampling,
        pooling_params=None, arrival_time=time.time(), lora_request=None, cache_salt=None, data_parallel_rank=None,
    )  # fmt: skip
    queued = core.preprocess_add_request(message)
    queued[0].structured_output_request._grammar.result(60)
    pooled._collected["llama", request_id] = _Collected(request=queued[0])
    core.input_queue.put((EngineCoreRequestType.ADD, queued))


def _play(
    case: Case, masks: Masks | None, stack: ExitStack, params: dict[str, Any], num_preempted: int = 0
) -> tuple[dict[str, list[int]], int, int]:
    """Tokens by request, preemptions of the one with a grammar, and steps of the others while its mask was kept.

    The first `num_preempted` times that its mask is kept, the request is preempted meanwhile, as by want of memory.
    """
    from tests.helpers.pooled import PooledModels

    pooled = PooledModels(64 * PAGE, PAGE)
    stack.callback(pooled.close)
    pooled.add(case)
    pooled.submit(case)
    _ask(pooled, "told", max_tokens=24, **params)
    core, beside = pooled.host.models["llama"].core, 0

    def look(step: int) -> None:
        nonlocal beside
        if masks is None or masks.kept == look.seen:
            return
        scheduler = core.scheduler
        told = scheduler.requests.get("told")
        if told in scheduler.running and look.preempted < num_preempted:
            look.preempted += 1
            scheduler.running.remove(told)
            scheduler._preempt_request(told, time.monotonic())
        scheduled = core.watch.scheduled.num_scheduled_tokens
        alone = told is not None and len(scheduler.requests) == 1
        beside += bool(scheduled) and "told" not in scheduled
        look.steps += 1
        if look.steps >= 3 or alone:
            look.seen, look.steps = masks.kept, 0
            masks.gate.set()

    look.seen = look.steps = look.preempted = 0
    pooled.run(each_step=look, max_steps=200_000)
    assert look.preempted == num_preempted
    results = pooled.results("llama")
    pooled.check()
    return {name: result.tokens for name, result in results.items()}, results["told"].preempted, beside


def _late(seed: int) -> set[int]:
    draw = random.Random(seed)
    return {number for number in range(2, 30) if draw.random() < 0.4} | {4, 5, 6}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_late_masks_change_no_token_and_hold_up_nobody(cases, monkeypatch, seed):
    """Whichever masks are late, singly or in a row: the same tokens as without, and the others step meanwhile."""
    with ExitStack() as stack:
        expected = _play(cases["llama"], None, stack, GREEDY)[0]
    masks = Masks(monkeypatch, _late(seed).__contains__)
    with ExitStack() as stack:
        found, preemptions, beside = _play(cases["llama"], masks, stack, GREEDY)
    assert expected == found
    assert masks.kept > 3 and 1 <= preemptions < masks.kept, "known to be slow, it pauses where it is"
    assert beside > 0


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("num_preempted", [pytest.param(0, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_seeded_request_draws_each_token_once(cases, monkeypatch, seed, num_preempted, ahead):
    """No token of it is dropped for a late mask: the first runner would draw it anew with other random numbers."""
    case = replace(cases["llama"], engine_args=cases["llama"].engine_args | {"async_scheduling": ahead})
    with async_scheduling_allowed(), ExitStack() as stack:
        expected, _, _ = _play(case, None, stack, SEEDED)
    masks = Masks(monkeypatch, _late(seed).__contains__)
    with async_scheduling_allowed(), ExitStack() as stack:
        found, preemptions, beside = _play(case, masks, stack, SEEDED, num_preempted)
    assert expected == found
    assert masks.kept > 3 and beside > 0
    assert preemptions == num_preempted
