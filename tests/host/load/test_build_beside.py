# SPDX-License-Identifier: Apache-2.0
"""A model is built in slices between the steps of others, and neither side can tell."""

from __future__ import annotations

import threading

import pytest

from tests.helpers.cases import make_cases, mixed
from tests.helpers.plain import run_plain

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("movable", [pytest.param(False, marks=pytest.mark.slow), True], ids=["fixed", "movable"])
def test_models_run_on_while_another_is_built(tmp_path, monkeypatch, movable):
    """With a pause wherever one may be, tokens and logprobs of all are those of plain vLLM."""
    from tests.helpers.pooled import PooledModels, make_spec
    from tokenpool.host.load import build_lane

    monkeypatch.setattr(build_lane, "SLICE_S", 0.0)
    cases = make_cases(tmp_path, ("qwen2", "gemma3", "mixtral"), mixed(6, 80))
    expected = run_plain(list(cases.values()), plain_gemm=movable)
    pooled = PooledModels(24 << 20, 256 << 10, poison=True, movable_weights=movable)
    pooled.add(cases["qwen2"])
    host = pooled.host

    def build(name):
        future = host.build_beside(lambda: host.add_model(make_spec(cases[name])))
        slices = 0
        while not future.done():
            pooled.run_once()
            host.build_on()
            host.check()
            slices += 1
        future.result()
        pooled.submit(cases[name])
        return slices

    pooled.submit(cases["qwen2"])
    slices = [build("gemma3"), build("mixtral")]
    pooled.run()

    assert min(slices) > 50, f"{slices} slices: hardly anybody got a turn meanwhile"
    for kind in cases:
        assert expected[kind] == pooled.results(kind)
    pooled.close()


def threads_of_engines() -> set[threading.Thread]:
    """Threads that run code of tokenpool or vLLM; other libraries start theirs when they like."""
    targets = ((thread, getattr(thread, "_target", None)) for thread in threading.enumerate())
    return {thread for thread, target in targets if getattr(target, "__module__", "").startswith(("tokenpool", "vllm"))}


def test_a_build_that_fails_or_is_given_up_leaves_no_trace(tmp_path):
    """The error is the future's, also when the host ends meanwhile; pages, threads and globals are as before."""
    from tests.helpers.pooled import PooledModels, make_spec
    from tokenpool.errors import CapacityError, ConfigError, HostError

    cases = make_cases(tmp_path, ("qwen2", "llama"), mixed(4, 80))
    pooled = PooledModels(16 << 20, 256 << 10)
    host = pooled.host
    pooled.add(cases["qwen2"])
    before, threads = host.ledger.snapshot(), threads_of_engines()

    def run_beside(**engine_args):
        future = host.build_beside(lambda: host.add_model(make_spec(cases["llama"], **engine_args)))
        while not future.done():
            pooled.run_once()
            host.build_on()
        return future

    too_long = {"hf_overrides": {"max_position_embeddings": 100_000}, "max_model_len": 60_000}
    assert isinstance(run_beside(**too_long).exception(), CapacityError)
    assert (before, threads) == (host.ledger.snapshot(), threads_of_engines())
    assert run_beside().result() is host.models["llama"]
    assert isinstance(run_beside().exception(), ConfigError)
    host.remove_model("llama")

    pooled.submit(cases["qwen2"])
    jobs = [host.build_beside(lambda: host.add_model(make_spec(cases["llama"]))) for _ in range(2)]
    host.build_on()
    assert ["build"] == [thread.name for thread in threads_of_engines() - threads]
    host.stop()
    host.run()
    pooled._collect()
    assert all(isinstance(job.exception(), HostError) for job in jobs)
    assert {80} == {len(result.tokens) for result in pooled.results("qwen2").values()}
    pooled.check()
    assert {"qwen2"} == set(host.models) == set(host.ledger.snapshot().held["kv"])
    assert before.held["weights"] == host.ledger.snapshot().held["weights"]
    assert threads == threads_of_engines()
    pooled.close()


def test_the_first_model_is_built_on_the_loops_own_thread():
    """An engine that nobody waits beside needs no slices; OpenMP binds the cores of the thread it is built on."""
    from tokenpool.host.engine.engine_globals import EngineGlobals
    from tokenpool.host.load.build_lane import BuildLane

    lane = BuildLane(EngineGlobals())
    alone, beside = (lane.submit(threading.current_thread) for _ in range(2))
    lane.run_slice(beside=False)
    assert alone.result() is threading.current_thread()
    assert lane.busy and not beside.done()
    lane.run_slice(beside=True)
    assert beside.result() is not threading.current_thread()
    assert not lane.busy
