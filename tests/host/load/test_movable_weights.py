# SPDX-License-Identifier: Apache-2.0
"""Weights that leave the device and come back, in the middle of streams, change no token and no logprob."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cases import make_cases, mixed
from tests.helpers.plain import Case, Result, run_plain
from tokenpool.memory.ledger import PageUse

pytestmark = pytest.mark.vllm

KINDS = ("llama", "qwen3", "gemma3", "mixtral", "qwen3_moe")
PAGE = 256 << 10
MEMORY = 64 << 20
LIMIT_S = 60.0
CHANGING = {"_q_scale", "_k_scale", "_v_scale", "_prob_scale"}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("models")
    return make_cases(folder, KINDS, mixed(4, 40), lora_kind="llama", enable_prefix_caching=True)


@pytest.fixture(scope="module")
def reference(cases: dict[str, Case]) -> dict[str, dict[str, Result]]:
    """Every case alone in plain vLLM, with the kernel that movable weights need."""
    return run_plain(list(cases.values()), plain_gemm=True)


def _pooled() -> Any:
    from tests.helpers.pooled import PooledModels

    return PooledModels(MEMORY, PAGE, poison=True, movable_weights=True)


def _assert_equal(pooled: Any, reference: dict[str, dict[str, Result]], names: tuple[str, ...]) -> None:
    for name in names:
        actual = pooled.results(name)
        for request_id, want in reference[name].items():
            assert want.tokens == actual[request_id].tokens, f"{request_id}: tokens differ"
            assert want.logprobs == actual[request_id].logprobs, f"{request_id}: logprobs differ"


def _model_of(pooled: Any, name: str) -> Any:
    return pooled.host.models[name].core.model_executor.driver_worker.worker.model_runner.get_model()


def _bring_back(store: Any, name: str) -> None:
    store.map(name)
    assert store.copy(name).wait(LIMIT_S)
    store.finish(name)


def _run_with(pooled: Any, names: tuple[str, ...], at_half: Callable[[str], None]) -> None:
    """Run all requests; about half-way through, call `at_half` for each model once."""
    left = set(names)

    def each_step(_: int) -> None:
        for name in sorted(left):
            if sum(len(result.tokens) for result in pooled.results(name).values()) >= 4 * 20:
                left.remove(name)
                at_half(name)
                pooled.check()

    pooled.run(each_step=each_step)
    assert not left


def test_streams_go_on_after_their_weights_were_away(cases, reference):
    """All kinds, with an adapter too: tokens and logprobs equal plain vLLM's; nothing was copied to the host."""
    pooled = _pooled()
    try:
        for case in cases.values():
            pooled.add(case)
        store, ledger = pooled.host.weights, pooled.host.ledger
        adopted = store.device.bytes_to_device
        for case in cases.values():
            pooled.submit(case)

        def away_and_back(name: str) -> None:
            before = ledger.num_free
            store.evict(name)
            assert ledger.num_free == before + store.pages_of(name)
            _bring_back(store, name)
            assert ledger.num_free == before

        _run_with(pooled, KINDS, away_and_back)
        _assert_equal(pooled, reference, KINDS)
        assert adopted + sum(store.bytes_of(name) for name in KINDS) == store.device.bytes_to_device
        assert 0 == store.device.bytes_to_host
        for name in KINDS:
            store.verify(name)
    finally:
        pooled.close()
    ledger = pooled.host.ledger
    assert ledger.num_free + ledger.total("null") == ledger.num_pages
    assert {} == pooled.host.host_ledger.snapshot()


def test_weights_taken_at_random_steps_are_brought_back_by_the_host(cases, reference):
    """Whenever a model has its turn again, its weights are there."""
    pooled, rng = _pooled(), random.Random(5)
    names = ("llama", "gemma3", "qwen3_moe")
    try:
        for name in names:
            pooled.add(cases[name])
            pooled.submit(cases[name])
        store, evictions = pooled.host.weights, []

        def each_step(step: int) -> None:
            name = rng.choice(names)
            if rng.random() < 0.2 and store.state(name) == "on device":
                store.evict(name)
                evictions.append(name)

        pooled.run(each_step=each_step)
        assert len(evictions) > 10
        assert set(names) == set(evictions)
        _assert_equal(pooled, reference, names)
        pooled.check()
    finally:
        pooled.close()


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_streams_go_on_after_the_host_copy_was_read_again(cases, reference, name):
    """Half-way the weights go cold, no byte of them is left but the tables; the checkpoint brings them back."""
    pooled = _pooled()
    try:
        pooled.add(cases[name])
        store, host = pooled.host.weights, pooled.host.host_ledger
        pooled.submit(cases[name])

        def cold_and_back(_: str) -> None:
            store.evict(name)
            store.drop_host(name)
            assert ("on disk", True) == (store.state(name), store.snapshot()[name].droppable)
            assert host.held(name, "weights") < store.bytes_of(name) / 4
            assert store.load_host(name).wait(LIMIT_S)
            store.finish(name)
            _bring_back(store, name)

        _run_with(pooled, (name,), cold_and_back)
        _assert_equal(pooled, reference, (name,))
    finally:
        pooled.close()


