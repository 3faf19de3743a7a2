# SPDX-License-Identifier: Apache-2.0
"""Models that see or hear: their streams stay the same while weights, KV and cross-attention KV come and go.

What an encoder made of an image stays on the device when its model leaves; it is in the books all the while.
"""

from __future__ import annotations

import dataclasses

import pytest

from tests.helpers.cases import make_cases
from tests.helpers.crashes import crash_when
from tests.helpers.plain import Case, RequestSpec, prompts_for, run_plain
from tests.host.test_switching import RandomTurns, _assert_equal, _use

pytestmark = pytest.mark.vllm

MEDIA = ("qwen2_5_vl", "llava", "whisper")
KINDS = ("llama", *MEDIA)
PAGE = 256 << 10
PAGES = 26


def requests(kind: str, index: int, lora: str | None) -> list[RequestSpec]:
    """Six of each model, greedy and seeded; two share an image, and one has the text of another with its own image."""
    prompts = prompts_for(index, 6, lengths=(20, 60, 130))
    prompts[3] = prompts[2]
    return [
        RequestSpec(
            f"{kind}-{i}",
            prompt,
            max_tokens=40,
            temperature=float(i % 2),
            seed=i if i % 2 else None,
            media=(kind, 1 if i == 5 else i) if kind in MEDIA else None,
        )
        for i, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    made = make_cases(tmp_path_factory.mktemp("models"), KINDS, requests)
    made["whisper"].engine_args["max_model_len"] = 448
    return made


@pytest.fixture(scope="module")
def reference(cases: dict[str, Case]) -> dict[str, dict[str, object]]:
    return run_plain(list(cases.values()), plain_gemm=True)


@pytest.fixture
def pool():
    from tests.helpers.pooled import movable_pool

    with movable_pool(PAGES * PAGE, PAGE) as pooled:
        yield pooled


def test_streams_do_not_collapse_and_follow_what_is_seen(reference):
    """A stream that repeats a token, or that an image does not change, would be equal whatever became of either."""
    for kind in MEDIA:
        results = reference[kind]
        for request_id, result in results.items():
            assert len(set(result.tokens)) > 8, request_id
        assert results[f"{kind}-2"].tokens != results[f"{kind}-3"].tokens


def test_switches_at_random_token_boundaries_change_no_stream(pool, cases, reference):
    """Weights and KV are filled with NaN when they leave; each model gives what it gives alone."""
    from tokenpool.host.engine import encoder_cache

    _use(pool, RandomTurns(3))  # two that begin in one step have rows of the batch in another order
    for case in cases.values():
        pool.add(case)
    for case in cases.values():
        pool.submit(case)
    ear = pool.host.models["whisper"]
    assert 200 == encoder_cache.longest_input(ear.core), "cross-attention keeps KV of all that the encoder puts out"
    need = pool.host._relief.slabs_for(ear.core, ear.build.pool, 448, 200)
    assert need > pool.host._relief.slabs_for(ear.core, ear.build.pool, 448, 0)
    assert 0 == encoder_cache.longest_input(pool.host.models["llava"].core)
    seen: dict[str, int] = dict.fromkeys(MEDIA, 0)

    def look(step: int) -> None:
        for kind in MEDIA:
            core = pool.host.models[kind].core
            seen[kind] = max(seen[kind], encoder_cache.held_bytes(core))
            assert encoder_cache.capacity_bytes(core) <= pool.host.weights.fixed.of(kind)
        if step % 25 == 0:
            pool.check()

    pool.run(each_step=look)

    assert pool.host.residency.counters.weight_evictions > 20
    assert pool.host.swapper.counters.blocks_in > 20
    assert seen["llava"] and seen["qwen2_5_vl"]
    _assert_equal(pool, reference, KINDS, least=16)


def test_a_crashed_step_leaves_no_output_of_an_encoder_that_was_never_made(pool, cases, reference):
    """The scheduler notes an image when the step is planned: without care the retries would look for it in vain."""
    crashed: list[bool] = []

    def once(scheduled: object) -> bool:
        crashed.append(True)
        return len(crashed) == 1

    case = dataclasses.replace(cases["llava"], requests=cases["llava"].requests[:3])
    pool.add(case)
    crash_when(pool, "llava", once, "before")
    pool.submit(case)
    pool.run()

    core = pool.host.models["llava"].core
    assert 1 == core.counters.crashed_steps
    assert 0 == core.counters.failed_requests
    for request_id, got in pool.results("llava").items():
        assert reference["llava"][request_id].tokens == got.tokens
