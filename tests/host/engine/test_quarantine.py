# SPDX-License-Identifier: Apache-2.0
"""A request that crashes an engine step fails alone; the others, of its model and of other models, go on."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.cases import greedy, make_cases
from tests.helpers.crashes import crash_when
from tests.helpers.plain import Case, RequestSpec, prompts_for
from tokenpool.memory.devices.cuda_driver import CudaError

pytestmark = pytest.mark.vllm

PAGE = 256 << 10


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return make_cases(tmp_path_factory.mktemp("models"), ("llama", "qwen2"), greedy(4, 30))


def _pool(cases):
    from tests.helpers.pooled import PooledModels

    pooled = PooledModels(32 << 20, PAGE)
    for case in cases.values():
        pooled.add(case)
        pooled.submit(case)
    return pooled


@pytest.mark.parametrize(("first_crash_at_step", "error"), [(0, RuntimeError), (5, RuntimeError), (5, SystemExit)])
def test_only_the_request_that_crashes_the_step_fails(cases, first_crash_at_step, error):
    """Whether at its prefill or later, the culprit ends with an error and all others with their full output.

    Also where the code of the model calls sys.exit.
    """
    pooled = _pool(cases)
    seen = []

    def poisonous(scheduler_output) -> bool:
        seen.append("llama-2" in scheduler_output.num_scheduled_tokens)
        return seen[-1] and sum(seen) > first_crash_at_step

    crash_when(pooled, "llama", poisonous, error=lambda: error("of its making"))
    pooled.run()
    pooled.check()
    assert pooled.finish_reason("llama", "llama-2") == "error"
    for model, case in cases.items():
        for request in case.requests:
            if request.request_id != "llama-2":
                assert pooled.finish_reason(model, request.request_id) == "length"
                assert len(pooled.results(model)[request.request_id].tokens) == 30
    counters = pooled.host.models["llama"].core.counters
    assert counters.failed_requests == 1
    assert not pooled.host.models["llama"].quarantine.active
    core, quarantine = pooled.host.models["llama"].core, pooled.host.models["llama"].quarantine
    assert getattr(core.scheduler, quarantine._limit) == core.vllm_config.scheduler_config.max_num_seqs
    pooled.close()


def test_a_step_that_crashes_once_costs_no_request(cases):
    """After a passing failure every request of the batch is recomputed and ends as it would have."""
    undisturbed, disturbed = _pool(cases), None
    undisturbed.run()
    expected = {r: v.tokens for r, v in undisturbed.results("llama").items()}
    undisturbed.close()
    disturbed = _pool(cases)
    steps = []
    crash_when(disturbed, "llama", lambda output: steps.append(1) or len(steps) == 4)
    disturbed.run()
    assert {r: len(v.tokens) for r, v in disturbed.results("llama").items()} == {r: 30 for r in expected}
    # Recomputation moves the last bits, so a stream may leave its path, but not from the start.
    assert all(v.tokens[:3] == expected[r][:3] for r, v in disturbed.results("llama").items())
    disturbed.check()
    disturbed.close()


def test_an_engine_that_always_crashes_ends_the_host(cases):
    """When every step crashes the host gives up, so that its supervisor can restart it."""
    from tokenpool.errors import EngineLostError

    pooled = _pool(cases)
    crash_when(pooled, "llama", lambda output: True)
    for request in prompts_for(7, 6):
        pooled.submit_one("llama", RequestSpec(f"more-{len(request)}", request, max_tokens=5), [])
    with pytest.raises(EngineLostError, match="crashes on every step"):
        pooled.run()


def _short() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory")


def _refused() -> Exception:
    """As the driver says it when it has no page to give."""
    return CudaError("cuMemCreate", 2, "CUDA_ERROR_OUT_OF_MEMORY")


@pytest.mark.parametrize("error", [_short, _refused])
def test_a_step_without_memory_is_tried_once_more(cases, error):
    """What nobody uses is given back first; no request fails, whatever else runs."""
    pooled = _pool(cases)
    steps, released = [], []
    pooled.host.models["llama"].quarantine._release = lambda: released.append(1)
    crash_when(pooled, "llama", lambda output: steps.append(1) or len(steps) == 4, error=error)
    pooled.run()
    pooled.check()
    assert [1] == released
    assert 0 == pooled.host.models["llama"].core.counters.failed_requests
    for model, case in cases.items():
        assert ["length"] * 4 == [pooled.finish_reason(model, request.request_id) for request in case.requests]
    pooled.close()


def test_a_request_for_which_there_is_never_memory_fails_alone(cases):
    """After one more try requests run one at a time, and only those fail that have no memory alone."""
    pooled = _pool(cases)
    crash_when(pooled, "llama", lambda output: "llama-2" in output.num_scheduled_tokens, error=_short)
    pooled.run()
    pooled.check()
    assert ["length", "length", "error", "length"] == [pooled.finish_reason("llama", f"llama-{i}") for i in range(4)]
    pooled.close()


@pytest.mark.parametrize("in_schedule", [pytest.param(False, marks=pytest.mark.slow), True])
def test_without_memory_all_requests_fail_and_the_host_lives(cases, in_schedule):
    """Ten steps in a row, in the forward pass or where blocks are handed out: the engine is not lost, others go on."""
    pooled = _pool(cases)
    for index, prompt in enumerate(prompts_for(7, 6)):
        pooled.submit_one("llama", RequestSpec(f"more-{index}", prompt, max_tokens=5), [])
    broken = [True]
    crash_when(pooled, "llama", lambda output: broken[0] and not in_schedule, error=_short)
    pool = pooled.host.models["llama"].build.pool
    get_new_blocks = pool.get_new_blocks

    def no_blocks(count: int):
        if broken[0] and in_schedule:
            raise _refused()
        return get_new_blocks(count)

    pool.get_new_blocks = no_blocks
    pooled.run()
    pooled.check()
    core = pooled.host.models["llama"].core
    assert 10 == core.counters.failed_requests
    assert ["length"] * 4 == [pooled.finish_reason("qwen2", f"qwen2-{i}") for i in range(4)]
    broken[0] = False
    pooled.submit_one("llama", RequestSpec("after", prompts_for(8, 1)[0], max_tokens=5), [])
    pooled.run()
    assert "length" == pooled.finish_reason("llama", "after")
    pooled.close()
