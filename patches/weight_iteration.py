# SPDX-License-Identifier: Apache-2.0
"""Between two tensors of a checkpoint that is loaded, other models of the process may take steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tokenpool.patches.base import Patch, known
from tokenpool.patches.build_context import current_build


def _replacement(original: Any) -> Any:
    def get_all_weights(self: Any, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        build = current_build()
        for item in original(self, *args, **kwargs):
            yield item
            if build is not None:
                build.pause()

    return get_all_weights


_TARGET = "vllm.model_executor.model_loader.default_loader:DefaultModelLoader.get_all_weights"

PATCH = Patch(
    name="weight_iteration",
    target=_TARGET,
    hashes=known(
        v0_32_0="5972c05be194a8199de38853a3851a150ca908a133b5219da3779a12a9f879fc",
        v0_29_0="842915efb2f90c17bfcc577021ff6d813f6b6aac16d41050e2194b53d90aacc0",
    ),
    reason="loading a model must not stop the others of its host",
    removal="vLLM's loaders can be asked for one tensor at a time",
    sites=(_TARGET,),
    replacement=_replacement,
)
