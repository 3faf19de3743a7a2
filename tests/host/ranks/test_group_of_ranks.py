# SPDX-License-Identifier: Apache-2.0
"""Real engines on two ranks: builds beside steps, failures of one rank, and random numbers that all ranks share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.cases import greedy, make_cases
from tests.helpers.plain import Case, RequestSpec, prompts_for

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PAGE = 64 << 10
TOKENS = 60


def random_state(wrapper: Any) -> torch.Tensor:
    """What the rank draws from."""
    return torch.get_rng_state()


def environment(wrapper: Any) -> dict[str, str]:
    """What the process of the rank has."""
    return dict(os.environ)


def collectives_of_a_step(wrapper: Any) -> int:
    """How often a dummy step of the model calls the group."""
    from tokenpool.host.engine.process_groups import counted_collectives

    with counted_collectives() as counted:
        wrapper.worker.model_runner._dummy_run(16)
    return counted.calls


def fail_once(wrapper: Any, rank: int, method: str, error: type[Exception] = torch.OutOfMemoryError) -> None:
    """Let a method of the rank's worker fail the next time, after it has done its work with the others."""
    worker = wrapper.worker
    if worker.rank != rank:
        return
    original = getattr(worker, method)

    def failing(*args: Any, **kwargs: Any) -> Any:
        delattr(worker, method)
        original(*args, **kwargs)
        raise error(f"rank {rank} is short of memory")

    setattr(worker, method, failing)


