# SPDX-License-Identifier: Apache-2.0
"""Gives the memory of an engine that is gone back to the process."""

from __future__ import annotations

import gc
import traceback


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
