# SPDX-License-Identifier: Apache-2.0
"""Engines step and close with their own values of what vLLM keeps once per process, whatever the host did before."""

from __future__ import annotations

import os
import weakref
from dataclasses import replace

import pytest
import torch

from tests.helpers.cases import greedy, make_cases

pytestmark = pytest.mark.vllm

GRAPHS = "VLLM_USE_BREAKABLE_CUDAGRAPH"


def test_a_model_that_comes_and_goes_leaves_the_others_workspace_alone(tmp_path):
    """A model keeps its workspace, which its CUDA graphs point into; one that closes resets its own."""
    from vllm.v1.worker import workspace

    from tests.helpers.pooled import PooledModels

    case = make_cases(tmp_path, ("llama",), greedy(2, 20))["llama"]
    pooled = PooledModels(16 << 20, 256 << 10)
    seen = []

    def watch(name: str) -> None:
        """Note the workspace at each step of the model's runner, and when it closes."""
        runner = pooled.host.models[name].core.model_executor.driver_worker.worker.model_runner
        execute_model, shutdown = runner.execute_model, runner.shutdown

        def execute(*args, **kwargs):
            seen.append((name, workspace._manager))
            return execute_model(*args, **kwargs)

        def close():
            seen.append((f"close {name}", workspace._manager))
            shutdown()
            assert workspace._manager is None

        runner.execute_model, runner.shutdown = execute, close

    def add(name: str) -> None:
        pooled.add(replace(case, name=name))
        workspace._manager = f"workspace of {name}"  # as a GPU worker does while its engine is built
        watch(name)

    add("stays")
    for request in case.requests:
        pooled.submit_one("stays", request, [])
    for _ in range(3):
        pooled.run_once()
    add("goes")
    for _ in range(3):
        pooled.run_once()
    pooled.host.remove_model("goes")
    pooled.run()
    assert 20 < len(seen)
    assert {("stays", "workspace of stays"), ("close goes", "workspace of goes")} == set(seen)
    pooled.close()


COMPILED = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}


def test_a_removed_compiled_model_is_freed(tmp_path):
    """torch.compile keeps a hook for each compiled model, which keeps the model: it goes with the model's engine.

    So it is when a build fails after its model was made; the other model serves on.
    """
    from torch._dynamo import convert_frame

    from tests.helpers.pooled import PooledModels, make_spec
    from tokenpool.host.load import model_build

    case = make_cases(tmp_path, ("llama",), greedy(2, 6))["llama"]
    pooled = PooledModels(16 << 20, 256 << 10)
    before = len(convert_frame._bytecode_hooks)
    models = {}
    for name in ("stays", "goes"):
        pooled.add(replace(case, name=name), **COMPILED)
        runner = pooled.host.models[name].core.model_executor.driver_worker.worker.model_runner
        models[name] = weakref.ref(runner.get_model())
        del runner
    assert before + 2 == len(convert_frame._bytecode_hooks), "the models are not compiled: the test proves nothing"
    pooled.submit(replace(case, name="stays"))
    pooled.run_once()
    pooled.host.remove_model("goes")
    assert models["goes"]() is None
    made = []

    def fail(build, *args):
        made.append(len(convert_frame._bytecode_hooks))
        raise RuntimeError("no KV cache")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_build.ModelBuild, "allocate_kv_cache", fail)
        with pytest.raises(RuntimeError, match="no KV cache"):
            pooled.host.add_model(make_spec(replace(case, name="fails"), **COMPILED))
    assert [before + 2] == made
    assert before + 1 == len(convert_frame._bytecode_hooks)
    pooled.run()
    assert ["length"] * 2 == [pooled.finish_reason("stays", request.request_id) for request in case.requests]
    assert models["stays"]() is not None
    pooled.close()
    assert models["stays"]() is None


def test_each_model_has_its_own_choice_of_kernels_and_graphs(monkeypatch):
    """What a build sets for the process does not reach a model that was there before, nor one that comes later."""
    from vllm import envs, ir

    from tokenpool.host.engine.engine_globals import EngineGlobals

    monkeypatch.delenv(GRAPHS, raising=False)
    operator = next(iter(ir.op.IrOp.registry.values()))
    before = operator._priority_impls, ir.op._ENABLE_TORCH_WRAP
    kept = EngineGlobals()
    try:
        with kept.building("plain"):
            operator._priority_impls = ["plain"]
        envs.enable_envs_cache()
        with kept.building("in pieces"):
            assert not envs.VLLM_USE_BREAKABLE_CUDAGRAPH
            operator._priority_impls, ir.op._ENABLE_TORCH_WRAP = ["other"], not before[1]
            os.environ[GRAPHS] = "1"
            assert envs.VLLM_USE_BREAKABLE_CUDAGRAPH
            with kept.build_paused():
                kept.enter("plain")
                assert ["plain"] == operator._priority_impls
                assert not envs.VLLM_USE_BREAKABLE_CUDAGRAPH
            assert envs.VLLM_USE_BREAKABLE_CUDAGRAPH
        for name, own in (("plain", False), ("in pieces", True), ("plain", False)):
            kept.enter(name)
            assert own == envs.VLLM_USE_BREAKABLE_CUDAGRAPH
            assert ["other" if own else "plain"] == operator._priority_impls
            assert ir.op._ENABLE_TORCH_WRAP == (before[1] != own)
        kept.forget("plain")
        with kept.building("later"):
            assert GRAPHS not in os.environ
    finally:
        operator._priority_impls, ir.op._ENABLE_TORCH_WRAP = before
        envs.disable_envs_cache()


def test_a_build_that_pauses_does_not_split_the_blocks_of_others(monkeypatch):
    """While a checkpoint is read torch's allocator splits otherwise; engines that step meanwhile have their own way."""
    from tokenpool.host.engine.engine_globals import EngineGlobals

    settings = ["max_split_size_mb:512"]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: None)
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", lambda: settings[-1], raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append, raising=False)
    kept = EngineGlobals()
    with kept.building("a"):
        settings.append("max_split_size_mb:20")
        with kept.build_paused():
            assert "max_split_size_mb:512" == settings[-1]
        assert "max_split_size_mb:20" == settings[-1]
    assert "max_split_size_mb:512" == settings[-1]
    assert 5 == len(settings)
