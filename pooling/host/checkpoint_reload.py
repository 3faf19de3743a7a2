# SPDX-License-Identifier: Apache-2.0
"""Reads a vLLM model's checkpoint again into the tensors of the model that exists, wherever they lie.

Whether that gives the same bytes is not taken for granted: the weight store tries it before it gives a host copy up.
So a model whose loading does more than what is done here is refused by the trial, not spoiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from vllm.config import VllmConfig, replace
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader import get_model_loader

from tokenpool.memory.weight_reload import Advance, Reload
from tokenpool.patches.cpu_gemm import pack_weight, packed_linear


def checkpoint_reload(model: torch.nn.Module, vllm_config: VllmConfig) -> Reload | None:
    """What reads `model`'s checkpoint again, or None when vLLM's loader of it cannot be asked for its tensors.

    It may run on a side thread while other engines step: it sets no default dtype or device and no current config.
    """
    # Made here, on the loop's thread, because it looks at process-wide state; iterating it does not.
    loader = get_model_loader(replace(vllm_config.load_config, use_tqdm_on_load=False))
    if not hasattr(loader, "get_all_weights") or vllm_config.model_config.quantization is not None:
        return None

    def reload(advance: Advance) -> None:
        with torch.no_grad():
            model.load_weights(_counted(loader.get_all_weights(vllm_config.model_config, model), advance))
            for layer in model.modules():
                advance(0)
                if isinstance(getattr(layer, "quant_method", None), UnquantizedFusedMoEMethod):
                    _pack_experts(layer)
                elif layer.__dict__.get("cpu_linear") is packed_linear:
                    pack_weight(layer)

    return reload


def _counted(weights: Iterator[tuple[str, torch.Tensor]], advance: Advance) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        yield name, tensor
        advance(tensor.nbytes)


def _pack_experts(layer: Any) -> None:
    """Bring freshly read expert weights into the layout of the kernel, as vLLM does after the first load.

    vLLM packs only when the layer has no kernel yet, and then registers new parameters. Both are put back: the
    kernel that exists goes on, and the packed bytes are copied to where its parameters are.
    """
    method, before = layer.quant_method, dict(layer._parameters)
    kernel, quant_config = method.moe_kernel, method.moe_quant_config
    method.moe_kernel = None
    try:
        method.process_weights_after_loading(layer)
        packed = dict(layer._parameters)
    finally:
        method.moe_kernel, method.moe_quant_config = kernel, quant_config
        layer._parameters.update(before)
    for name, parameter in before.items():
        if parameter is not None and packed[name] is not parameter:
            parameter.data.copy_(packed[name].data)
