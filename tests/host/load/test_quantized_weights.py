# SPDX-License-Identifier: Apache-2.0
"""Quantised weights that leave the device and come back give the tokens and logprobs of plain vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cases import mixed
from tests.helpers.plain import Case, Result, run_plain
from tokenpool.demo.tiny_quantized import SCHEMES, make_w8a8

pytestmark = pytest.mark.vllm

PAGE, MEMORY = 256 << 10, 16 << 20
LIMIT_S = 60.0
HANDLED = tuple(scheme for scheme in SCHEMES if scheme.startswith("int8"))
"""Those whose weights are packed into handles where the CPU has no AMX."""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    from tokenpool.demo.tiny_models import make_tiny_model

    folder: Path = tmp_path_factory.mktemp("models")
    base = make_tiny_model("llama", folder / "llama")
    return {
        scheme: Case(
            scheme,
            str(make_w8a8(base, folder / scheme, scheme)),
            {"max_model_len": 512},
            mixed(2, 24)(scheme, index, None),
        )
        for index, scheme in enumerate(SCHEMES)
    }


@pytest.fixture(scope="module")
def reference(cases: dict[str, Case]) -> dict[str, dict[str, Result]]:
    """Every case alone in plain vLLM; its layers that are not quantised with the kernel that movable weights need."""
    return run_plain(list(cases.values()), plain_gemm=True)


def _pooled(**config: Any) -> Any:
    from tests.helpers.pooled import PooledModels

    return PooledModels(MEMORY, PAGE, poison=True, movable_weights=True, **config)


def test_streams_are_those_of_plain_vllm_under_switches(cases, reference):
    """Each model leaves the device again and again; what cannot leave is in the books, and the rest comes back."""
    pooled = _pooled()
    try:
        for case in cases.values():
            pooled.add(case)
            pooled.submit(case)
        store, evicted = pooled.host.weights, set()

        def each_step(step: int) -> None:
            name = SCHEMES[step % len(SCHEMES)]
            if step % 3 == 0 and store.state(name) == "on device":
                store.evict(name)
                evicted.add(name)

        pooled.run(each_step=each_step)
        assert set(SCHEMES) == evicted
        for name in SCHEMES:
            got = pooled.results(name)
            assert {key: want.tokens for key, want in reference[name].items()} == {
                key: result.tokens for key, result in got.items()
            }
            assert {key: want.logprobs for key, want in reference[name].items()} == {
                key: result.logprobs for key, result in got.items()
            }
            assert len({token for result in got.values() for token in result.tokens}) > 5
        pooled.check()
    finally:
        pooled.close()
    assert 0 == pooled.host.ledger.total("weights")


def _has_handles(pooled: Any, name: str) -> bool:
    from vllm._custom_ops import CPUDNNLGEMMHandler

    from tokenpool.host.load.model_tensors import _walk

    model = pooled.host.models[name].core.model_executor.driver_worker.worker.model_runner.get_model()
    return any(isinstance(value, CPUDNNLGEMMHandler) for _, _, value in _walk([model]))


def test_what_a_handle_has_packed_is_in_the_books(cases):
    """The int8 weights that stay behind count as pages that no model can have; with the model they go."""
    from tokenpool.host.state import host_state, model_state
    from tokenpool.memory.fixed_bytes import FIXED_OWNER

    pooled = _pooled()
    try:
        pooled.add(cases["int8"])
        host = pooled.host
        if not _has_handles(pooled, "int8"):  # with AMX vLLM keeps the packed weights in parameters, which move
            assert host.weights.fixed.of("int8") < 256
            return
        packed = 2 * 128 * (128 + 2 * 64 + 128 + 3 * 256)  # q, k and v, o, and the three of the MLP, in two layers
        fixed = host.weights.fixed.of("int8")
        assert packed < fixed < packed * 1.2
        assert fixed == model_state(host, host.models["int8"])["fixed_bytes"]
        pages = -(-fixed // PAGE)
        assert pages == host.weights.fixed.num_pages == host_state(host)["held_pages"]["weights"][FIXED_OWNER]
        free = host.ledger.num_pages - host.ledger.total("null") - pages - host.weights.pages_of("int8")
        assert free == host.residency.room.most_slabs_for("int8")
        host.remove_model("int8")
        assert 0 == host.weights.fixed.num_pages == host.ledger.total("weights")
    finally:
        pooled.close()


def test_a_model_that_still_reads_the_old_memory_is_refused(cases, monkeypatch):
    """The self-test finds handles that nobody knows of: it names the layer and gives the hint, and no trace is left."""
    from tokenpool.errors import ModelRefusedError
    from tokenpool.host.load import model_tensors

    pooled = _pooled()
    try:
        pooled.add(cases["int8"])
        handled = _has_handles(pooled, "int8")
        pooled.host.remove_model("int8")
        if not handled:
            return
        before = pooled.host.ledger.snapshot()
        with monkeypatch.context() as blind:
            blind.setattr(model_tensors, "CPUDNNLGEMMHandler", type("Unknown", (), {}))
            for _ in range(2):
                with pytest.raises(ModelRefusedError, match=r"layers\.0\.self_attn\.qkv_proj .*set weights: fixed"):
                    pooled.add(cases["int8"])
                assert before == pooled.host.ledger.snapshot()
                assert {} == pooled.host.host_ledger.snapshot()
                pooled.check()
        pooled.add(cases["int8"])
    finally:
        pooled.close()