@pytest.mark.parametrize("kind", [*KINDS, "qwen2", "embed"])
def test_nothing_but_what_changes_stays_behind(kind, tiny_models):
    """Every parameter and buffer but the attention scales lies in the range, and little else is on the device."""
    from tokenpool.demo.tiny_models import ENGINE_ARGS

    pooled = _pooled()
    try:
        args = {"max_model_len": 512, **ENGINE_ARGS.get(kind, {})}
        pooled.add(Case(kind, str(tiny_models.path(kind)), args, []))
        model, held = _model_of(pooled, kind), pooled.host.weights._models[kind]
        inside = range(held.range.address, held.range.address + held.nbytes)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        outside = {name for name, t in tensors.items() if t.numel() and t.data_ptr() not in inside}
        assert CHANGING == {name.rpartition(".")[2] for name in outside}
        assert 0 < pooled.host.weights.fixed.of(kind) < 256
        assert held.proof.droppable, held.proof.problem
    finally:
        pooled.close()


@pytest.mark.parametrize("kind", [*KINDS, "qwen2", "embed"])
def test_a_later_read_does_without_the_loader(kind, tiny_models, monkeypatch):
    """Bytes of the files go straight to their places; what they give then is the host copy that was dropped."""
    from tokenpool.demo.tiny_models import ENGINE_ARGS

    pooled = _pooled()
    try:
        args = {"max_model_len": 512, **ENGINE_ARGS.get(kind, {})}
        pooled.add(Case(kind, str(tiny_models.path(kind)), args, []))
        store, model = pooled.host.weights, _model_of(pooled, kind)
        load, loads = type(model).load_weights, []

        def counted(self: Any, weights: Any) -> Any:
            loads.append(kind)
            return load(self, weights)

        monkeypatch.setattr(type(model), "load_weights", counted)
        for turn in range(3):  # the first may find a proof on disk, and have read nothing yet
            loads.clear()
            store.evict(kind)
            store.drop_host(kind)
            assert store.load_host(kind).wait(LIMIT_S)
            store.finish(kind)
            _bring_back(store, kind)
            store.verify(kind)
            assert not loads or turn == 0
    finally:
        pooled.close()


def test_a_model_is_added_where_its_weights_fit_once(cases, monkeypatch):
    """As on a GPU, where the loader has pages' memory until the host has a copy; then its pages back the range."""
    from tests.helpers.pooled import make_spec
    from tokenpool.host import engine_builder

    num_pages, lent = -(-_weight_bytes(cases["llama"]) // PAGE), []

    def make_room(device, make_room, num_pages):
        make_room(num_pages)
        lent.append(num_pages)
        return num_pages

    monkeypatch.setattr(engine_builder, "make_room_for_loading", make_room)
    pooled = _pooled()
    spec = replace(make_spec(cases["llama"]), weight_bytes=num_pages * PAGE)
    ledger = pooled.host.ledger
    ballast = ledger.take("others", PageUse.WEIGHTS, ledger.num_pages - num_pages - 5)  # 5 for KV and null blocks
    pooled.host.add_model(spec)
    assert [num_pages] == lent
    assert num_pages == ledger.held("llama", PageUse.WEIGHTS)
    pooled.submit(cases["llama"])
    ledger.give("others", PageUse.WEIGHTS, ballast)
    pooled.run()
    pooled.check()
    pooled.close()


def _weight_bytes(case: Case) -> int:
    pooled = _pooled()
    pooled.add(case)
    nbytes = pooled.host.weights.bytes_of(case.name)
    pooled.close()
    return nbytes


def test_a_model_that_does_not_fit_is_refused_and_leaves_no_trace(cases):
    """Too little host memory for the copy: the build fails, the host serves on."""
    from tests.helpers.pooled import PooledModels
    from tokenpool.errors import CapacityError

    pooled = PooledModels(MEMORY, PAGE, movable_weights=True, host_memory=1 << 20)
    try:
        with pytest.raises(CapacityError, match="raise host_memory"):
            pooled.add(cases["mixtral"])
        pooled.check()
        assert {} == pooled.host.host_ledger.snapshot()
        assert 0 == pooled.host.ledger.total("weights")
        pooled.add(cases["qwen3"])
    finally:
        pooled.close()


_STEP_WITHOUT_WEIGHTS = """
import sys
from tests.helpers.plain import Case, RequestSpec
from tests.helpers.pooled import PooledModels

request = RequestSpec("r", list(range(3, 40)), 20)
case = Case("llama", sys.argv[1], {"max_model_len": 512}, [request])
pooled = PooledModels(64 << 20, 256 << 10, movable_weights=True)
pooled.add(case)
pooled.submit(case)
core = pooled.host.models["llama"].core
for _ in range(5):
    pooled.host.run_once()
print("stepped", flush=True)
pooled.host.weights.evict("llama")
core.step_once()
print("survived", flush=True)
"""


def test_a_step_without_weights_ends_the_process(cases):
    """Unmapped pages have no access rights: a step that reads them dies by a signal instead of using other bytes."""
    child = subprocess.run(
        [sys.executable, "-c", _STEP_WITHOUT_WEIGHTS, cases["llama"].model],
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=300,
        check=False,
    )
    assert "stepped" in child.stdout
    assert "survived" not in child.stdout
    assert -child.returncode in (signal.SIGSEGV, signal.SIGBUS)
