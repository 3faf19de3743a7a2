# SPDX-License-Identifier: Apache-2.0
"""Async scheduling in the pool: a step is in flight at every token boundary, and drained before anything moves.

vLLM's first model runner, in this process; vLLM switches async scheduling off on the CPU, and the tests leave it on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.helpers.cases import make_cases, mixed
from tests.helpers.crashes import crash_when
from tests.helpers.plain import Case, run_plain
from tests.helpers.v2_runner import async_scheduling_allowed
from tokenpool.memory.ledger import PageUse

pytestmark = pytest.mark.vllm

KINDS = ("llama", "qwen2", "gemma3")
PAGE = 256 << 10
TOKENS = 30


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("models")
    return make_cases(folder, KINDS, mixed(4, TOKENS), async_scheduling=True)


@pytest.fixture(scope="module")
def reference(cases: dict[str, Case]) -> dict[str, dict[str, object]]:
    return run_plain(list(cases.values()), program=("tests.helpers.v2_runner", "first"))


@pytest.fixture(autouse=True)
def a_step_ahead() -> Iterator[None]:
    with async_scheduling_allowed():
        yield


def _pool(*cases: Case, num_pages: int = 128, submit: bool = True):
    from tests.helpers.pooled import PooledModels

    pooled = PooledModels(num_pages * PAGE, PAGE, poison=True)
    for case in cases:
        pooled.add(case)
        if submit:
            pooled.submit(case)
    return pooled


def _assert_equal(cases, reference, pooled) -> None:
    for name, case in cases.items():
        got = pooled.results(name)
        for request in case.requests:
            assert reference[name][request.request_id] == got[request.request_id], request.request_id


def test_a_turn_per_token_changes_no_stream(cases, reference):
    """Three models whose steps in flight interleave give what each gives alone."""
    pooled = _pool(*cases.values())
    pooled.run(each_step=lambda step: step % 20 or pooled.check())
    assert pooled.host.switches > 2 * TOKENS
    _assert_equal(cases, reference, pooled)
    pooled.close()


@pytest.mark.parametrize("late", [False, True])
def test_random_moves_change_no_stream(cases, reference, late):
    """Models that leave while a step of theirs is in flight come back elsewhere and go on as plain vLLM does.

    So they do when they are stepped while their blocks come back.
    """
    from tests.helpers.devices.late_device import LateDevice
    from tests.helpers.stepping import RandomMoves, SteppedModels

    models = SteppedModels(128 * PAGE, PAGE, late=LateDevice() if late else None)
    for case in cases.values():
        models.add(case)
        models.submit(case)
    models.run_all(RandomMoves(models, 1))
    for name in cases:
        if models.swapper.is_out(name):
            models.into(name)
    assert models.drained > 10
    assert models.moved_ids > 100
    _assert_equal(cases, reference, models)
    models.check()
    models.close()


def test_draining_takes_outputs_and_schedules_nothing(cases):
    """After a drain no step is in flight, what was computed is delivered, and the next step goes on from there."""
    pooled = _pool(cases["llama"])
    core = pooled.host.models["llama"].core
    for _ in range(5):
        pooled.run_once()
    steps_ahead = sum(output.total_num_scheduled_tokens > 0 for output in core.watch.in_flight)
    tokens_before = {key: len(result.tokens) for key, result in pooled.results("llama").items()}
    scheduled_before = [request.num_computed_tokens for request in core.scheduler.running]
    assert 1 == steps_ahead == len(core.batch_queue)
    core.drain_batches()
    pooled._collect()
    assert not core.batch_queue and not core.watch.in_flight
    assert scheduled_before == [request.num_computed_tokens for request in core.scheduler.running]
    tokens = {key: len(result.tokens) for key, result in pooled.results("llama").items()}
    assert {key: count + steps_ahead for key, count in tokens_before.items()} == tokens
    pooled.run()
    assert {TOKENS} == {len(result.tokens) for result in pooled.results("llama").values()}
    pooled.close()


def test_the_loop_does_not_sleep_while_tokens_are_in_flight(cases):
    """A step that only waits for the last tokens of a request is work, and not a model that starves."""
    one = replace(cases["llama"], requests=[replace(cases["llama"].requests[0], max_tokens=3)])
    pooled = _pool(one)
    core = pooled.host.models["llama"].core
    did = []
    while core.has_work() or not core.input_queue.empty():
        did.append(pooled.run_once())
        assert len(did) < 20
    assert all(did)
    assert not core.batch_queue
    assert not pooled.host._relief._starved
    pooled.close()


def test_memory_that_is_short_stops_nobody(cases):
    """With too few pages for all, models take each other's and requests are preempted, and all end."""
    roomy = _pool(*cases.values(), submit=False)
    num_weight_pages = roomy.host.ledger.total(PageUse.WEIGHTS)  # fewer where the CPU packs them elsewhere
    roomy.close()
    pooled = _pool(*cases.values(), num_pages=num_weight_pages + 10)
    pooled.run(each_step=lambda step: step % 20 or pooled.check())
    results = [result for name in cases for result in pooled.results(name).values()]
    assert {TOKENS} == {len(result.tokens) for result in results}
    assert pooled.host.allocator.num_reclaims or any(result.preempted for result in results), "memory was not short"
    pooled.close()


