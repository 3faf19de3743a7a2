# SPDX-License-Identifier: Apache-2.0
"""Choices that vLLM makes once per process, by the engine that was built last: each as a value that can be switched."""

from __future__ import annotations

import importlib
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from vllm import envs

from tokenpool.settings import BREAKABLE_GRAPHS


@dataclass(frozen=True, slots=True)
class ModuleAttribute:
    """A name of a module; None while no engine is in force."""

    module: types.ModuleType
    name: str

    def get(self) -> Any:
        """What is in force."""
        return getattr(self.module, self.name)

    def set(self, value: Any) -> None:
        """Put it in force."""
        setattr(self.module, self.name, value)


class KernelChoices:
    """Which kernels vLLM's IR operators take first, and whether torch sees them; a compiled model chooses otherwise."""

    def __init__(self) -> None:
        self._ir: Any = None
        with suppress(ImportError):  # vLLM 0.29 on some platforms
            self._ir = importlib.import_module("vllm.ir.op")
        self._has_any = hasattr(self._ir, "IrOp") and hasattr(self._ir, "_ENABLE_TORCH_WRAP")

    def get(self) -> Any:
        """What is in force; None where vLLM has no such operators."""
        if not self._has_any:
            return None
        return self._ir._ENABLE_TORCH_WRAP, [(op, op._priority_impls) for op in self._ir.IrOp.registry.values()]

    def set(self, value: Any) -> None:
        """Put it in force; None leaves what is: an engine that is built sets its own."""
        if value is not None:
            self._ir._ENABLE_TORCH_WRAP, choices = value
            for operator, kernels in choices:
                operator._priority_impls = kernels


class BreakableGraphs:
    """The variable by which some architectures ask for CUDA graphs in pieces; vLLM sets it for all that come later."""

    def __init__(self) -> None:
        self._by_user = BREAKABLE_GRAPHS.get()

    def get(self) -> str | None:
        """What is in force; None = what the user wants of all models, or nothing."""
        value = BREAKABLE_GRAPHS.get()
        return None if value == self._by_user else value

    def set(self, value: str | None) -> None:
        """Put it in force; vLLM, which remembers variables, reads them anew if it has changed."""
        wanted = self._by_user if value is None else value
        if wanted == BREAKABLE_GRAPHS.get():
            return
        with variables_read_anew():
            BREAKABLE_GRAPHS.restore(wanted)


@contextmanager
def variables_read_anew() -> Iterator[None]:
    """Let vLLM look into the environment in the block, and remember from then on what it finds at its end.

    It remembers all variables once the first engine of a process is there.
    """
    remembers = envs._is_envs_cache_enabled()
    envs.disable_envs_cache()
    try:
        yield
    finally:
        if remembers:
            envs.disable_envs_cache()
            envs.enable_envs_cache()
