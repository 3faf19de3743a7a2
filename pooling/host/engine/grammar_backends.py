# SPDX-License-Identifier: Apache-2.0
"""Compiles each request's grammar with the backend that accepted it.

With vLLM's `auto`, the frontend accepts what one of several backends takes, but an engine keeps that of its first
request for all: the others' grammars fail there, or become the first one's. So one request would decide for all.

What grammars cost is bounded: those that are being compiled leave the cores to steps, those in use are metered, and
make their masks beside the steps unless drafts are to be checked.
"""

from __future__ import annotations

import copy
from typing import Any

from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from tokenpool.host.engine.grammar_cost import AheadGrammar, MeteredGrammar
from tokenpool.host.engine.grammar_hold import CAN_HOLD
from tokenpool.process.affinity import yield_to_others

_COMPILES = 15  # xgrammar compiles with eight threads of its own, which together would have half of a core at 10


class _OneBackend(StructuredOutputManager):
    """Compiles on a thread that yields the cores, and meters what comes of it."""

    def _create_grammar(self, request: Request) -> StructuredOutputGrammar:
        yield_to_others(niceness=_COMPILES)
        try:
            grammar = super()._create_grammar(request)
        except Exception:
            raise
        except BaseException as error:  # as code in Rust raises when it panics: vLLM takes Exceptions for failures
            raise RuntimeError(f"the grammar cannot be compiled: {type(error).__name__}: {error}") from error
        if self.vllm_config.num_speculative_tokens or not CAN_HOLD:
            return MeteredGrammar(grammar, request)
        assert self.backend is not None
        return AheadGrammar(grammar, request, self.backend.allocate_token_bitmask(1))


class PooledGrammars(StructuredOutputManager):
    """An engine's manager of grammars, with a backend for each name that requests bring."""

    backend: Any
    """One of the managers' backends; None before the first grammar."""
    managers: dict[str | None, StructuredOutputManager]
    """Copies of this one by the backend that they have; threads and settings are shared."""

    def grammar_init(self, request: Request) -> None:
        """Begin to compile a request's grammar, if it has one."""
        params = request.sampling_params
        if request.structured_output_request is None or params is None or params.structured_outputs is None:
            return
        name = params.structured_outputs._backend
        manager = self.managers.get(name)
        if manager is None:
            manager = copy.copy(self)
            manager.__class__ = _OneBackend
            manager.backend = None
        manager.grammar_init(request)
        self.managers[name] = manager
        if self.backend is None:  # bitmasks are alike, whoever makes them
            self.backend = manager.backend

    def clear_backend(self) -> None:
        """Release all backends."""
        self.backend = None  # one of the others'
        super().clear_backend()
        for manager in self.managers.values():
            manager.clear_backend()
        self.managers.clear()


def use_all_backends(manager: StructuredOutputManager) -> None:
    """Let a manager that has no backend yet have several."""
    manager.__class__ = PooledGrammars
    manager.managers = {}
