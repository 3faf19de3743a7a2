# SPDX-License-Identifier: Apache-2.0
"""Linear layers of a movable model keep their weights in their parameters, at their addresses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.helpers.devices.rounding import round_alike
from tokenpool.patches import PATCHES, vllm_version
from tokenpool.patches.cpu_gemm import pack_weight, packed_linear, use_plain_gemm

pytestmark = pytest.mark.vllm

needs_kernel = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="this CPU has no kernel for packed bfloat16 weights"
)


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    was_applied = bool(PATCHES._originals)
    PATCHES.apply(vllm_version())
    yield
    if not was_applied:
        PATCHES.undo()


def layer_of(rows: int, columns: int, dtype: torch.dtype, *, bias: bool = False) -> Any:
    generator = torch.Generator().manual_seed(rows * columns)
    layer = torch.nn.Module()
    weight = torch.randn(rows, columns, generator=generator) * 0.1
    layer.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias:
        layer.bias = torch.nn.Parameter(torch.randn(rows, generator=generator).to(dtype), requires_grad=False)
    return layer


def dispatch(layer: Any, *, remove_weight: bool = True) -> None:
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    dispatch_cpu_unquantized_gemm(layer, remove_weight=remove_weight)


@needs_kernel
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 7, 40])
def test_a_packed_weight_lies_where_the_weight_was_and_computes_the_same(num_tokens, bias):
    """The parameter is the same object at the same address, with other bytes; results agree but for rounding."""
    layer = layer_of(96, 64, torch.bfloat16, bias=bias)
    parameter, place, original = layer.weight, layer.weight.data_ptr(), layer.weight.clone()
    x = torch.randn(2, num_tokens, 64).to(torch.bfloat16)
    expected = torch.nn.functional.linear(x, original, layer.bias if bias else None)
    with use_plain_gemm():
        dispatch(layer)
    assert layer.cpu_linear is packed_linear
    assert (parameter, place) == (layer.weight, layer.weight.data_ptr())
    assert not torch.equal(original, layer.weight)
    actual = layer.cpu_linear(x, layer.weight, layer.bias if bias else None)
    torch.testing.assert_close(actual, expected, atol=0.03, rtol=0.02)
    layer.weight.data.copy_(original)
    pack_weight(layer)
    again = layer.cpu_linear(x, layer.weight, layer.bias if bias else None)
    assert torch.equal(actual, again), "a weight that is read again is packed to the same bytes"


@needs_kernel
@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (48, 4096), (160, 8192), (1024, 2048), (80, 1 << 15)])
def test_a_weight_is_packed_in_parts_as_it_is_as_a_whole(rows, columns):
    """Also where the last part has half a block, and where a part is one block."""
    layer = layer_of(rows, columns, torch.bfloat16)
    whole = torch.ops._C.convert_weight_packed(layer.weight.data)
    pack_weight(layer)
    assert torch.equal(whole, layer.weight.data)


@pytest.mark.parametrize(
    ("rows", "columns", "dtype"),
    [(4, 64, torch.bfloat16), (40, 64, torch.bfloat16), (32, 48, torch.bfloat16), (32, 64, torch.float16)],
)
def test_what_the_packed_kernel_cannot_do_goes_through_torch(rows, columns, dtype):
    """Rows or columns that fill no tile, and other dtypes: the weight stays as it is."""
    layer = layer_of(rows, columns, dtype)
    original = layer.weight.clone()
    with use_plain_gemm():
        dispatch(layer)
    assert layer.cpu_linear is torch.nn.functional.linear
    assert torch.equal(original, layer.weight)


def test_an_embedding_keeps_its_rows():
    """Its weight is looked up as well, so it is never packed."""
    layer = layer_of(64, 64, torch.bfloat16)
    original = layer.weight.clone()
    with use_plain_gemm():
        dispatch(layer, remove_weight=False)
    assert layer.cpu_linear is torch.nn.functional.linear
    assert torch.equal(original, layer.weight)


def test_other_layers_get_vllms_own_kernel():
    """Outside the block nothing changes: the weight goes into vLLM's handle where the CPU has one."""
    layer, theirs = (layer_of(64, 64, torch.bfloat16) for _ in range(2))
    dispatch(layer)
    PATCHES.undo()
    dispatch(theirs)
    PATCHES.apply(vllm_version())
    assert layer.cpu_linear is not packed_linear
    assert layer.cpu_linear.__code__ is theirs.cpu_linear.__code__
    assert layer.weight.numel() == theirs.weight.numel()


@needs_kernel
@pytest.mark.parametrize("packed", [True, False])
def test_a_layer_can_be_made_to_round_alike_in_steps_of_any_size(packed):
    """As tests need it in which the requests of a step are others than in the reference."""
    layer = layer_of(512, 128, torch.bfloat16)
    with use_plain_gemm():
        dispatch(layer, remove_weight=packed)
    assert 1 == round_alike(layer)
    x = torch.randn(400, 128, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    together = layer.cpu_linear(x, layer.weight, None)
    for size in (1, 2, 4, 5, 7, 40):
        parts = [layer.cpu_linear(part, layer.weight, None) for part in x.split(size)]
        assert torch.equal(together, torch.cat(parts)), f"{size} rows differ"
