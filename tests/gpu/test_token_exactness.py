# SPDX-License-Identifier: Apache-2.0
"""Law 1 on a real GPU: with switches at random token boundaries each model gives what it gives alone in plain vLLM.

Weights and slabs are filled with NaN when they leave. Plain vLLM uses its own KV layout, so this also compares the
pool's layout with it, for each attention backend that vLLM has for such models.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

ON_CPU = "GPU_TESTS_ON_CPU" in os.environ
"""Tries this test out where there is no GPU, with the backend of the CPU in the place of the first."""
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (ON_CPU or torch.cuda.is_available()), reason="NO CUDA DEVICE: no token was compared on a GPU"
    ),
]

KINDS = ("llama", "gemma3", "mixtral")
"""gemma3 has sliding windows: blocks that its requests no longer have are poisoned and taken away."""
HEAD_SIZE = 64
"""FlashInfer has no kernel for the 32 of tiny models."""
PAGE, PAGES = 2 << 20, 5
"""Two pages for the weights of a model, one for null blocks: not all models fit beside their KV."""
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}
MODES = {
    "eager": {"enforce_eager": True},
    "graphs": {"enforce_eager": False, "compilation_config": GRAPHS},
    "compiled": {"enforce_eager": False},
}


BACKENDS = {"FLASH_ATTN": "vllm.vllm_flash_attn", "FLASHINFER": "flashinfer", "TRITON_ATTN": "triton"}
"""Attention backend -> the module without which it does not run."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_switches_at_random_token_boundaries_change_no_stream(mode, backend, tmp_path, monkeypatch):
    """Eager first, then graphs, then torch.compile: the order in which to look for what is wrong."""
    if not ON_CPU and importlib.util.find_spec(BACKENDS[backend]) is None:
        pytest.skip(f"NO {BACKENDS[backend]}: attention backend {backend} was not checked")
    from tests.helpers.cases import make_cases, mixed
    from tests.helpers.plain import run_plain
    from tests.helpers.pooled import PooledModels
    from tests.host.test_switching import RandomTurns
    from tokenpool.demo import tiny_models

    args = {"gpu_memory_utilization": 0.3, "attention_backend": backend, **MODES[mode]}
    if ON_CPU:
        args = dict(MODES[mode])
    common = tiny_models._common
    monkeypatch.setattr(tiny_models, "_common", lambda *a, **k: common(*a, **k) | {"head_dim": HEAD_SIZE})
    cases = make_cases(tmp_path, KINDS, mixed(5, 48), **args)
    reference = run_plain(list(cases.values()))
    pool = PooledModels(PAGES * PAGE, PAGE, poison=True, movable_weights=True, host_memory=1 << 30)
    pool.host._turns._policy = RandomTurns(1)
    for case in cases.values():
        pool.add(case)
    for case in cases.values():
        pool.submit(case)
    pool.run(each_step=lambda step: step % 25 or pool.check())

    evictions = pool.host.residency.counters.weight_evictions
    assert evictions > 10, f"only {evictions} evictions: nothing was shown"
    compared = 0
    for kind in KINDS:
        for request_id, got in pool.results(kind).items():
            want = reference[kind][request_id]
            if not (got.preempted or want.preempted):
                assert want.tokens == got.tokens, f"{request_id}: tokens differ"
                compared += 1
    assert compared >= 10, f"only {compared} streams were compared"
    pool.close()