def fail_next_build(wrapper: Any, rank: int, place: str) -> None:
    """Let the rank's next build fail, at its third point or where it takes its weights over."""
    if wrapper.worker.rank != rank:
        return
    from tokenpool.host.ranks.rank_models import _FollowedBuild

    original, calls = getattr(_FollowedBuild, place), []

    def failing(self: Any, *args: Any) -> Any:
        calls.append(place)
        if place == "pause" and len(calls) < 3:
            return original(self, *args)
        setattr(_FollowedBuild, place, original)
        raise torch.OutOfMemoryError(f"rank {rank} is short of memory")

    setattr(_FollowedBuild, place, failing)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_cases(tmp_path_factory.mktemp("models"), ("llama",), greedy(3, TOKENS), tensor_parallel_size=2)["llama"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vLLM's cache folder, of all ranks."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def pooled(case: Case, cache: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch, no_groups():
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("VLLM_CACHE_ROOT", str(cache))
        from tests.helpers.pooled import PooledModels
        from tokenpool.host.engine.process_choices import variables_read_anew

        with variables_read_anew():
            pass
        made = PooledModels(8 << 20, PAGE, tensor_parallel_size=2, movable_weights=True, host_memory=64 << 20)
        made.add(case)
        yield made
        made.check()
        made.close()
        made.host.group.close()


@contextmanager
def no_groups() -> Iterator[None]:
    """vLLM has its process groups once: those of other tests of this process are gone, and none is left behind."""
    from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

    destroy_model_parallel()
    destroy_distributed_environment()
    try:
        yield
    finally:
        destroy_model_parallel()
        destroy_distributed_environment()


@pytest.fixture(scope="module")
def undisturbed(pooled: Any, case: Case) -> list[list[int]]:
    """The tokens of the case's requests."""
    return run(pooled, case, "undisturbed")


def submit(pooled: Any, case: Case, prefix: str) -> None:
    for request in case.requests:
        pooled.submit_one(case.name, replace(request, request_id=f"{prefix} {request.request_id}"), [])


def tokens_of(pooled: Any, model: str, prefix: str) -> list[list[int]]:
    found = pooled.results(model).items()
    return [result.tokens for name, result in sorted(found) if name.startswith(prefix)]


def run(pooled: Any, case: Case, prefix: str) -> list[list[int]]:
    submit(pooled, case, prefix)
    pooled.run()
    return tokens_of(pooled, case.name, prefix)


def build_beside(pooled: Any, case: Case) -> int:
    """Add a model while others step; returns their steps meanwhile."""
    from tests.helpers.pooled import make_spec

    host, steps = pooled.host, 0
    building = host.build_beside(lambda: host.add_model(make_spec(case)))
    while not building.done():
        steps += pooled.run_once()
        host.build_on()
    building.result()
    return steps


def assert_same_random_numbers(pooled: Any) -> None:
    states = pooled.host.models["llama"].core.model_executor.collective_rpc(random_state)
    assert len(states) == 2 and torch.equal(*states)


def test_all_ranks_draw_the_same_random_numbers(pooled: Any, case: Case) -> None:
    """Each samples for itself: where they differ, ranks go on with different tokens of one request."""
    assert_same_random_numbers(pooled)
    unseeded = [RequestSpec(f"u{i}", p, max_tokens=20, temperature=1.0) for i, p in enumerate(prompts_for(9, 3))]
    tokens = run(pooled, replace(case, requests=unseeded), "unseeded")
    assert [20] * 3 == [len(one) for one in tokens]
    assert_same_random_numbers(pooled)
    build_beside(pooled, replace(case, name="second"))
    assert_same_random_numbers(pooled)
    pooled.host.remove_model("second")
    assert_same_random_numbers(pooled)


def test_all_ranks_have_switched_off_what_engines_cannot_share(pooled: Any) -> None:
    """Ways to reduce that a process has once."""
    from tokenpool.settings import OFF_IN_GROUPS

    found = pooled.host.models["llama"].core.model_executor.collective_rpc(environment)
    assert 2 == len(found)
    assert [["0"] * len(OFF_IN_GROUPS)] * 2 == [[each.get(v.name) for v in OFF_IN_GROUPS] for each in found]


def test_all_ranks_count_the_same_collectives(pooled: Any) -> None:
    """So they refuse the same model: two for each of its layers and one for its embedding."""
    executor = pooled.host.models["llama"].core.model_executor
    layers = executor.vllm_config.model_config.hf_config.num_hidden_layers
    assert [2 * layers + 1] * 2 == executor.collective_rpc(collectives_of_a_step)


def test_streams_go_on_while_a_model_is_built_on_all_ranks(
    pooled: Any, case: Case, undisturbed: list[list[int]]
) -> None:
    submit(pooled, case, "beside")
    steps = build_beside(pooled, replace(case, name="third"))
    pooled.run()
    assert steps >= 2
    assert undisturbed == tokens_of(pooled, "llama", "beside")
    assert undisturbed == run(pooled, replace(case, name="third"), "new")
    pooled.host.remove_model("third")
    pooled.check()


@pytest.mark.parametrize("method", ["execute_model", "sample_tokens"])
def test_a_step_that_fails_on_one_rank_is_tried_again_on_all(
    pooled: Any, case: Case, undisturbed: list[list[int]], method: str
) -> None:
    """The other ranks have done their part: no token is lost, wrong or sent twice, and no request fails."""
    core = pooled.host.models["llama"].core
    before = core.counters.crashed_steps, core.counters.failed_requests
    core.model_executor.collective_rpc(fail_once, args=(1, method))
    assert undisturbed == run(pooled, case, f"failed {method}")
    assert (before[0] + 1, before[1]) == (core.counters.crashed_steps, core.counters.failed_requests)
    assert_same_random_numbers(pooled)


def test_a_failure_in_the_last_step_of_a_request_hurts_no_later_one(
    pooled: Any, case: Case, undisturbed: list[list[int]]
) -> None:
    """It is told in the next step, which is that of a request that has done nothing wrong."""
    core, first = pooled.host.models["llama"].core, replace(case.requests[0], max_tokens=1)
    before = core.counters.failed_requests
    core.model_executor.collective_rpc(fail_once, args=(1, "sample_tokens", ValueError))
    assert [undisturbed[0][:1]] == run(pooled, replace(case, requests=[first]), "last")
    assert [undisturbed[0]] == run(pooled, replace(case, requests=case.requests[:1]), "later")
    assert before == core.counters.failed_requests


@pytest.mark.parametrize("place", ["pause", "adopt_weights"])
def test_a_shortage_on_one_rank_refuses_the_model_on_all(
    pooled: Any, case: Case, undisturbed: list[list[int]], place: str
) -> None:
    """Its streams go on, nothing of the model is left, and it can be added afterwards."""
    pooled.host.models["llama"].core.model_executor.collective_rpc(fail_next_build, args=(1, place))
    submit(pooled, case, f"short {place}")
    fourth = replace(case, name="fourth")
    with pytest.raises(torch.OutOfMemoryError, match="rank 1 is short of memory"):
        build_beside(pooled, fourth)
    pooled.run()
    pooled.check()
    assert ["llama"] == list(pooled.host.models)
    assert undisturbed == tokens_of(pooled, "llama", f"short {place}")
    build_beside(pooled, fourth)
    assert undisturbed == run(pooled, fourth, f"after {place}")
    pooled.host.remove_model("fourth")


def test_streams_go_on_while_a_model_is_compiled_for_all_ranks(pooled: Any, case: Case, cache: Path) -> None:
    """By a process for each rank, which meet one another; then no rank of the host compiles anything."""
    from tests.helpers.pooled import make_spec
    from tests.host.load.test_compiled_code import COMPILED, code_of, libraries

    compiled, steps = replace(case, name="compiled"), 0
    spec = make_spec(compiled, **COMPILED)
    code = code_of(spec)
    assert code.is_missing
    with ThreadPoolExecutor(1) as side:
        done = side.submit(code.make_aside)
        while not done.done():
            if not pooled.host.models[case.name].core.has_work():
                submit(pooled, case, f"beside {steps}")
            steps += pooled.run_once()
    assert done.result() and not code.is_missing
    assert steps > 100
    before = libraries(cache)
    assert before
    pooled.host.add_model(spec)
    assert [TOKENS] * 3 == [len(tokens) for tokens in run(pooled, compiled, "compiled")]
    assert before == libraries(cache)
    pooled.host.remove_model("compiled")
