# SPDX-License-Identifier: Apache-2.0
"""Inspect an unseen model architecture in this process instead of in a subprocess that imports vLLM anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenpool.patches.base import Patch, known


def _replacement(original: Any) -> Any:
    def run_in_process(inspect_model: Callable[[], Any]) -> Any:
        from vllm.platforms import current_platform

        # On CUDA an import of a model may initialise the device, which only the engine host may do.
        return inspect_model() if current_platform.is_cpu() else original(inspect_model)

    return run_in_process


PATCH = Patch(
    name="model_inspection",
    target="vllm.model_executor.models.registry:_run_in_subprocess",
    hashes=known(
        v0_32_0="9aeff7e83e939d8dde3f731f34d79bf5e89c5c61b614e60dbb1ba1c7c5ebabc7",
        v0_29_0="9aeff7e83e939d8dde3f731f34d79bf5e89c5c61b614e60dbb1ba1c7c5ebabc7",
    ),
    reason="an architecture seen for the first time costs about 10 s in a subprocess, about 1 s in process",
    removal="vLLM ships its model-info cache",
    sites=("vllm.model_executor.models.registry:_run_in_subprocess",),
    replacement=_replacement,
)
