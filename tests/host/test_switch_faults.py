# SPDX-License-Identifier: Apache-2.0
"""Whatever fails in the middle of a switch, states stay legal, other models go on and every request is answered."""

from __future__ import annotations

import random

import pytest

from tests.helpers.cases import greedy, make_cases
from tests.helpers.plain import Case, RequestSpec, run_plain

pytestmark = pytest.mark.vllm

KINDS = ("llama", "gemma3", "qwen2")
PAGE = 256 << 10
PAGES = 14
"""Room for one model's weights and some KV of two."""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return make_cases(tmp_path_factory.mktemp("models"), KINDS, greedy(4, 24))


@pytest.fixture(scope="module")
def reference(cases: dict[str, Case]) -> dict[str, dict[str, object]]:
    return run_plain(list(cases.values()), plain_gemm=True)


class Faults:
    """Makes calls of the device fail that are named in `armed`, each with a given probability."""

    def __init__(self) -> None:
        self.armed: dict[str, float] = {}
        self.fired = 0
        self.in_step = False
        """No faults inside a step: a device that cannot map pages there ends the host."""
        self._random = random.Random(5)

    def device(self):
        from tokenpool.memory.devices.cpu import CpuDevice

        faults = self

        class FaultyDevice(CpuDevice):
            def map_zeroed(self, address, nbytes):
                faults.maybe("map_zeroed")
                super().map_zeroed(address, nbytes)

            def map_unset(self, address, nbytes):
                faults.maybe("map_zeroed")
                super().map_unset(address, nbytes)

            def copy_in(self, address, source):
                faults.maybe("copy_in")
                super().copy_in(address, source)

            def copy_out(self, target, address):
                faults.maybe("copy_out")
                super().copy_out(target, address)

        return FaultyDevice(keeps_bytes=True)

    def watch(self, core) -> None:
        """Know when the engine steps."""
        step_once = core.step_once

        def watched(**kwargs):
            self.in_step = True
            try:
                return step_once(**kwargs)
            finally:
                self.in_step = False

        core.step_once = watched

    def maybe(self, call: str) -> None:
        if call == "map_zeroed" and self.in_step:
            return
        if self._random.random() < self.armed.get(call, 0.0):
            self.fired += 1
            raise OSError(f"injected fault in {call}")


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def pool(request, faults, cases):
    from tests.helpers.pooled import PooledModels

    host_memory = getattr(request, "param", 256 << 20)
    pooled = PooledModels(
        PAGES * PAGE, PAGE, device=faults.device(), poison=True, movable_weights=True, host_memory=host_memory
    )
    for case in cases.values():
        pooled.add(case)
    for case in cases.values():
        faults.watch(pooled.host.models[case.name].core)
        pooled.submit(case)
    yield pooled
    faults.armed.clear()
    pooled.check()
    pooled.close()
    assert pooled.host.ledger.num_free + pooled.host.ledger.total("null") == pooled.host.ledger.num_pages


def _finish(pooled, cases, reference) -> None:
    """Run to the end: each request is answered, in full unless it failed, and with plain vLLM's tokens."""

    def each_step(step: int) -> None:
        if step % 10 == 0:
            pooled.check()

    pooled.run(each_step=each_step)
    for kind, case in cases.items():
        results = pooled.results(kind)
        for request in case.requests:
            reason = pooled.finish_reason(kind, request.request_id)
            assert reason in ("length", "error"), f"{request.request_id} ended with {reason}"
            want, got = reference[kind][request.request_id], results[request.request_id]
            if reason == "length" and not got.preempted:
                assert want.tokens == got.tokens, f"{request.request_id}: tokens differ"
            else:
                assert reason == "error" or len(got.tokens) == request.max_tokens


@pytest.mark.parametrize("call", [pytest.param("map_zeroed", marks=pytest.mark.slow), "copy_in", "copy_out"])
def test_a_device_call_that_fails_now_and_then_costs_no_stream(pool, faults, cases, reference, call):
    """Mapping, copies to the device and copies to the host fail at random: the switch is tried again."""
    faults.armed[call] = 0.05
    _finish(pool, cases, reference)

    assert faults.fired > 0


def test_a_device_that_takes_no_copies_fails_requests_and_nothing_else(pool, faults, cases, reference):
    """While nothing can be copied in, requests of absent models end with an error; afterwards all is well."""

    def reasons() -> set[str | None]:
        return {pool.finish_reason(k, r.request_id) for k, case in cases.items() for r in case.requests}

    def arm(step: int) -> None:
        if step == 5:
            faults.armed["copy_in"] = 1.0
        if "error" in reasons():
            faults.armed.clear()

    pool.run(each_step=arm)
    assert reasons() == {"error", "length"}
    assert pool.host.residency.counters.failures > 0
    pool.check()
    for kind, case in cases.items():
        pool.submit_one(kind, RequestSpec(f"{kind}-again", case.requests[0].prompt_token_ids, max_tokens=24), [])
    pool.run()
    for kind, case in cases.items():
        want = reference[kind][case.requests[0].request_id]
        assert want.tokens[:1] == pool.results(kind)[f"{kind}-again"].tokens[:1]
        assert "length" == pool.finish_reason(kind, f"{kind}-again")


@pytest.mark.parametrize("pool", [6 << 20], indirect=True)
def test_a_full_host_tier_keeps_kv_on_the_device(pool, cases, reference):
    """With hardly any host memory beyond the weights' copies, KV that cannot leave stays and all requests end."""
    _finish(pool, cases, reference)


def test_a_model_removed_while_it_is_brought_in_leaves_nothing(pool, faults, cases, reference):
    """Removing a model whose weights are on their way cancels the copy; its pages and host memory come back."""
    pool.abort("qwen2", *(request.request_id for request in cases["qwen2"].requests))
    pool.host.run_once()
    hosted = pool.host.models["qwen2"]
    pool.host.residency.prefetch(hosted)
    pool.host.remove_model("qwen2")
    pool.check()
    assert "qwen2" not in pool.host.weights
    assert "qwen2" not in {owner for owners in pool.host.host_ledger.snapshot().values() for owner in owners}
    _finish(pool, {kind: cases[kind] for kind in ("llama", "gemma3")}, reference)


def test_a_step_that_crashes_while_models_switch_costs_one_request(pool, faults, cases, reference):
    """A broken request fails alone although its model comes and goes while it is looked for."""
    runner = pool.host.models["llama"].core.model_executor.driver_worker.worker.model_runner
    original = runner.execute_model

    def execute_model(scheduler_output, *args, **kwargs):
        output = original(scheduler_output, *args, **kwargs)
        if "llama-1" in scheduler_output.num_scheduled_tokens:
            raise RuntimeError("kernel failed")
        return output

    runner.execute_model = execute_model
    _finish(pool, cases, reference)

    assert "error" == pool.finish_reason("llama", "llama-1")
    assert "length" == pool.finish_reason("llama", "llama-0")
