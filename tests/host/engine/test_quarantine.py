# SPDX-License-Identifier: Apache-2.0
"""A request that crashes an engine step fails alone; the others, of its model and of other models, go on."""

from __future__ import annotations

import pytest

from tests.helpers.cases import greedy, make_cases
from tests.helpers.crashes import crash_when
from tests.helpers.plain import Case, RequestSpec, prompts_for

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


@pytest.mark.parametrize("first_crash_at_step", [0, 5])
def test_only_the_request_that_crashes_the_step_fails(cases, first_crash_at_step):
    """Whether at its prefill or later, the culprit ends with an error and all others with their full output."""
    pooled = _pool(cases)
    seen = []

    def poisonous(scheduler_output) -> bool:
        seen.append("llama-2" in scheduler_output.num_scheduled_tokens)
        return seen[-1] and sum(seen) > first_crash_at_step

    crash_when(pooled, "llama", poisonous)
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
