# SPDX-License-Identifier: Apache-2.0
"""What an engine waits for besides memory, and memory that is short on the host: nobody waits for ever."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from tests.helpers.cases import greedy, make_cases, mixed
from tests.helpers.plain import Case
from tokenpool.wire.stop_reasons import GRAMMAR_FAILED

pytestmark = pytest.mark.vllm

KINDS = ("llama", "qwen2", "gemma3")
PAGE = 256 << 10
SCHEMA = {"type": "object", "properties": {f"p{i}": {"enum": ["red", "green", "blue"]} for i in range(6)}}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return make_cases(tmp_path_factory.mktemp("models"), KINDS, greedy(2, 24))


def _pool(cases, kinds=KINDS, pages=128, **host_config):
    from tests.helpers.pooled import PooledModels

    pooled = PooledModels(pages * PAGE, PAGE, **host_config)
    for kind in kinds:
        pooled.add(cases[kind])
    return pooled


def _ask_for_json(pooled, model: str) -> None:
    """Queue a request whose answer has to follow SCHEMA."""
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams
    from vllm.v1.engine import EngineCoreRequest, EngineCoreRequestType

    from tests.helpers.pooled import _Collected

    core = pooled.host.models[model].core
    params = SamplingParams(temperature=0.0, max_tokens=8, structured_outputs=StructuredOutputsParams(json=SCHEMA))
    params.structured_outputs._backend = "xgrammar"
    message = EngineCoreRequest(
        request_id="json",
        prompt_token_ids=[5, 6, 7],
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    queued = core.preprocess_add_request(message)
    pooled._collected[model, "json"] = _Collected(request=queued[0])
    core.input_queue.put((EngineCoreRequestType.ADD, queued))


def test_a_request_whose_grammar_is_compiled_late_is_answered_on_a_quiet_pool(cases, monkeypatch):
    """Nothing else happens, and its model is not stepped in vain meanwhile; the loop is woken by the grammar."""
    from tokenpool.host.state import host_load, model_state

    pooled = _pool(cases, ("llama",))
    core, compiled = pooled.host.models["llama"].core, threading.Event()
    create = core.structured_output_manager._create_grammar

    def create_late(request):
        assert compiled.wait(60)
        return create(request)

    monkeypatch.setattr(core.structured_output_manager, "_create_grammar", create_late)
    _ask_for_json(pooled, "llama")
    for _ in range(20):
        assert not pooled.run_once()
    assert core.counters.steps <= 1
    assert {"grammar": 1} == model_state(pooled.host, pooled.host.models["llama"])["waits"]
    told = host_load(pooled.host)["llama"]  # what frontends are told meanwhile: a request, and places for others
    places = core.vllm_config.scheduler_config.max_num_seqs
    assert (1, places - 1, True) == (told["waiting"] + told["running"], told["places"], told["request_load"] > 0)
    pooled.host._wake.clear()
    compiled.set()
    assert pooled.host._wake.wait(60)
    pooled.run(max_steps=2000)

    assert pooled.finish_reason("llama", "json") in ("length", "stop")
    assert {} == pooled.host._relief.starved
    pooled.close()


def test_a_request_whose_grammar_cannot_be_compiled_says_so(cases, monkeypatch):
    """Its client is told that it asked for too much, and not that the server failed."""
    pooled = _pool(cases, ("llama",))
    core, sent = pooled.host.models["llama"].core, []

    def fail(request):
        raise RuntimeError("too many states")

    def keep(outputs):
        sent.extend(each for of_client in outputs.values() for each in of_client.outputs)
        send(outputs)

    send = core._send
    monkeypatch.setattr(core.structured_output_manager, "_create_grammar", fail)
    monkeypatch.setattr(core, "_send", keep)
    _ask_for_json(pooled, "llama")
    pooled.run(max_steps=2000)

    assert [(each.request_id, str(each.finish_reason), each.stop_reason) for each in sent] == [
        ("json", "error", GRAMMAR_FAILED)
    ]
    pooled.close()


def test_a_model_that_waits_for_a_grammar_takes_nobody_off_the_device(cases, monkeypatch):
    """Its floor stays as it is, and models that have work go on."""
    pooled = _pool(cases, ("llama", "qwen2"), pages=12, movable_weights=True, host_memory=64 << 20)
    manager, compiled = pooled.host.models["llama"].core.structured_output_manager, threading.Event()
    create = manager._create_grammar
    monkeypatch.setattr(manager, "_create_grammar", lambda request: compiled.wait(60) and create(request))
    pooled.submit(cases["qwen2"])
    pooled.run_once()
    switches = pooled.host.residency.counters.switches
    _ask_for_json(pooled, "llama")

    def stop_waiting(step: int) -> None:
        if not pooled.host.models["qwen2"].core.has_work() and not compiled.is_set():
            assert switches == pooled.host.residency.counters.switches
            compiled.set()

    pooled.run(each_step=stop_waiting, max_steps=5000)
    assert compiled.is_set()
    assert pooled.finish_reason("llama", "json") in ("length", "stop")
    assert {"length"} == {pooled.finish_reason("qwen2", r.request_id) for r in cases["qwen2"].requests}
    pooled.close()


def test_the_abort_of_a_starved_request_lets_the_others_go_on(tmp_path: Path):
    """The floor that was raised for it falls with it, although its model has nothing to step for any more."""
    from tokenpool.memory.ledger import PageUse

    cases = make_cases(tmp_path, KINDS, mixed(4, 400))
    roomy = _pool(cases)
    weights = roomy.host.ledger.total(PageUse.WEIGHTS)
    roomy.close()
    pooled = _pool(cases, pages=weights + 8)
    for case in cases.values():
        pooled.submit(case)
    for _ in range(4000):
        if not pooled.run_once():
            time.sleep(0.001)
        if starved := pooled.host._relief.raised:
            break
    assert starved, "memory was never short"
    left = [r for r in cases[starved].requests if pooled.finish_reason(starved, r.request_id) is None]
    pooled.abort(starved, *(request.request_id for request in left))
    pooled.run(max_steps=8000)

    for kind in set(KINDS) - {starved}:
        assert {"length"} == {pooled.finish_reason(kind, r.request_id) for r in cases[kind].requests}
    assert pooled.host._relief.raised is None
    pooled.check()
    pooled.close()


@pytest.mark.parametrize("together", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("host_kib", [3600, pytest.param(4300, marks=pytest.mark.slow)])
def test_models_whose_weights_do_not_fit_host_memory_together_are_all_answered(cases, host_kib, together):
    """One after the other they are read from disk, each for requests that wait, and none again and again."""
    pooled = _pool(cases, pages=14, movable_weights=True, host_memory=host_kib << 10)
    for kind in KINDS:
        pooled.submit(cases[kind])
        if not together:
            pooled.run(max_steps=8000)
    pooled.run(max_steps=8000)

    for kind in KINDS:
        assert {"length"} == {pooled.finish_reason(kind, r.request_id) for r in cases[kind].requests}
    reads = [event for event in pooled.host.trace.events(0.0) if event.kind == "weights_from_disk"]
    turns = sum(hosted.core.counters.turns for hosted in pooled.host.models.values())
    assert 0 < len(reads) <= turns, "weights were read for nothing"
    pooled.check()
    pooled.close()


def test_a_model_that_can_never_be_read_into_host_memory_is_refused(cases):
    """What must stay of the others and its own copy together have to fit."""
    from tokenpool.errors import CapacityError

    with pytest.raises(CapacityError, match="host_memory"):
        _pool(cases, pages=14, movable_weights=True, host_memory=1200 << 10)


def test_an_engine_that_is_lost_while_another_model_comes_in_ends_the_host(tmp_path: Path):
    """The model that is brought in is not charged with it, and the lost engine makes no further step."""
    from vllm.v1.core.sched.interface import PauseState

    from tests.helpers.v2_runner import async_scheduling_allowed
    from tokenpool.errors import EngineLostError

    with async_scheduling_allowed():
        cases = make_cases(tmp_path, ("llama", "qwen2"), mixed(2, 40), async_scheduling=True)
        pooled = _pool(cases, ("llama", "qwen2"), pages=12, movable_weights=True, host_memory=64 << 20)
        for case in cases.values():
            pooled.submit(case)
        core = pooled.host.models["llama"].core
        step_once, raised = core.step_once, []

        def out_of_memory(**kwargs):
            assert not raised, "the lost engine steps again"
            if core.scheduler._pause_state == PauseState.PAUSED_ALL:
                raised.append(True)
                raise MemoryError("the device is out of memory")
            return step_once(**kwargs)

        core.step_once = out_of_memory
        with pytest.raises(EngineLostError, match="out of memory"):
            pooled.run(max_steps=3000)
    assert raised
    assert {"llama": 0, "qwen2": 0} == {name: hosted.failures for name, hosted in pooled.host.models.items()}
