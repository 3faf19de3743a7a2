# SPDX-License-Identifier: Apache-2.0
"""Process-wide state of vLLM that engines would fight over: each engine gets its own value while it runs."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo import convert_frame

from tokenpool.host.engine.process_choices import (
    BreakableGraphs,
    KernelChoices,
    ModuleAttribute,
    variables_read_anew,
)
from tokenpool.host.engine.process_groups import outside_capture
from tokenpool.process.cpu_tiles import ask_for_tiles

_SWITCHED = (
    ("vllm.v1.worker.workspace", "_manager"),
    ("vllm.distributed.kv_transfer.kv_transfer_state", "_KV_CONNECTOR_AGENT"),
    ("vllm.distributed.ec_transfer.ec_transfer_state", "_EC_CONNECTOR_AGENT"),
)
_SET_WHILE_BUILDING = (
    ("vllm.config.vllm", "_current_vllm_config"),
    ("vllm.config.vllm", "_current_prefix"),
    ("vllm.compilation.backends", "model_tag"),
    ("vllm.compilation.backends", "model_is_encoder"),
    ("vllm.compilation.monitor", "cudagraph_capturing_enabled"),
)
"""Set by context managers that are open while a model is made and loaded."""


class EngineGlobals:
    """Saves and restores the module attributes in which vLLM keeps one engine's state per process.

    Called on the host loop's thread, or on a build's while the loop holds still; a switch costs a few attribute writes.
    """

    def __init__(self) -> None:
        ask_for_tiles()
        self._slots: list[ModuleAttribute | KernelChoices | BreakableGraphs] = [
            *(ModuleAttribute(importlib.import_module(module), name) for module, name in _SWITCHED),
            KernelChoices(),
            BreakableGraphs(),
        ]
        self._hooks: dict[str, set[int]] = {}
        """Of each model, hooks of its compiled modules in torch's list, which keeps the model alive."""
        self._saved: dict[str, list[Any]] = {}
        self._current: str | None = None

    def enter(self, model: str) -> None:
        """Make `model`'s values the ones in force."""
        if model == self._current:
            return
        self._save()
        self._set(self._saved[model])
        self._current = model

    def forget(self, model: str) -> None:
        """Drop the values of an engine that is gone, and what torch.compile keeps of its model."""
        if self._current == model:
            self._clear()
        self._saved.pop(model, None)
        for hook in self._hooks.pop(model, ()):
            convert_frame._bytecode_hooks.pop(hook, None)

    @contextmanager
    def building(self, model: str) -> Iterator[None]:
        """Give a new engine empty globals and its own RoPE modules; keep the others' random state.

        vLLM shares RoPE modules between models of one process (`_ROPE_DICT`) and re-seeds the global
        generator when an engine starts, which would change unseeded sampling of the models that run.
        """
        self._outside = _Surroundings.now()
        hooks = set(convert_frame._bytecode_hooks)
        self._save()
        self._clear()
        _rope_dict().clear()
        try:
            with variables_read_anew():
                yield
            self._current = model
        except BaseException:
            self._clear()
            raise
        finally:
            # vLLM adds one for each compiled module and takes it back when an `LLMEngine` ends, which there is none of.
            self._hooks[model] = set(convert_frame._bytecode_hooks) - hooks
            self._outside.install()

    @contextmanager
    def build_paused(self) -> Iterator[None]:
        """Inside `building`: what is in force outside of it is in force in the block, where other engines step."""
        inside, of_engine = _Surroundings.now(), self._values()
        self._clear()
        self._outside.install()
        try:
            with outside_capture():
                yield
        finally:
            self._save()
            self._current = None
            self._outside = _Surroundings.now()
            inside.install()
            self._set(of_engine)

    def _save(self) -> None:
        if self._current is not None:
            self._saved[self._current] = self._values()

    def _clear(self) -> None:
        self._set([None] * len(self._slots))
        self._current = None

    def _values(self) -> list[Any]:
        return [slot.get() for slot in self._slots]

    def _set(self, values: list[Any]) -> None:
        for slot, value in zip(self._slots, values, strict=True):
            slot.set(value)


@dataclass(frozen=True, slots=True)
class _Surroundings:
    """Process-wide state that a build changes and must not share with engines that step."""

    rope: dict[Any, Any]
    dtype: torch.dtype
    random_state: torch.Tensor
    cuda_random_state: torch.Tensor | None
    allocator: str | None
    """How torch's allocator of the GPU splits its blocks: otherwise while a checkpoint is read."""
    values: list[Any]

    @classmethod
    def now(cls) -> _Surroundings:
        """What is in force."""
        return cls(
            dict(_rope_dict()),
            torch.get_default_dtype(),
            torch.get_rng_state(),
            torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
            _allocator_settings(),
            [getattr(importlib.import_module(module), name) for module, name in _SET_WHILE_BUILDING],
        )

    def install(self) -> None:
        """Put it in force again."""
        rope = _rope_dict()
        rope.clear()
        rope.update(self.rope)
        torch.set_default_dtype(self.dtype)
        torch.set_rng_state(self.random_state)
        if self.cuda_random_state is not None:
            torch.cuda.set_rng_state(self.cuda_random_state)
        if self.allocator is not None and self.allocator != _allocator_settings():
            torch._C._accelerator_setAllocatorSettings(self.allocator)
        for (module, name), value in zip(_SET_WHILE_BUILDING, self.values, strict=True):
            setattr(importlib.import_module(module), name, value)


def _allocator_settings() -> str | None:
    """Of torch's allocator for the GPU; None where there is none, or torch does not tell."""
    ask = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    return ask() if ask is not None and torch.cuda.is_initialized() else None


def random_state() -> tuple[torch.Tensor, torch.Tensor | None]:
    """What torch draws from by default: on the CPU, and on the GPU if there is one in use."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def set_random_state(state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    """Go on from what `random_state` gave, here or in another process."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


def _rope_dict() -> dict[Any, Any]:
    return importlib.import_module("vllm.model_executor.layers.rotary_embedding")._ROPE_DICT


def keep_thread_count() -> None:
    """Let numba, which n-grams are looked up with, run on threads of its own; to be called before it runs any.

    Its OpenMP layer sets the number of OpenMP threads of the whole process to that of the cores. torch splits sums by
    that number, so logprobs of all models would change in their last bits, from then on.
    """
    import numba

    if numba.config.THREADING_LAYER == "default":
        numba.config.THREADING_LAYER = "workqueue"
