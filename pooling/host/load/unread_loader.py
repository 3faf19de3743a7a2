# SPDX-License-Identifier: Apache-2.0
"""A loader of vLLM that makes a model and reads no weights: they come from a copy that the node has already."""

from __future__ import annotations

import torch
from vllm.config import ModelConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

UNREAD = "tokenpool_unread"
"""Its load format."""


@register_model_loader(UNREAD)
class UnreadLoader(BaseModelLoader):
    """Leaves parameters as they were made, with whatever bytes."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing: another host of this node has read the files."""

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        """Nothing; what vLLM makes of weights after loading is replaced with them."""
