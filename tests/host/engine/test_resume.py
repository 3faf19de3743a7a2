# SPDX-License-Identifier: Apache-2.0
"""An engine goes on with a request that another one began: the same tokens, from whichever token it takes over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.cases import greedy, make_cases
from tests.helpers.plain import Case, prompts_for

if TYPE_CHECKING:
    from tests.helpers.resuming import Resuming

pytestmark = pytest.mark.vllm

EXACT_KINDS = ("llama", "gemma3", "qwen3_moe")
ROUNDED_KIND = "deepseek_v2"
"""Its attention computes a prompt and a single token with different kernels."""
KINDS = (*EXACT_KINDS, ROUNDED_KIND)
LOGPROB_TOLERANCE = 0.1
"""What computing tokens again, in one prefill instead of one by one, may move a logprob (docs/failure.md)."""
NUM_TOKENS = 40
CUTS = (1, 2, 17, NUM_TOKENS - 1)
SCHEMA = '{"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}, "required": ["a", "b"]}'
PLAIN: dict[str, Any] = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "logprobs": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": PLAIN | {"temperature": 0.0},
    "seeded": PLAIN | {"temperature": 1.0, "seed": 7},
    "filtered": PLAIN | {"temperature": 0.9, "seed": 8, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "penalties": PLAIN
    | {"temperature": 0.0, "presence_penalty": 1.5, "frequency_penalty": 0.7, "repetition_penalty": 1.3},
    "min_tokens": {"max_tokens": NUM_TOKENS, "logprobs": 2, "temperature": 1.0, "seed": 3, "min_tokens": 30}
    | {"stop_token_ids": list(range(3, 200))},
    "biased": PLAIN | {"temperature": 0.0, "logit_bias": {5: 5.0, 9: 3.0}, "bad_words": []},
    "prompt_logprobs": PLAIN | {"temperature": 0.0, "prompt_logprobs": 1},
    "schema": {"max_tokens": NUM_TOKENS, "logprobs": 2, "temperature": 1.0, "seed": 4, "schema": SCHEMA},
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return make_cases(tmp_path_factory.mktemp("models"), KINDS, greedy(1, 1))


@pytest.fixture(scope="module")
def first(cases: dict[str, Case]) -> Iterator[Resuming]:
    """The engines that begin, and give the undisturbed streams."""
    from tests.helpers.resuming import Resuming

    with Resuming(cases.values()) as engines:
        yield engines


@pytest.fixture(scope="module")
def second(cases: dict[str, Case]) -> Iterator[Resuming]:
    """The engines that take over, with steps so small that they compute what was delivered in several."""
    from tests.helpers.resuming import Resuming

    with Resuming(cases.values(), max_num_batched_tokens=128) as engines:
        yield engines


def _requests(kind: str, variants: dict[str, dict[str, Any]]) -> list[tuple[str, list[int], dict[str, Any]]]:
    prompts = prompts_for(KINDS.index(kind), len(variants), lengths=(7, 150, 100, 48))
    return [(name, prompt, params) for (name, params), prompt in zip(variants.items(), prompts, strict=True)]


@pytest.mark.parametrize("kind", EXACT_KINDS)
def test_streams_go_on_with_the_same_tokens(kind: str, first: Resuming, second: Resuming) -> None:
    """Every kind of sampling continues exactly after 1, 2, 17 and all but one token, and ends for the same reason."""
    variants = VARIANTS if kind == "llama" else {name: VARIANTS[name] for name in ("greedy", "seeded")}
    requests = _requests(kind, variants)
    whole = {name: first.submit(kind, name, prompt, params) for name, prompt, params in requests}
    first.run()
    for cut in CUTS:
        rest = {
            name: second.submit(kind, f"{name}~{cut}", prompt, params, delivered=whole[name].tokens[:cut])
            for name, prompt, params in requests
            if cut < len(whole[name].tokens)
        }
        second.run()
        for name, got in rest.items():
            want = whole[name]
            assert want.tokens[cut:] == got.tokens, f"{kind} {name} after {cut}"
            assert want.finish_reason == got.finish_reason, f"{kind} {name} after {cut}"
            assert want.logprobs[cut:] == pytest.approx(got.logprobs, abs=LOGPROB_TOLERANCE), f"{kind} {name}"
    if kind == "llama":
        assert "stop" == str(whole["min_tokens"].finish_reason), "nothing tests where min_tokens ends"
        assert len(whole["schema"].tokens) > CUTS[2], "the grammar ends before the cut"
    second.check()


def test_recomputation_changes_a_token_only_where_two_are_as_likely(first: Resuming, second: Resuming) -> None:
    """Where kernels round otherwise, logprobs stay within the tolerance up to the first choice between near equals."""
    variants = {f"greedy-{index}": VARIANTS["greedy"] for index in range(4)}
    requests = _requests(ROUNDED_KIND, variants)
    whole = {name: first.submit(ROUNDED_KIND, name, prompt, params) for name, prompt, params in requests}
    first.run()
    compared = 0
    for cut in CUTS:
        rest = {
            name: second.submit(ROUNDED_KIND, f"{name}~{cut}", prompt, params, delivered=whole[name].tokens[:cut])
            for name, prompt, params in requests
        }
        second.run()
        for name, got in rest.items():
            want = whole[name]
            pairs = zip(want.tokens[cut:], got.tokens, strict=True)
            same = next((i for i, (one, other) in enumerate(pairs) if one != other), NUM_TOKENS - cut)
            assert want.logprobs[cut : cut + same] == pytest.approx(got.logprobs[:same], abs=LOGPROB_TOLERANCE)
            if same < NUM_TOKENS - cut:
                assert want.margins[cut + same] < LOGPROB_TOLERANCE, f"{name} after {cut}, token {same}"
            compared += same
    assert compared > NUM_TOKENS


def test_what_went_out_with_the_first_token_does_not_go_out_again(first: Resuming, second: Resuming) -> None:
    """A stream that goes on has no prefill statistics, by which vLLM counts prompts, and the second engine counts
    only its own tokens."""
    (_name, prompt, params), *_ = _requests("llama", {"greedy": VARIANTS["greedy"]})
    whole = first.submit("llama", "counted", prompt, params)
    first.run()
    before = second.account("llama").tokens
    rest = second.submit("llama", "counted", prompt, params, delivered=whole.tokens[:10])
    second.run()

    assert (1, 0) == (whole.num_prefill_stats, rest.num_prefill_stats)
    assert before + NUM_TOKENS - 10 == second.account("llama").tokens


def test_a_request_that_goes_on_can_be_aborted_before_its_first_step(second: Resuming) -> None:
    """The runner forgets what it was told of a request that never ran."""
    (_name, prompt, params), *_ = _requests("llama", {"seeded": VARIANTS["seeded"]})
    second.submit("llama", "gone", prompt, params, delivered=[5, 6, 7])
    second.abort("llama", "gone")
    second.run()

    assert not second.runner_requests("llama")
    second.check()


def test_tokens_that_the_grammar_refuses_end_the_request_with_an_error(second: Resuming) -> None:
    """Delivered tokens that cannot have come from the request's grammar are not continued."""
    (_name, prompt, params), *_ = _requests("llama", {"schema": VARIANTS["schema"]})
    got = second.submit("llama", "wrong", prompt, params, delivered=[300, 301, 302])
    second.run()

    assert ("error", []) == (str(got.finish_reason), got.tokens)
