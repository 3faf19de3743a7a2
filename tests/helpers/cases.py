# SPDX-License-Identifier: Apache-2.0
"""Tiny models with requests, as most tests with real engines need them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.helpers.plain import Case, RequestSpec, prompts_for

MakeRequests = Callable[[str, int, str | None], list[RequestSpec]]
"""From a kind, its place among the kinds, and the path of its adapter if it has one."""


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
