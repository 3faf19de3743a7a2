# SPDX-License-Identifier: Apache-2.0
"""On the CPU vLLM packs linear weights into closures and C++ handles; movable weights must stay in their parameters.

Where the CPU has a kernel for it, the packed bytes take the place of the weight's own: it has the same size, and the
kernel gets the parameter at each call. Elsewhere the weight stays as it is and torch's kernel computes with it.
Measured on one core of an AVX512-BF16 machine, 1 to 8 rows and 1024 to 4096 columns: torch's kernel takes 1.7 to 2.8
times as long as vLLM's handle, the packed parameter as long or less.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from tokenpool.patches.base import Patch, known
from tokenpool.patches.build_context import current_build

_BLOCK_ROWS = 32
_PACKED_BYTES = 1 << 19

_plain: ContextVar[bool] = ContextVar("tokenpool_plain_gemm", default=False)


@contextmanager
def use_plain_gemm() -> Iterator[None]:
    """Let linear layers that are loaded in the block, on this thread, keep their weights in plain parameters.

    Needs the patches applied. Rounding differs from vLLM's own choice of kernels: compare such a model only with one
    that was loaded the same way.
    """
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def packed_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`linear` with a weight (n, k) that `pack_weight` has packed, and a bias in float32."""
    from vllm._custom_ops import weight_packed_linear_cpu

    return weight_packed_linear_cpu(x, weight, weight.shape[0], bias)


def pack_weight(layer: Any) -> None:
    """Put the packed bytes in the place of the layer's weight.

    The kernel's layout is one of blocks of 32 rows, so a few rows are packed at a time: their copy stays in the cache
    of the CPU, and the system need not find memory for a second weight.
    """
    weight = layer.weight.data
    num_rows = max(1, _PACKED_BYTES // (_BLOCK_ROWS * weight.shape[1] * weight.element_size())) * _BLOCK_ROWS
    for rows in weight.split(num_rows):
        rows.copy_(torch.ops._C.convert_weight_packed(rows))


def _can_pack(weight: torch.Tensor) -> bool:
    # The kernel ends the process with float16 where the CPU lacks AMX-FP16, and needs whole tiles.
    rows, columns = weight.shape
    return (
        weight.dtype is torch.bfloat16
        and rows % 16 == 0
        and columns % 32 == 0
        and torch.cpu._is_avx512_bf16_supported()
        and hasattr(torch.ops._C, "convert_weight_packed")
    )


def _replacement(original: Any) -> Any:
    def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> None:
        if (build := current_build()) is not None:
            build.pause()
        # Convolutions are not linear layers: the original decides about them.
        if not _plain.get() or layer.weight.is_meta or layer.weight.ndim != 2:
            original(layer, remove_weight)
        elif remove_weight and _can_pack(layer.weight):  # else it is an embedding too, whose rows are looked up
            pack_weight(layer)
            if getattr(layer, "bias", None) is not None:
                layer.bias.data = layer.bias.data.to(torch.float32)
            layer.cpu_linear = packed_linear
        else:
            layer.cpu_linear = torch.nn.functional.linear

    return dispatch_cpu_unquantized_gemm


_TARGET = "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm"

PATCH = Patch(
    name="cpu_gemm",
    target=_TARGET,
    hashes=known(
        v0_32_0="2ba18ce6108799daff304b5976257462ab1b2273f185bafa5285ea876590d152",
        v0_29_0="a98204a3d07fcbd6e12c8bf6de2dbece4364f75efd6c7ebab75f73e331d56024",
    ),
    reason="its packed copies own their memory: weights could neither leave the device nor come back",
    removal="vLLM packs CPU weights into parameters, or offers the plain kernel as a setting",
    sites=(_TARGET,),  # both callers import it inside a function, at every call
    replacement=_replacement,
)
