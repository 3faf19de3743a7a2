# SPDX-License-Identifier: Apache-2.0
"""While KV is on its way, requests whose blocks are there run, and nobody reads, gets or takes what is not there.

Streams are compared with those of a pool in which nothing moves, which other tests compare with plain vLLM. Requests
that are left out of a step make it smaller, so linear layers are made to round alike in steps of any size.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.helpers.cases import make_cases, mixed
from tests.helpers.devices.late_device import LateDevice
from tests.helpers.devices.rounding import round_alike
from tests.helpers.plain import Case, RequestSpec

pytestmark = pytest.mark.vllm

KINDS = ("llama", "gemma3")
PAGE = 256 << 10
TOKENS = 40


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("models")
    return make_cases(folder, KINDS, mixed(5, TOKENS), enable_prefix_caching=True)


@pytest.fixture(scope="module")
def reference(cases: dict[str, Case]) -> dict[str, dict[str, object]]:
    from tests.helpers.pooled import PooledModels

    pool = PooledModels(64 << 20, PAGE, movable_weights=True, host_memory=256 << 20)
    for case in cases.values():
        _add(pool, case)
    pool.run()
    counters = pool.host.swapper.counters
    results = {name: pool.results(name) for name in cases}
    pool.close()
    assert 0 == counters.outs
    return results


def _add(pool, case: Case) -> None:
    pool.add(case)
    runner = pool.host.models[case.name].core.model_executor.driver_worker.worker.model_runner
    assert round_alike(runner.get_model()) >= 8
    pool.submit(case)


def _assert_equal(reference, pooled, kinds, least: int) -> None:
    compared = 0
    for kind in kinds:
        for request_id, got in pooled.results(kind).items():
            want = reference[kind][request_id]
            if not (got.preempted or want.preempted):
                assert want.tokens == got.tokens, f"{request_id}: tokens differ"
                assert want.logprobs == got.logprobs, f"{request_id}: logprobs differ"
                compared += 1
    assert compared >= least, f"only {compared} streams were compared"


class Returning:
    """One model, stepped by hand, that has left and whose blocks are on their way back, none there yet."""

    def __init__(self, case: Case, num_requests: int = 3) -> None:
        from tests.helpers.stepping import SteppedModels

        self.device = LateDevice(chance=0.0)
        self.models = SteppedModels(64 << 20, PAGE, late=self.device)
        self.models.add(case)
        self.name = case.name
        for request in case.requests[:num_requests]:
            self.models.submit_one(case.name, request, [])
        for _ in range(4):
            self.models.step(case.name)
        self.models.out(case.name)
        assert not self.device.queue, "leaving waits for its copies where pages are needed at once"
        self.models.into(case.name)
        self.core = self.models.host.models[case.name].core
        self.pool = self.models.host.models[case.name].build.pool

    def ran(self) -> list[str]:
        """Which requests were in the last step."""
        return sorted(self.core.watch.scheduled.num_scheduled_tokens)

    def finish(self) -> None:
        self.device.chance = 1.0
        self.models.run_all()
        self.models.swapper.poll()
        self.models.check()
        assert self.pool.transit is None


@pytest.fixture
def returning(cases):
    made = Returning(cases["llama"])
    yield made
    made.models.close()


def test_a_request_runs_as_soon_as_its_blocks_are_there(returning, reference):
    """Each in the order in which it runs, the others are left out meanwhile, and all give what they give alone."""
    assert 3 == len(returning.device.queue), "one group of copies for each request"
    waits, seen = returning.device.waits, []
    for _ in range(3):  # with none there, the first runs after its own blocks
        returning.models.step("llama")
        seen.append(returning.ran())
        if returning.device.queue:
            returning.device.run_to(returning.device.queue[0])
    assert [["llama-0"], ["llama-0", "llama-1"], ["llama-0", "llama-1", "llama-2"]] == seen
    assert waits == returning.device.waits, "the host waited for a copy"
    returning.finish()
    results = {request: result.tokens for request, result in returning.models.results("llama").items()}
    assert {request: reference["llama"][request].tokens for request in results} == results


def test_a_request_that_ends_waits_for_the_copies_of_its_blocks(returning):
    """Its blocks could be handed to others at once, and be overwritten by the copy."""
    assert len(returning.device.queue) == 3
    returning.models.abort("llama", "llama-1")
    returning.core._process_input_queue()
    assert 1 == len(returning.device.queue), "copies end in their order, up to those of the request"
    returning.models.check()
    returning.finish()
    assert {TOKENS} == {len(r.tokens) for k, r in returning.models.results("llama").items() if k != "llama-1"}


def test_a_prefix_hit_on_a_block_that_is_late_waits_for_it(returning, cases, reference):
    """A new request that shares a prompt with one that is returning reads the blocks after they are there."""
    longest = max(cases["llama"].requests[:3], key=lambda request: len(request.prompt_token_ids))
    assert len(longest.prompt_token_ids) > 32
    again = replace(longest, request_id="again")
    returning.models.submit_one("llama", again, [])
    returning.models.step("llama")
    assert "again" in returning.ran()
    assert returning.models.num_cached_tokens("llama", "again") >= 32
    returning.finish()
    results = returning.models.results("llama")
    assert results[longest.request_id].tokens == reference["llama"][longest.request_id].tokens
    assert results["again"].tokens == results[longest.request_id].tokens


def test_nobody_is_left_out_when_free_blocks_are_few(returning, monkeypatch):
    """The scheduler would preempt whom it sees: all run, after all blocks."""
    with monkeypatch.context() as patched:
        patched.setattr(type(returning.pool), "get_num_free_blocks", lambda pool: 2)
        returning.models.step("llama")
    assert ["llama-0", "llama-1", "llama-2"] == returning.ran()
    assert not returning.device.queue
    returning.finish()


def test_a_model_that_leaves_again_or_is_removed_settles_first(returning):
    """Both wait for the copies that are under way; nothing is lost."""
    returning.models.step("llama")
    assert returning.device.queue
    returning.models.out("llama")
    assert not returning.device.queue
    returning.models.into("llama")
    returning.models.abort("llama", "llama-0", "llama-1", "llama-2")
    returning.models.run_all()
    returning.models.host.remove_model("llama")
    returning.models.check()
    assert not returning.device.queue
    assert 0 == returning.models.host.host_ledger.total("paused_kv")


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_late_copies_change_no_stream(cases, reference, seed):
    """Under the host's own loop, with weights that move too and random turns; other models step meanwhile."""
    from tests.helpers.pooled import PooledModels
    from tests.host.test_switching import RandomTurns

    device = LateDevice(seed, chance=0.2)
    pool = PooledModels(13 * PAGE, PAGE, device=device, poison=True, movable_weights=True, host_memory=256 << 20)
    pool.host._turns._policy = RandomTurns(seed)
    third = replace(cases["llama"], name="third", requests=[_renamed(r) for r in cases["llama"].requests])
    for case in (*cases.values(), third):
        _add(pool, case)
    left_out = beside_leaving = 0

    def each_step(step: int) -> None:
        nonlocal left_out, beside_leaving
        hosted = pool.host._current
        if hosted is not None and (ran := hosted.core.watch.scheduled) is not None and hosted.build.pool.transit:
            left_out += len(ran.num_scheduled_tokens) < len(hosted.core.scheduler.running)
        beside_leaving += bool(pool.host.swapper.leaving())
        if step % 25 == 0:
            pool.check()

    pool.run(each_step=each_step)
    assert left_out > 5, f"only {left_out} steps left a request out"
    assert beside_leaving > 1, f"only {beside_leaving} steps were taken while another model left"
    _assert_equal(reference, pool, KINDS, least=5)
    for request_id, got in pool.results("third").items():
        want = reference["llama"][request_id.removeprefix("third-")]
        assert got.preempted or want.preempted or want.tokens == got.tokens
    pool.check()
    pool.close()


def _renamed(request: RequestSpec) -> RequestSpec:
    return replace(request, request_id=f"third-{request.request_id}")
