# SPDX-License-Identifier: Apache-2.0
"""On the CPU vLLM packs linear weights into closures and C++ handles; movable weights must stay in their parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tokenpool.patches.base import Patch, known

_plain: ContextVar[bool] = ContextVar("tokenpool_plain_gemm", default=False)


@contextmanager
def use_plain_gemm() -> Iterator[None]:
    """Let linear layers that are loaded in the block on this thread compute with `torch.nn.functional.linear`.

    Needs the patches applied. Rounding differs from the packed kernels: compare such a model only with one that was
    loaded the same way.
    """
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def _replacement(original: Any) -> Any:
    def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> None:
        # Convolutions are not linear layers: the original decides about them.
        if not _plain.get() or layer.weight.is_meta or layer.weight.ndim != 2:
            original(layer, remove_weight)
            return
        from torch.nn.functional import linear

        layer.cpu_linear = linear

    return dispatch_cpu_unquantized_gemm


_TARGET = "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm"

PATCH = Patch(
    name="cpu_gemm",
    target=_TARGET,
    hashes=known(
        v0_32_0="2ba18ce6108799daff304b5976257462ab1b2273f185bafa5285ea876590d152",
        v0_29_0="a98204a3d07fcbd6e12c8bf6de2dbece4364f75efd6c7ebab75f73e331d56024",
    ),
    reason="packed copies own their memory: weights could neither leave the device nor come back",
    removal="vLLM packs CPU weights into parameters, or offers the plain kernel as a setting",
    sites=(_TARGET,),  # both callers import it inside a function, at every call
    replacement=_replacement,
)
