# SPDX-License-Identifier: Apache-2.0
"""Models whose layers keep a state in place of KV, all or some: their states move and their streams stay the same.

A block of states is overwritten with each token, where one of KV is only written once: it may leave the device only
when the step that writes it has ended, and what comes back must be the last one.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.helpers.cases import make_cases, mixed
from tests.helpers.plain import Case, RequestSpec, prompts_for, run_plain
from tests.host.test_switching import RandomTurns, _assert_equal, _use
from tokenpool.errors import ModelRefusedError
from tokenpool.memory.devices.device import Copies

pytestmark = pytest.mark.vllm

STATES = ("mamba2", "granite_hybrid", "nemotron_h", "falcon_h1", "qwen3_next")
KINDS = ("llama", *STATES)
PAGE = 1 << 20
PAGES = 12
"""For the weights of two models or three, and a few blocks."""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return make_cases(tmp_path_factory.mktemp("models"), KINDS, mixed(4, 40))


@pytest.fixture(scope="module")
def reference(cases: dict[str, Case]) -> dict[str, dict[str, object]]:
    return run_plain(list(cases.values()), plain_gemm=True)


@pytest.fixture
def pool():
    from tests.helpers.pooled import movable_pool

    with movable_pool(PAGES * PAGE, PAGE) as pooled:
        yield pooled


def test_streams_do_not_collapse(reference):
    """A stream that repeats a token would be equal whatever became of its state."""
    for kind in STATES:
        for request_id, result in reference[kind].items():
            assert len(set(result.tokens)) > 8, request_id


def test_states_come_and_go_at_random_token_boundaries_and_no_stream_changes(pool, cases, reference):
    """Weights, KV and states are filled with NaN when they leave: each model gives what it gives alone."""
    _use(pool, RandomTurns(5))
    for case in cases.values():
        pool.add(case)
    for case in cases.values():
        pool.submit(case)
    pool.run(each_step=lambda step: step % 25 or pool.check())

    assert pool.host.residency.counters.weight_evictions > 30
    assert pool.host.swapper.counters.blocks_in > 30
    _assert_equal(pool, reference, KINDS, least=20)


@pytest.fixture(scope="module")
def prefixed(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Two gated delta nets; one has requests of one prefix, one after another, each of which finds the one before."""

    def requests(kind: str, index: int, lora: str | None) -> list[RequestSpec]:
        shared, *ends = prompts_for(7, 7, lengths=(200, 30, 45, 61, 5, 90, 30))
        return [RequestSpec(f"{kind}-{i}", shared + end, 24) for i, end in enumerate(ends)]

    folder, args = tmp_path_factory.mktemp("prefixed"), {"max_num_seqs": 1, "enable_prefix_caching": True}
    return make_cases(folder, ["qwen3_next_wide"], requests, **args)["qwen3_next_wide"]


def test_cached_states_leave_for_host_memory_and_come_back(pool, prefixed):
    """A prefix that is found again after its blocks of KV and of states left the device gives what plain vLLM gives."""
    from vllm.v1.core.kv_cache_utils import get_group_id
    from vllm.v1.kv_cache_interface import MambaSpec

    plain = run_plain([prefixed], plain_gemm=True)[prefixed.name]
    assert all(len(set(result.tokens)) > 8 for result in plain.values())
    pool.add(prefixed)
    hosted, tier = pool.host.models[prefixed.name], pool.host.swapper.tier
    groups = hosted.core.scheduler.kv_cache_config.kv_cache_groups
    states = {index for index, group in enumerate(groups) if isinstance(group.kv_cache_spec, MambaSpec)}
    assert states and len(states) < len(groups)
    loaded: list[int] = []
    begin_load = tier.begin_load

    def watch(model: str, places: Mapping[bytes, int]) -> Copies:
        loaded.extend(map(get_group_id, places))
        return begin_load(model, places)

    tier.begin_load = watch
    pool.submit(prefixed)

    def leave(step: int) -> None:
        if step % 7 == 6 and not pool.host.swapper.is_out(prefixed.name):
            hosted.core.drain_batches()
            pool.host.swapper.out(hosted)
            pool.host.swapper.into(hosted)
            pool.check()

    pool.run(each_step=leave)
    assert states & set(loaded), "no state came out of host memory"
    assert set(range(len(groups))) - states & set(loaded), "no KV did"
    _assert_equal(pool, {prefixed.name: plain}, [prefixed.name], least=6)


def test_what_ends_vllm_on_the_cpu_is_refused_by_name(pool, cases):
    """The prefix cache of Mamba 2 layers, with the flag that helps."""
    with pytest.raises(ModelRefusedError, match="--no-enable-prefix-caching"):
        pool.add(cases["nemotron_h"], enable_prefix_caching=True)
    pool.add(cases["nemotron_h"])
