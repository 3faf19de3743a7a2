# SPDX-License-Identifier: Apache-2.0
"""Laws of the pool with vLLM's second model runner, the one of CUDA, on the CPU; with and without a step ahead."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cases import drafted_cases, make_cases
from tests.helpers.plain import ENV, Case, RequestSpec, prompts_for, run_plain

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the second runner needs Triton"),
]

KINDS = ("llama", "qwen2", "gemma3")
"""gemma3 has several groups of blocks, which the runner writes with another kernel."""
MAX_TOKENS, CRASH_TOKENS, MASKED_TOKENS = 10, 5, 30
PLACES = ("before", "after", "sampling")


def _requests(kind: str, index: int, lora: str | None) -> list[RequestSpec]:
    """A greedy one, a seeded one over several blocks, and a greedy one; top-k and top-p do not run interpreted."""
    prompts = prompts_for(index, 3, lengths=(7, 130, 60))
    return [RequestSpec(f"{kind}-{i}", p, MAX_TOKENS, float(i % 2), i or None) for i, p in enumerate(prompts)]


def _twice(case: Case) -> Case:
    """The long prompt of a case, two times in a row."""
    first = replace(case.requests[1], max_tokens=6)
    again = replace(first, request_id=f"{case.name}-again")
    return replace(case, engine_args={**case.engine_args, "max_num_seqs": 1}, requests=[first, again])


def _run_pool(scenarios: dict[str, list[Case]], folder: Path) -> dict[str, Any]:
    wanted, results = folder / "scenarios.json", folder / "results.json"
    wanted.write_text(json.dumps({name: [asdict(case) for case in cases] for name, cases in scenarios.items()}))
    child = subprocess.run(
        [sys.executable, "-m", "tests.helpers.v2_pool", str(wanted), str(results)],
        cwd=Path(__file__).parents[3],
        env=os.environ | ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert child.returncode == 0, "\n".join(x for x in child.stdout.splitlines() if "leaked" not in x)[-5000:]
    return json.loads(results.read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the pool's scenarios gave, and what plain vLLM gave; side by side in two processes."""
    folder = tmp_path_factory.mktemp("second-runner")
    args = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 512}
    cases = list(make_cases(folder, KINDS, _requests, **args).values())
    twice = [_twice(case) for case in cases[:2]]
    windowed = replace(cases[2], name="windowed", engine_args=cases[2].engine_args | {"block_size": 32})
    with_drafters = drafted_cases(folder / "drafted", _requests, **args)
    drafted = [with_drafters[f"llama-{method}"] for method in ("draft_model", "eagle")]
    plain = [
        replace(case, name=f"{name}-{ahead}", engine_args={**case.engine_args, "async_scheduling": ahead})
        for ahead in (False, True)
        for name, case in [
            *((c.name, c) for c in (*cases, windowed, *drafted)),
            *((f"{c.name}-twice", c) for c in twice),
        ]
    ]
    crash = replace(cases[0], requests=[replace(request, max_tokens=CRASH_TOKENS) for request in cases[0].requests])
    masked = replace(cases[0], requests=[replace(each, max_tokens=MASKED_TOKENS) for each in cases[0].requests[::2]])
    with ThreadPoolExecutor(1) as side:
        reference = side.submit(run_plain, plain, program=("tests.helpers.v2_runner", "second"))
        scenarios = {"turns": cases[:2], "moves": cases, "hits": twice, "crashes": [crash], "adopted": cases[2:]}
        scenarios |= {"drafted": drafted, "windows": [windowed], "masked": [masked]}
        pooled = _run_pool(scenarios, folder)
        return pooled, {
            name: {key: asdict(result) for key, result in results.items()}
            for name, results in reference.result().items()
        }


def _assert_equal(results: dict[str, Any], reference: dict[str, Any], suffix: str) -> None:
    """Tokens and logprobs are those of plain vLLM, and nothing was recomputed."""
    assert results
    for name, got in results.items():
        assert reference[f"{name}{suffix}"] == got
        assert all(result["preempted"] == 0 and len(result["tokens"]) >= 6 for result in got.values())


