# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: a drafter's weights and KV move with its target's, and no stream changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.helpers.cases import METHODS, drafted_cases, mixed
from tests.helpers.plain import Case, Result, run_plain
from tests.host.test_switching import RandomTurns, _assert_equal, _use

if TYPE_CHECKING:
    from tests.helpers.pooled import PooledModels

pytestmark = pytest.mark.vllm

PAGE = 256 << 10
PAGES = 24
"""For the weights of one or two models and their drafters, at most 10 pages, and some KV."""
LIMIT_S = 60.0
CUTS = (1, 2, 17, 47)
NOISE = 0.02
"""Of logprobs. In plain vLLM too a request with a drafter has the same tokens alone and beside others, but logprobs
that differ by a thousandth or so: its kernels round the rows of drafts as the step has others. Which requests share a
step is not the same in a pool. Without drafters there is no such noise."""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return drafted_cases(tmp_path_factory.mktemp("models"), mixed(4, 48))


@pytest.fixture(scope="module")
def reference(cases: dict[str, Case]) -> dict[str, dict[str, Result]]:
    return run_plain(list(cases.values()), plain_gemm=True)


@pytest.fixture
def pool() -> Iterator[PooledModels]:
    from tests.helpers.pooled import movable_pool

    with movable_pool(PAGES * PAGE, PAGE) as pooled:
        yield pooled


def _greedy(case: Case, results: dict[str, Result]) -> list[list[int]]:
    return [results[request.request_id].tokens for request in case.requests if not request.temperature]


class Drafts:
    """How many drafts each model of a pool made, and how many were right, as its scheduler counts them."""

    def __init__(self) -> None:
        self.made: dict[str, int] = {}
        self.accepted: dict[str, int] = {}

    def watch(self, name: str, core: Any) -> None:
        make = core.scheduler.make_spec_decoding_stats
        self.made[name] = self.accepted[name] = 0

        def count(stats: Any, *args: Any, **kwargs: Any) -> Any:
            self.made[name] += kwargs["num_draft_tokens"]
            self.accepted[name] += kwargs["num_accepted_tokens"]
            return make(stats, *args, **kwargs)

        core.scheduler.make_spec_decoding_stats = count


def test_a_drafter_changes_no_stream_while_all_come_and_go(pool, cases, reference):
    """On memory for one or two, poisoned when it is left: greedy and seeded as plain vLLM with the same drafter.

    And greedy as without one; in plain vLLM that is so too.
    """
    num_threads = torch.get_num_threads()
    _use(pool, RandomTurns(3))
    drafts = Drafts()
    for name, case in cases.items():
        pool.add(case)
        drafts.watch(name, pool.host.models[name].core)
    for case in cases.values():
        pool.submit(case)
    pool.run(each_step=lambda step: step % 25 or pool.check())

    assert pool.host.residency.counters.weight_evictions > 30
    assert pool.host.swapper.counters.blocks_in > 30
    assert torch.get_num_threads() == num_threads, "the sums of all models would be split in another way"
    _assert_equal(pool, reference, cases, least=20, noise=NOISE)
    _assert_equal(pool, reference, [name for name in cases if name.endswith("-")], least=4)
    for name, case in cases.items():
        bare = f"{name.partition('-')[0]}-"
        assert _greedy(case, pool.results(name)) == _greedy(cases[bare], reference[bare]), name
        if name != bare:
            assert 0 < drafts.accepted[name] < drafts.made[name], f"{drafts.accepted} of {drafts.made}"


def test_streams_do_not_collapse(reference):
    """A stream that repeats a token would be equal whatever became of its KV, and any draft of it would be right."""
    for results in reference.values():
        for request_id, result in results.items():
            assert len(set(result.tokens)) > 5, request_id


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name == "eagle" else pytest.mark.slow) for name in METHODS]
)
def test_the_weights_of_both_are_read_again_from_their_checkpoints(pool, cases, reference, method):
    """No byte of a model and its drafter is left in memory, and the streams go on when both are back."""
    name = f"llama-{method}"
    pool.add(cases[name])
    store = pool.host.weights
    pool.submit(cases[name])
    for _ in range(12):
        pool.run_once()
    store.evict(name)
    store.drop_host(name)
    assert store.state(name) == "on disk"
    assert pool.host.host_ledger.held(name, "weights") < store.bytes_of(name) / 4
    assert store.load_host(name).wait(LIMIT_S)
    store.finish(name)
    pool.run()

    _assert_equal(pool, reference, [name], least=4, noise=NOISE)


@pytest.mark.slow
def test_preempted_requests_go_on_with_the_same_tokens(cases, reference):
    """Drafts that were not verified are forgotten, and tokens computed again, of both models."""
    from tests.helpers.pooled import movable_pool

    for name in ("llama-ngram", "llama-draft_model", "llama-eagle"):
        with movable_pool(PAGES * PAGE, PAGE) as pooled:
            pooled.add(cases[name])
            pooled.submit(cases[name])
            core, left = pooled.host.models[name].core, 4

            def preempt(step: int, core: Any = core) -> None:
                nonlocal left
                if step % 5 == 4 and left and core.preempt_newest():
                    left -= 1

            pooled.run(each_step=preempt)
            assert not left
            assert _greedy(cases[name], pooled.results(name)) == _greedy(cases[name], reference[name]), name


def test_another_engine_goes_on_with_the_same_tokens(cases, reference):
    """As when a host has died: from whichever token on, with each drafter, whose own KV was never there."""
    from tests.helpers.resuming import Resuming

    drafted = {name: case for name, case in cases.items() if not name.endswith("-")}
    with Resuming(drafted.values()) as engines:
        for cut in CUTS:
            rest = {
                (name, request.request_id): engines.submit(
                    name, f"{request.request_id}~{cut}", request.prompt_token_ids,
                    {"max_tokens": request.max_tokens, "temperature": 0.0, "ignore_eos": True},
                    delivered=reference[name][request.request_id].tokens[:cut],
                )
                for name, case in drafted.items() for request in case.requests if not request.temperature
            }  # fmt: skip
            engines.run()
            for (name, request_id), got in rest.items():
                assert reference[name][request_id].tokens[cut:] == got.tokens, f"{request_id} after {cut}"
        engines.check()


def test_fixed_weights_count_the_drafter_too(cases):
    """Pages are taken for both."""
    from tests.helpers.pooled import PooledModels

    pages = {}
    for name in ("llama-", "llama-draft_model"):
        pooled = PooledModels(64 << 20, PAGE)
        try:
            pooled.add(cases[name])
            pages[name] = pooled.host.ledger.held(name, "weights")
        finally:
            pooled.close()
    assert pages["llama-draft_model"] >= 2 * pages["llama-"] - 1
