# SPDX-License-Identifier: Apache-2.0
"""Law 6: under round robin a model with work waits at most one step of every other model, with real engines."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.plain import Case, RequestSpec, prompts_for

pytestmark = pytest.mark.vllm

KINDS = ("llama", "qwen2", "qwen3", "gemma3")
LATE_STEP = 27


def _requests(kind: str, seed: int, max_tokens: int) -> list[RequestSpec]:
    prompts = prompts_for(seed, 2)
    return [RequestSpec(f"{kind}-{seed}-{i}", prompt, max_tokens=max_tokens) for i, prompt in enumerate(prompts)]


def test_between_two_steps_of_a_model_with_work_every_other_steps_at_most_once(tmp_path: Path) -> None:
    """So each steps within N turns, from its first request on, also one whose requests come later or come again."""
    from tests.helpers.pooled import PooledModels
    from tokenpool.demo.tiny_models import make_tiny_model

    pooled = PooledModels(32 << 20, 256 << 10)
    for kind in KINDS:
        pooled.add(Case(kind, str(make_tiny_model(kind, tmp_path / kind)), {"max_model_len": 512}, []))
    models = pooled.host.models
    first = {"llama": 30, "qwen2": 20, "qwen3": 5}  # qwen3 is done early and comes again, gemma3 comes late
    for seed, (kind, max_tokens) in enumerate(first.items()):
        for request in _requests(kind, seed, max_tokens):
            pooled.submit_one(kind, request, [])
    waited: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    longest: Counter[str] = Counter()
    steps = {kind: 0 for kind in KINDS}

    def with_work() -> set[str]:
        return {name for name, m in models.items() if m.core.has_work() or not m.core.input_queue.empty()}

    had_work = with_work()

    def look(step: int) -> None:
        nonlocal had_work
        now = {kind: models[kind].core.counters.steps for kind in KINDS}
        stepped = [kind for kind in KINDS if now[kind] != steps[kind]]
        steps.update(now)
        assert len(stepped) == 1
        for kind in KINDS:
            if kind in stepped or kind not in had_work:
                waited[kind].clear()
                continue
            waited[kind][stepped[0]] += 1
            assert max(waited[kind].values()) == 1, f"{kind} has work and waits for {dict(waited[kind])}"
            longest[kind] = max(longest[kind], waited[kind].total())
        if step == LATE_STEP:
            assert "qwen3" not in with_work()
            for seed, kind in enumerate(("qwen3", "gemma3"), 10):
                for request in _requests(kind, seed, 10):
                    pooled.submit_one(kind, request, [])
        had_work = with_work()

    pooled.run(each_step=look)
    assert {kind: 3 for kind in KINDS} == longest, "not all models had work at the same time"
    pooled.check()
    pooled.close()