@pytest.mark.parametrize("ahead", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("place", ["before", "after", "sampling"])
def test_a_request_that_crashes_the_engine_fails_alone(cases, reference, place, ahead):
    """Wherever a step crashes: one that passes costs no request, and then only the culprit does not end."""
    case = replace(cases["llama"], engine_args={**cases["llama"].engine_args, "async_scheduling": ahead})
    pooled = _pool(case)
    culprit, seen = case.requests[1].request_id, []

    def bad(scheduler_output) -> bool:
        seen.append(culprit in scheduler_output.num_scheduled_tokens)
        return len(seen) == 3 or (seen[-1] and sum(seen) > 8)

    crash_when(pooled, "llama", bad, place)
    pooled.run()
    pooled.check()
    hosted = pooled.host.models["llama"]
    assert bool(hosted.core.batch_queue is not None) == ahead
    assert 3 <= hosted.core.counters.crashed_steps <= 4
    assert 1 == hosted.core.counters.failed_requests
    assert not hosted.quarantine.active
    assert {} == hosted.core.model_executor.driver_worker.worker.model_runner.requests
    for request in case.requests:
        name = request.request_id
        tokens = pooled.results("llama")[name].tokens
        assert pooled.finish_reason("llama", name) == ("error" if name == culprit else "length")
        if name != culprit:
            assert len(tokens) == TOKENS
        if request.temperature == 0:  # a step that is lost has drawn from a seeded generator
            assert reference["llama"][name].tokens[:3] == tokens[:3]
    pooled.close()


def test_a_crash_that_shows_when_a_model_is_drained_is_its_own(cases):
    """A step in flight that crashed is found out while another model asks for memory: that one goes on."""
    pooled = _pool(cases["llama"], cases["qwen2"])
    count = []
    crash_when(pooled, "llama", lambda output: count.append(1) or len(count) == 4, "sampling")
    core = pooled.host.models["llama"].core
    while len(count) < 4:
        pooled.run_once()
    assert core.batch_queue and 0 == core.counters.crashed_steps
    core.drain_batches()
    assert (1, True) == (core.counters.crashed_steps, pooled.host.models["llama"].quarantine.active)
    assert not core.batch_queue and not core.watch.in_flight
    pooled.run()
    pooled.check()
    for name in ("llama", "qwen2"):
        assert {TOKENS} == {len(result.tokens) for result in pooled.results(name).values()}
    pooled.close()


def test_a_turn_that_ended_keeps_no_tokens_back(cases, reference):
    """The outputs of a model's last step are sent behind the first step of the next turn, not in its own next one."""
    pooled = _pool(*cases.values())
    in_flight = []

    def look(_: int) -> None:
        waiting = [name for name, hosted in pooled.host.models.items() if hosted.core.batch_queue]
        in_flight.append(len(waiting))
        assert len(waiting) <= 1, waiting

    pooled.run(each_step=look)
    assert 1 in in_flight
    _assert_equal(cases, reference, pooled)
    pooled.close()


def test_a_crash_of_a_step_whose_requests_are_gone_costs_nothing(cases):
    """A request that was aborted while its last step was in flight leaves nobody to blame: the engine goes on."""
    case = replace(cases["llama"], requests=cases["llama"].requests[:1])
    pooled = _pool(case)
    count = []
    crash_when(pooled, "llama", lambda output: count.append(1) or len(count) == 4, "sampling")
    core = pooled.host.models["llama"].core
    while len(count) < 4:
        pooled.run_once()
    pooled.abort("llama", case.requests[0].request_id)
    pooled.run()
    assert (1, False) == (core.counters.crashed_steps, pooled.host.models["llama"].quarantine.active)
    pooled.submit_one("llama", cases["llama"].requests[1], [])
    pooled.run()
    assert TOKENS == len(pooled.results("llama")[cases["llama"].requests[1].request_id].tokens)
    pooled.close()
