# SPDX-License-Identifier: Apache-2.0
"""Gives the memory of an engine, or of a client of one, that is gone back to the process."""

from __future__ import annotations

import gc
import inspect
import traceback

from prometheus_client import values


def release_engine(error: BaseException | None = None) -> None:
    """Collect the cycles of an engine that nothing refers to but, with `error`, the frames of a failed build.

    vLLM freezes the heap after each build, which hides the engine from the collector. Costs a full collection.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def release_metrics() -> None:
    """Let go of the values of metrics that nobody else refers to.

    In its multiprocess mode prometheus_client keeps all values that it ever made, to begin them anew after a fork; none
    of ours forks once it has some. The values of a model, about 330, take 0.3 MB.
    """
    kept = inspect.getclosurevars(values.ValueClass.__init__).nonlocals.get("values")
    if kept is not None:  # there are none in its other mode
        kept.clear()