@pytest.mark.parametrize("ahead", [False, True])
def test_a_turn_per_token_changes_no_stream(runs, ahead):
    """Two models that take turns at every token give what each gives alone, although one was warmed up meanwhile."""
    pooled, reference = runs
    found = pooled[f"turns-{ahead}"]
    assert found["switches"] > MAX_TOKENS
    assert found["warmed_up"]
    _assert_equal(found["results"], reference, f"-{ahead}")


@pytest.mark.parametrize("ahead", [False, True])
def test_moved_requests_give_the_streams_of_plain_vllm(runs, ahead):
    """KV that left at random tokens and came back under other ids, into poisoned slabs, changes no stream."""
    pooled, reference = runs
    found = pooled[f"moves-{ahead}"]
    assert found["moved_ids"] > 10
    assert (found["drained"] > 2) == ahead, "steps were not in flight when models left"
    _assert_equal(found["results"], reference, f"-{ahead}")


@pytest.mark.parametrize("ahead", [False, True])
def test_no_step_names_a_block_that_nobody_uses(runs, ahead):
    """In front of a window and behind the last block tables name the null block; the streams are plain vLLM's."""
    pooled, reference = runs
    found = pooled[f"windows-{ahead}"]
    assert [] == found["freed"]
    assert found["hidden"] > 10
    _assert_equal(found["results"], reference, f"-{ahead}")


@pytest.mark.parametrize("kind", ["greedy", "seeded"])
@pytest.mark.parametrize("ahead", [False, True])
def test_late_masks_change_no_token_and_hold_up_nobody(runs, ahead, kind):
    """A token is dropped for a late mask and drawn again, by its position: the same one; the others step meanwhile."""
    pooled, _ = runs
    found = pooled[f"masked-{ahead}"][kind]
    assert found["in_time"] == found["late"]
    assert 24 >= len(found["late"]["told"]) > 5 and MASKED_TOKENS == len(found["late"]["llama-0"])
    assert 1 <= found["preemptions"] < found["kept"] and found["kept"] > 3
    assert found["beside"] > 0


@pytest.mark.parametrize("ahead", [False, True])
def test_drafters_read_the_blocks_of_moved_requests(runs, ahead):
    """Of a draft model and of EAGLE, whose KV is in the same blocks: the streams are those of plain vLLM with them."""
    pooled, reference = runs
    found = pooled[f"drafted-{ahead}"]
    assert found["moved_ids"] > 10
    _assert_equal(found["results"], reference, f"-{ahead}")


@pytest.mark.parametrize("ahead", [False, True])
def test_weights_move_under_this_runner_too(runs, ahead):
    """Its dummy steps agree, module by module, and a model whose weights were away gives the same streams."""
    pooled, _ = runs
    found = pooled[f"adopted-{ahead}"]
    before, after, again_before, again_after = found["runs"]
    assert before == after == again_before == again_after > 50
    assert found["loads"] == 1
    assert found["leaves-False"] == found["leaves-True"]
    assert all(len(result["tokens"]) == MAX_TOKENS for result in found["leaves-True"]["gemma3"].values())


@pytest.mark.parametrize("ahead", [False, True])
def test_moved_prefixes_are_hit(runs, ahead):
    """A prompt seen before hits blocks that were off the device since, and gives plain vLLM's stream."""
    pooled, reference = runs
    found = pooled[f"hits-{ahead}"]
    assert {"llama": 128, "qwen2": 128} == found["cached"]
    _assert_equal(found["results"], reference, f"-twice-{ahead}")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("ahead", [False, True])
def test_a_request_that_crashes_the_engine_fails_alone(runs, place, ahead):
    """Wherever a step crashes: one that passes costs no request, and then only the culprit does not end as it should.

    All of the batch is computed again, which may move last bits.
    """
    pooled, reference = runs
    found = pooled[f"crashes-{ahead}"][place]
    assert ["length", "error", "length"] == found["reasons"]
    assert 3 <= found["crashed_steps"] <= 4
    assert (False, 0) == (found["active"], found["left_in_runner"])
    for i in (0, 2):
        tokens = found["results"]["llama"][f"llama-{i}"]["tokens"]
        assert CRASH_TOKENS == len(tokens)
        assert reference[f"llama-{ahead}"][f"llama-{i}"]["tokens"][:2] == tokens[:2]
