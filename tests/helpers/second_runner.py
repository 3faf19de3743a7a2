# SPDX-License-Identifier: Apache-2.0
"""Runs pooled models on vLLM's second model runner, on the CPU: its Triton kernels run in Triton's interpreter.

A process of its own, because the choice of runner and Triton's mode hold for the whole process. Prints one line of
JSON: what each request gave without moves and with moves.
"""

from __future__ import annotations

import json
import os
import sys

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}

from triton.backends import backends  # noqa: E402

NO_TRITON = "this vLLM finds no Triton"


class _AlwaysActive:
    """vLLM uses Triton only if exactly one backend says that it has a device."""

    @staticmethod
    def is_active() -> bool:
        return True


class _CpuBackend:
    driver = _AlwaysActive
    compiler = None


def main(*models: str) -> None:
    """Run the checkpoints at the paths `models` side by side, first without moves, then with."""
    backends["cpu"] = _CpuBackend  # before vLLM is imported

    from vllm.triton_utils import HAS_TRITON

    if not HAS_TRITON:  # vLLM 0.29 does not accept our backend
        print(NO_TRITON, flush=True)
        return
    from tests.helpers.plain import Case, RequestSpec, prompts_for
    from tests.helpers.stepping import RandomMoves, SteppedModels
    from tokenpool.host.runner_adapter import RunnerAdapterV2

    pooled = SteppedModels(32 << 20, 256 << 10)
    args = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 256, "enable_prefix_caching": False}
    results = {}
    for index, model in enumerate(models):
        pooled.add(Case(f"m{index}", model, args, []))
    for what in ("still", "moved"):
        for index in range(len(models)):
            prompts = prompts_for(index, 3, lengths=(7, 60, 130))
            for i, prompt in enumerate(prompts):
                request = RequestSpec(f"{what}-{i}", prompt, 24)  # greedy: seeded sampling does not run interpreted
                pooled.submit_one(f"m{index}", request, [])
        if what == "still":
            pooled.run_all()
        else:
            pooled.run_all(RandomMoves(pooled, 1))
    for name in pooled.host.models:
        if pooled.swapper.is_out(name):
            pooled.into(name)
        assert isinstance(pooled.swapper._adapters[name], RunnerAdapterV2)
        results[name] = {key: (result.tokens, result.logprobs) for key, result in pooled.results(name).items()}
    pooled.check()
    print(json.dumps({"moved_ids": pooled.moved_ids, "results": results}), flush=True)
    pooled.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
