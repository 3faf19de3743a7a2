# SPDX-License-Identifier: Apache-2.0
"""Registers vLLM's CPU kernels once per process and not once per engine, and not in the modules of numba."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

from tokenpool.patches.base import Patch, known

_WITHOUT_KERNELS = ("llvmlite", "numba")
"""Packages that are not searched for kernels: an object of the first one has something else as its __dict__."""


class _SearchedModules:
    """`sys.modules` as the search sees it."""

    def __getitem__(self, name: str) -> ModuleType:
        return sys.modules[name]

    def values(self) -> list[ModuleType]:
        """All modules but those that are left out."""
        named = list(sys.modules.items())
        return [module for name, module in named if name.partition(".")[0] not in _WITHOUT_KERNELS]


def _replacement(original: Any) -> Any:
    def register_once(overrides: Mapping[str, Callable[..., Any]]) -> None:
        from vllm.triton_utils import dispatcher

        new = {name: kernel for name, kernel in overrides.items() if name not in dispatcher._registry}
        if not new:
            return
        was, dispatcher.sys = dispatcher.sys, SimpleNamespace(modules=_SearchedModules())
        try:
            original(new)
        except BaseException:
            for name in new:  # entered before it is done: the next engine has to do it
                dispatcher._registry.pop(name, None)
            raise
        finally:
            dispatcher.sys = was

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
