# SPDX-License-Identifier: Apache-2.0
"""Crashes of a model's code in the middle of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.helpers.pooled import PooledModels


def crash_when(
    pooled: PooledModels,
    model: str,
    condition: Callable[[Any], bool],
    place: str = "after",
    error: Callable[[], BaseException] = lambda: RuntimeError("kernel failed"),
) -> None:
    """Let the model's runner raise whenever `condition(scheduler_output)` holds, as a broken kernel would.

    `place` is where in the step: "before" the runner looks at its requests, "after" the forward pass, or while
    "sampling".
    """
    runner = pooled.host.models[model].core.model_executor.driver_worker.worker.model_runner
    execute_model, sample_tokens = runner.execute_model, runner.sample_tokens
    last = []

    def execute(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        last[:] = [bool(scheduler_output.num_scheduled_tokens) and condition(scheduler_output)]
        if last[0] and place == "before":
            raise error()
        output = execute_model(scheduler_output, *args, **kwargs)
        if last[0] and place == "after":
            raise error()
        return output

    def sample(*args: Any, **kwargs: Any) -> Any:
        if last[0] and place == "sampling":
            raise RuntimeError("sampler failed")
        return sample_tokens(*args, **kwargs)

    runner.execute_model, runner.sample_tokens = execute, sample
