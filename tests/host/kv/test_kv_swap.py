# SPDX-License-Identifier: Apache-2.0
"""Requests whose KV leaves the device and comes back elsewhere give the tokens and logprobs of plain vLLM."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.helpers.cases import make_cases, mixed
from tests.helpers.plain import Case, RequestSpec, run_plain
from tokenpool.memory.host_ledger import HostUse

pytestmark = pytest.mark.vllm

KINDS = ("llama", "qwen2", "gemma3", "mixtral")
"""gemma3 is a hybrid: blocks of several groups lie in the same bytes, and leave a sliding window."""
PAGE = 256 << 10
ROOMY = 64 << 20


def _again(requests: list[RequestSpec]) -> list[RequestSpec]:
    """The same requests once more, under other names."""
    return [replace(request, request_id=f"again-{request.request_id}") for request in requests]


def _short(case: Case) -> list[RequestSpec]:
    """A few requests of a case with fewer tokens, for runs of one request after another."""
    return [replace(request, max_tokens=20) for request in case.requests[:3]]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("models")
    return make_cases(folder, KINDS, mixed(5, 60), enable_prefix_caching=True)


@pytest.fixture(scope="module")
def reference(cases: dict[str, Case]) -> dict[str, dict[str, object]]:
    """Plain vLLM: each case alone, and one request after another with each prompt twice ("<kind>-twice")."""
    together = list(cases.values())
    twice = [
        Case(f"{c.name}-twice", c.model, {**c.engine_args, "max_num_seqs": 1}, [*_short(c), *_again(_short(c))])
        for c in together
    ]
    return run_plain([*together, *twice])


def _assert_equal(expected, actual, request_ids) -> None:
    for request_id in request_ids:
        want, got = expected[request_id], actual[request_id]
        assert 0 == want.preempted == got.preempted
        assert want.tokens == got.tokens, f"{request_id}: tokens differ"
        assert want.logprobs == got.logprobs, f"{request_id}: logprobs differ"


@pytest.fixture
def stepped():
    from tests.helpers.stepping import SteppedModels

    models = SteppedModels(ROOMY, PAGE)
    yield models
    models.check()
    names = list(models.host.models)
    models.close()
    for name in names:
        models.swapper.forget(name)
    models.swapper.check()
    host = models.swapper.tier.host
    assert (0, 0) == (host.total(HostUse.PAUSED_KV), host.total(HostUse.CACHED_KV))


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_random_moves_change_no_stream(cases, reference, stepped, seed):
    """Four models leave and return at random token boundaries, never into the same blocks; the prefix cache lives."""
    from tests.helpers.stepping import RandomMoves

    for case in cases.values():
        stepped.add(case)
    for case in cases.values():
        stepped.submit(case)
    moves = RandomMoves(stepped, seed)
    stepped.run_all(moves)
    for name in list(cases):
        if stepped.swapper.is_out(name):
            stepped.into(name)
    assert moves.num_moves > 50
    assert stepped.moved_ids > 200
    for name, case in cases.items():
        _assert_equal(reference[name], stepped.results(name), [r.request_id for r in case.requests])
        for request in _again(_short(case)):
            stepped.submit_one(name, request, [])
            stepped.run_all()
            if len(request.prompt_token_ids) > 3 * 32:
                assert stepped.num_cached_tokens(name, request.request_id) >= 2 * 32
    stepped.check()


@pytest.mark.slow
def test_requests_that_arrive_and_end_meanwhile(cases, stepped):
    """Aborted and new requests of models that are out leave every other stream as it is without any move."""
    from tests.helpers.stepping import RandomMoves, SteppedModels

    late_at, abort_at = 20, 30

    def play(models: SteppedModels, moves) -> dict[str, dict[str, object]]:
        """Requests 0 to 2 at first; 3 and 4 come, and 1 and 3 end, at fixed steps of the model itself."""
        done: set[tuple[str, str]] = set()

        def once(name: str, what: str) -> bool:
            if (name, what) in done:
                return False
            done.add((name, what))
            return True

        def each_step(name: str) -> None:
            case = cases[name]
            if models.steps[name] >= late_at and once(name, "late"):
                for request in case.requests[3:]:
                    models.submit_one(name, request, [])
            if models.steps[name] >= abort_at and once(name, "abort"):
                if moves and not models.swapper.is_out(name):
                    models.out(name)
                models.abort(name, case.requests[1].request_id, case.requests[3].request_id)
                models.host.models[name].core._process_input_queue()
                models.check()
            if moves:
                moves(name)

        for case in cases.values():
            models.add(case)
        for case in cases.values():
            for request in case.requests[:3]:
                models.submit_one(case.name, request, [])
        models.run_all(each_step)
        return {name: models.results(name) for name in cases}

    moved = play(stepped, RandomMoves(stepped, 3))
    still = SteppedModels(ROOMY, PAGE)
    try:
        expected = play(still, None)
    finally:
        still.close()
    assert stepped.moved_ids > 200
    for name, case in cases.items():
        _assert_equal(expected[name], moved[name], [case.requests[i].request_id for i in (0, 2, 4)])
        for i in (1, 3):
            assert len(moved[name][case.requests[i].request_id].tokens) < 60
        assert 0 == stepped.host.models[name].build.pool.num_used_blocks


def test_the_host_tier_gives_back_what_the_device_lost(cases, reference, stepped):
    """Prompts seen before, all of whose blocks left the device, hit from host memory and give plain vLLM's streams."""
    for case in cases.values():
        stepped.add(case, max_num_seqs=1)
    for name, case in cases.items():
        expected = reference[f"{name}-twice"]
        requests = _short(case)
        for request in requests:
            stepped.submit_one(name, request, [])
        stepped.run_all()
        _assert_equal(expected, stepped.results(name), [r.request_id for r in requests])
        for request in _again(requests):
            stepped.evict(name)
            pool = stepped.host.models[name].build.pool
            assert 0 == pool.num_slabs == len(pool.cached_block_hash_to_block)
            hits = stepped.swapper.tier.counters.hits
            stepped.submit_one(name, request, [])
            stepped.run_all()
            full_blocks = (len(request.prompt_token_ids) - 1) // 32
            assert full_blocks * 32 == stepped.num_cached_tokens(name, request.request_id)
            assert (full_blocks > 0) == (stepped.swapper.tier.counters.hits > hits)
            stepped.check()
        _assert_equal(expected, stepped.results(name), [r.request_id for r in _again(requests)])


def test_removing_a_model_that_is_out_frees_its_memory(cases, stepped):
    """A model whose requests all ended while it was out is removed like any other."""
    for name in ("llama", "qwen2"):
        stepped.add(cases[name])
        stepped.submit(cases[name])
    for _ in range(10):
        stepped.step("llama")
    stepped.out("llama")
    stepped.abort("llama", *[request.request_id for request in cases["llama"].requests])
    stepped.step("llama")
    assert 0 == stepped.swapper.bytes_out(stepped.host.models["llama"])
    stepped.into("llama")
    stepped.out("llama")
    stepped.swapper.forget("llama")
    stepped.host.remove_model("llama")
    stepped.check()
    stepped.run_all()
    assert {60} == {len(result.tokens) for result in stepped.results("qwen2").values()}
