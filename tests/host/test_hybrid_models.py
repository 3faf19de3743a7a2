# SPDX-License-Identifier: Apache-2.0
"""Models whose layers keep a state in place of KV, all or some: their states move and their streams stay the same.

A block of states is overwritten with each token, where one of KV is only written once: it may leave the device only
when the step that writes it has ended, and what comes back must be the last one.
"""

from __future__ import annotations

import pytest

from tests.helpers.cases import make_cases, mixed
from tests.helpers.plain import Case, run_plain
from tests.host.test_switching import RandomTurns, _assert_equal, _use
from tokenpool.errors import ModelRefusedError

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


def test_what_ends_vllm_on_the_cpu_is_refused_by_name(pool, cases):
    """The prefix cache of Mamba 2 layers, with the flag that helps."""
    with pytest.raises(ModelRefusedError, match="--no-enable-prefix-caching"):
        pool.add(cases["nemotron_h"], enable_prefix_caching=True)
    pool.add(cases["nemotron_h"])
