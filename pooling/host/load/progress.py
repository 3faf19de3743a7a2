# SPDX-License-Identifier: Apache-2.0
"""How far the model has come that is being built; read by other threads while the host's own thread builds it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class BuildStep(NamedTuple):
    """What is being done to which model, and since when by the monotonic clock."""

    model: str
    phase: str
    """`building engine`, `loading weights` or `warming up`."""
    model_since_s: float
    phase_since_s: float


class BuildProgress:
    """The step of the present build. Written by the loop's thread, as one assignment; read by any."""

    def __init__(self) -> None:
        self._step: BuildStep | None = None

    @contextmanager
    def building(self, model: str) -> Iterator[None]:
        """`model` is being built until the end of the block."""
        now_s = time.monotonic()
        self._step = BuildStep(model, "building engine", now_s, now_s)
        try:
            yield
        finally:
            self._step = None

    def enter(self, phase: str) -> None:
        """The build goes on with `phase`."""
        if self._step is not None:
            self._step = self._step._replace(phase=phase, phase_since_s=time.monotonic())

    def snapshot(self) -> dict[str, str | float] | None:
        """The step as plain values, with seconds so far; None while nothing is built."""
        step, now_s = self._step, time.monotonic()
        if step is None:
            return None
        return {
            "model": step.model,
            "phase": step.phase,
            "elapsed_s": now_s - step.model_since_s,
            "phase_s": now_s - step.phase_since_s,
        }
