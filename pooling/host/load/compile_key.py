# SPDX-License-Identifier: Apache-2.0
"""Lets checkpoints of one architecture share what torch.compile makes of it: fine-tunes are compiled once.

vLLM names its compile cache by all that shapes the graph, the path of the checkpoint among it. The code that it keeps
takes weights as arguments, so the path says nothing that the other settings do not say.

Not where constants may come out of a checkpoint into the code: quantised weights, whose scales some layers keep as
numbers, code that a checkpoint brings, and draft models.
"""

from __future__ import annotations

import copy
from typing import Any

from vllm.config import ModelConfig, VllmConfig


class NamelessModelConfig(ModelConfig):
    """A ModelConfig whose hash is that of the architecture, wherever its checkpoint lies."""

    def compute_hash(self) -> str:
        """See vLLM."""
        nameless = copy.copy(self)
        object.__setattr__(nameless, "model", "")
        for name in ("hf_config", "hf_text_config"):
            object.__setattr__(nameless, name, _without_path(getattr(self, name)))
        return ModelConfig.compute_hash(nameless)


def share_compiled_code(vllm_config: VllmConfig) -> bool:
    """Do so for an engine that is about to be built; False, and nothing changed, where that might be wrong."""
    config = vllm_config.model_config
    if (
        type(config) is not ModelConfig
        or config.quantization is not None
        or config.trust_remote_code
        or vllm_config.speculative_config is not None
        or vllm_config.cache_config.cache_dtype != "auto"
    ):
        return False
    config.__class__ = NamelessModelConfig
    return True


def _without_path(config: Any) -> Any:
    nameless = copy.copy(config)
    nameless._name_or_path = ""
    return nameless
