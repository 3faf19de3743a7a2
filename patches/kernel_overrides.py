# SPDX-License-Identifier: Apache-2.0
"""Registers vLLM's CPU kernels once per process and not once per engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tokenpool.patches.base import Patch, known


def _replacement(original: Any) -> Any:
    def register_once(overrides: Mapping[str, Callable[..., Any]]) -> None:
        from vllm.triton_utils.dispatcher import _registry

        new = {name: kernel for name, kernel in overrides.items() if name not in _registry}
        if new:
            original(new)

    return register_once


PATCH = Patch(
    name="kernel_overrides",
    target="vllm.triton_utils.dispatcher:register_kernels",
    hashes=known(v0_32_0="eb4e76fa1ffa94f7e2b35c79906b4e09e0a1136765f4020dc306a95b1b195fb8"),
    absent_in=("0.29.0",),
    reason=(
        "each engine would look through all modules of the process again, in which time no other steps, and fail at "
        "those of numba, which speculative decoding by n-grams imports"
    ),
    removal="vLLM registers kernels that are there already only once",
    sites=("vllm.triton_utils.dispatcher:register_kernels",),
    replacement=_replacement,
)
