# SPDX-License-Identifier: Apache-2.0
"""Process-wide state of vLLM that engines would fight over: each engine gets its own value while it runs."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_SWITCHED = (
    ("vllm.v1.worker.workspace", "_manager"),
    ("vllm.distributed.kv_transfer.kv_transfer_state", "_KV_CONNECTOR_AGENT"),
    ("vllm.distributed.ec_transfer.ec_transfer_state", "_EC_CONNECTOR_AGENT"),
)


class EngineGlobals:
    """Saves and restores the module attributes in which vLLM keeps one engine's state per process.

    Called on the host loop's thread only; a switch costs three attribute writes.
    """

    def __init__(self) -> None:
        self._slots = [(importlib.import_module(module), name) for module, name in _SWITCHED]
        self._saved: dict[str, list[Any]] = {}
        self._current: str | None = None

    def enter(self, model: str) -> None:
        """Make `model`'s values the ones in force."""
        if model == self._current:
            return
        self._save()
        for (module, name), value in zip(self._slots, self._saved[model], strict=True):
            setattr(module, name, value)
        self._current = model

    def forget(self, model: str) -> None:
        """Drop the values of an engine that is gone."""
        if self._current == model:
            self._clear()
        self._saved.pop(model, None)

    @contextmanager
    def building(self, model: str) -> Iterator[None]:
        """Give a new engine empty globals and its own RoPE modules; keep the others' random state.

        vLLM shares RoPE modules between models of one process (`_ROPE_DICT`) and re-seeds the global
        generator when an engine starts, which would change unseeded sampling of the models that run.
        """
        rope = importlib.import_module("vllm.model_executor.layers.rotary_embedding")._ROPE_DICT
        shared, random_state = dict(rope), torch.get_rng_state()
        cuda_random_state = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        self._save()
        self._clear()
        rope.clear()
        try:
            yield
            self._current = model
        except BaseException:
            self._clear()
            raise
        finally:
            rope.clear()
            rope.update(shared)
            torch.set_rng_state(random_state)
            if cuda_random_state is not None:
                torch.cuda.set_rng_state(cuda_random_state)

    def _save(self) -> None:
        if self._current is not None:
            self._saved[self._current] = [getattr(module, name) for module, name in self._slots]

    def _clear(self) -> None:
        for module, name in self._slots:
            setattr(module, name, None)
        self._current = None
