# SPDX-License-Identifier: Apache-2.0
"""Law 1: a pooled model's tokens and logprobs equal those of the same model alone in plain vLLM."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.helpers.cases import make_cases, mixed
from tests.helpers.plain import Case, run_plain
from tokenpool.memory.devices.cpu import CpuDevice

if TYPE_CHECKING:
    from tests.helpers.pooled import PooledModels

pytestmark = pytest.mark.vllm

KINDS = ("llama", "qwen2", "qwen3", "gemma3", "mixtral", "qwen3_moe", "deepseek_v2", "embed")
PAGE = 256 << 10
ROOMY = 64 << 20
TIGHT_PAGES = 9
"""KV pages left for five models whose requests, all together, want about 20."""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return make_cases(tmp_path_factory.mktemp("models"), KINDS, mixed(5, 60), lora_kind="llama")


def _plain(cases: dict[str, Case], prefix_caching: bool) -> dict[str, dict[str, object]]:
    """Every case alone in plain vLLM."""
    more = {"enable_prefix_caching": prefix_caching}
    return run_plain([replace(case, engine_args={**case.engine_args, **more}) for case in cases.values()])


@pytest.fixture(scope="module")
def reference(cases: dict[str, Case]) -> dict[str, dict[str, object]]:
    """What plain vLLM gives with its prefix cache."""
    return _plain(cases, prefix_caching=True)


def _assert_equal(pooled, cases, reference) -> int:
    """All results equal the reference's; returns how many were compared, preempted ones are exempt."""
    compared = 0
    for name, case in cases.items():
        expected = reference[name]
        actual = pooled.results(name)
        for request in case.requests:
            want, got = expected[request.request_id], actual[request.request_id]
            if got.preempted or want.preempted:
                assert len(want.tokens) == len(got.tokens)
                continue
            assert want.tokens == got.tokens, f"{request.request_id}: tokens differ"
            assert want.logprobs == got.logprobs, f"{request.request_id}: logprobs differ"
            assert want.embedding == got.embedding, f"{request.request_id}: embeddings differ"
            compared += 1
    return compared


@pytest.mark.parametrize("prefix_caching", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_streams_of_all_architectures_in_one_pool_equal_plain_vllm(cases, reference, prefix_caching):
    """Eight models under concurrent load, a turn per token, give what each gives alone."""
    from tests.helpers.pooled import PooledModels

    pooled = PooledModels(ROOMY, PAGE)
    try:
        for case in cases.values():
            pooled.add(case, enable_prefix_caching=prefix_caching)
        for case in cases.values():
            pooled.submit(case)
        pooled.run(each_step=lambda step: step % 50 or pooled.check())
        pooled.check()
        assert pooled.host.switches > 300
        expected = reference if prefix_caching else _plain(cases, prefix_caching)
        assert len(KINDS) * 5 == _assert_equal(pooled, cases, expected)
    finally:
        pooled.close()
    assert pooled.host.ledger.num_free + pooled.host.ledger.total("null") == pooled.host.ledger.num_pages


@contextmanager
def _run_tight(chosen: dict[str, Case], *groups: tuple[str, ...], device: CpuDevice) -> Iterator[PooledModels]:
    """Run groups of models one after the other in memory so tight that slabs move, filled with NaN in between."""
    from tests.helpers.pooled import PooledModels

    pooled = PooledModels(ROOMY, PAGE, device=device, poison=True)
    try:
        for case in chosen.values():
            pooled.add(case, enable_prefix_caching=True)
        ledger = pooled.host.ledger
        ballast = ledger.take("ballast", "weights", ledger.num_free - TIGHT_PAGES)
        for group in groups:
            for kind in group:
                pooled.submit(chosen[kind])
            pooled.run(each_step=lambda step: step % 20 or pooled.check())
        assert pooled.host.allocator.num_reclaims >= 4, "memory was not tight"
        yield pooled
        ledger.give("ballast", "weights", ballast)
    finally:
        pooled.close()


def test_reclaimed_and_poisoned_slabs_change_no_stream(cases, reference):
    """In memory so tight that slabs move, filled with NaN between two owners, the streams stay the same."""
    groups = ("llama", "qwen2"), ("gemma3", "qwen3_moe"), ("deepseek_v2",)
    chosen = {kind: cases[kind] for group in groups for kind in group}
    with _run_tight(chosen, *groups, device=CpuDevice(keeps_bytes=True)) as pooled:
        assert _assert_equal(pooled, chosen, reference) >= 10


class ForgetfulDevice(CpuDevice):
    """A device that breaks its contract: what it maps holds the old bytes."""

    def __init__(self) -> None:
        super().__init__(keeps_bytes=True)

    def fill(self, address: int, nbytes: int, byte: int) -> None:
        if byte != 0:
            super().fill(address, nbytes, byte)


def test_a_device_that_does_not_zero_what_it_maps_is_found_out(cases, reference):
    """The test above can fail: without the zeroing at a grant, bytes of the last owner reach the streams."""
    groups = ("llama", "qwen2"), ("gemma3", "qwen3_moe")
    chosen = {kind: cases[kind] for group in groups for kind in group}
    with _run_tight(chosen, *groups, device=ForgetfulDevice()) as pooled:
        logprobs = [x for kind in chosen for result in pooled.results(kind).values() for x in result.logprobs]
        assert any(math.isnan(x) for x in logprobs)
        with pytest.raises(AssertionError, match="(tokens|logprobs) differ"):
            _assert_equal(pooled, chosen, reference)
