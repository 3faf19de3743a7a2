# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes of one architecture share what is compiled: their paths are left out of the hash that names it."""

from __future__ import annotations

import copy
from typing import Any

from tokenpool.patches.base import Patch, known


def _replacement(original: Any) -> Any:
    def compute_hash(config: Any, *args: Any, **kwargs: Any) -> str:
        if is_told_by_config(config):
            config = copy.copy(config)
            config.model_config = copy.copy(config.model_config)
            config.model_config.model = config.model_config.model_weights = ""
        return original(config, *args, **kwargs)

    return compute_hash


def is_told_by_config(config: Any) -> bool:
    """Whether checkpoints with configurations like this one have one graph, whatever lies at their paths.

    Not so if code comes with the checkpoint, nor if numbers of its weights may be constants of the graph: loaders of
    quantised weights make attributes of some, and a compiler that freezes takes all weights.
    """
    model = config.model_config
    if model is None or model.trust_remote_code or model.quantization is not None:
        return False
    from torch._inductor import config as inductor

    asked = config.compilation_config.inductor_compile_config
    return not (inductor.freezing or asked.get("freezing") or asked.get("max_autotune"))  # the last freezes on the CPU


_TARGET = "vllm.config.vllm:VllmConfig.compute_hash"

PATCH = Patch(
    name="compile_hash",
    target=_TARGET,
    hashes=known(
        v0_32_0="7b1c5221da299fe5e5a4b26e6ef70c296054dff413c82eebc87b7deb4a9b23a9",
        v0_29_0="5d5531f2157139f0ea4e097150a2a90fa61554175330c6c9bd9a0f4de5e9a407",
    ),
    reason="the graphs of ten fine-tunes of one architecture are the same, and would be compiled ten times",
    removal="vLLM leaves the path of a checkpoint out of the hash by which it names compiled code",
    sites=(_TARGET,),
    replacement=_replacement,
)
