# SPDX-License-Identifier: Apache-2.0
"""Tiny models with requests, as most tests with real engines need them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.helpers.plain import Case, RequestSpec, prompts_for

MakeRequests = Callable[[str, int, str | None], list[RequestSpec]]
"""From a kind, its place among the kinds, and the path of its adapter if it has one."""
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
MTP = {"method": "mtp", "num_speculative_tokens": 1}
METHODS = ("draft_model", "eagle", "eagle3", "medusa")
"""Drafters with a checkpoint of their own."""


def greedy(count: int, max_tokens: int) -> MakeRequests:
    """`count` greedy requests."""

    def make(kind: str, index: int, lora: str | None) -> list[RequestSpec]:
        prompts = prompts_for(index, count)
        return [RequestSpec(f"{kind}-{i}", prompt, max_tokens=max_tokens) for i, prompt in enumerate(prompts)]

    return make


def mixed(count: int, max_tokens: int) -> MakeRequests:
    """Greedy and seeded sampling in turns; with an adapter, every third request uses it."""

    def make(kind: str, index: int, lora: str | None) -> list[RequestSpec]:
        return [
            RequestSpec(
                request_id=f"{kind}-{i}",
                prompt_token_ids=prompt,
                max_tokens=max_tokens,
                temperature=float(i % 2),
                seed=i if i % 2 else None,
                lora=lora if i % 3 == 2 else None,
            )
            for i, prompt in enumerate(prompts_for(index, count))
        ]

    return make


def make_cases(
    folder: Path, kinds: Sequence[str], requests: MakeRequests, *, lora_kind: str | None = None, **engine_args: Any
) -> dict[str, Case]:
    """One tiny model of each kind below `folder`, that of `lora_kind` with an adapter."""
    from tokenpool.demo.tiny_models import ENGINE_ARGS, make_tiny_lora, make_tiny_model

    made = {}
    for index, kind in enumerate(kinds):
        model = make_tiny_model(kind, folder / kind)
        args = {"max_model_len": 512, **engine_args, **ENGINE_ARGS.get(kind, {})}
        lora = None
        if kind == lora_kind:
            lora = str(make_tiny_lora(model, folder / "lora"))
            args |= {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}  # vllm#48421: the last slot stays empty
        made[kind] = Case(kind, str(model), args, requests(kind, index, lora))
    return made


def drafted_cases(folder: Path, requests: MakeRequests, **engine_args: Any) -> dict[str, Case]:
    """A llama with each drafter and with none, a gemma3, which has windows, and a MiMo, each with its own.

    All say few words. Cases of one model have the same prompts. Each is named by its model and its drafter, which is
    empty without one.
    """
    from tokenpool.demo.tiny_drafters import make_few_words, make_tiny_drafter, make_tiny_mtp

    made = make_cases(folder, ("llama", "gemma3", "qwen2"), requests, **engine_args)
    few = {kind: make_few_words(Path(case.model), folder / f"few-{kind}") for kind, case in made.items()}
    words = few["llama"]
    base = {kind: replace(made[kind], model=str(few[kind])) for kind in ("llama", "gemma3")}
    base["mimo"] = replace(made["qwen2"], name="mimo", model=str(make_tiny_mtp(few["qwen2"], folder / "mimo")))
    drafters: dict[str, dict[str, Any] | None] = {"": None, "ngram": NGRAM, "mtp": MTP}
    drafters |= {method: make_tiny_drafter(method, words, folder / method) for method in METHODS}
    wanted = {"llama": ("", "ngram", *METHODS), "gemma3": ("", "ngram"), "mimo": ("", "mtp")}
    cases = [_with_drafter(base[kind], name, drafters[name]) for kind, names in wanted.items() for name in names]
    return {case.name: case for case in cases}


def _with_drafter(case: Case, drafter: str, config: dict[str, Any] | None) -> Case:
    name = f"{case.name}-{drafter}"
    requests = [replace(r, request_id=f"{name}-{i}") for i, r in enumerate(case.requests)]
    args = case.engine_args | ({"speculative_config": copy.deepcopy(config)} if config else {})
    return Case(name, case.model, args, requests)
