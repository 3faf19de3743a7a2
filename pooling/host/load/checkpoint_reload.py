# SPDX-License-Identifier: Apache-2.0
"""Reads a vLLM model's checkpoint again, and its draft model's, into the tensors that exist, wherever they lie.

Whether that gives the same bytes is not taken for granted: the weight store tries it before it gives a host copy up.
So a model whose loading does more than what is done here is refused by the trial, not spoiled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import VllmConfig, replace
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader import get_model_loader

from tokenpool.memory.weight_reload import Advance, Reload
from tokenpool.patches.cpu_gemm import pack_weight, packed_linear


def checkpoint_reload(models: Sequence[torch.nn.Module], vllm_config: VllmConfig) -> Reload | None:
    """What reads the checkpoint of a model, and that of its draft model beside it, again.

    None when vLLM's loader cannot be asked for the tensors. It may run on a side thread while other engines step: it
    sets no default dtype or device and no current config.
    """
    configs = [(vllm_config.model_config, vllm_config.load_config)]
    if len(models) > 1:
        speculative = vllm_config.speculative_config
        configs.append((speculative.draft_model_config, speculative.draft_load_config or vllm_config.load_config))
    # Made here, on the loop's thread, because it looks at process-wide state; iterating it does not.
    loaders = [get_model_loader(replace(load, use_tqdm_on_load=False)) for _, load in configs]
    if not all(hasattr(loader, "get_all_weights") for loader in loaders):
        return None
    if any(config.quantization is not None for config, _ in configs):
        return None

    def reload(advance: Advance) -> None:
        with torch.no_grad(), _parameters_that_stay(models):
            for model, (config, _), loader in zip(models, configs, loaders, strict=True):
                model.load_weights(_counted(loader.get_all_weights(config, model), advance))
            # Once all is read, and once each: a draft model may share layers of its target.
            for layer in dict.fromkeys(layer for model in models for layer in model.modules()):
                advance(0)
                if isinstance(getattr(layer, "quant_method", None), UnquantizedFusedMoEMethod):
                    _pack_experts(layer)
                elif layer.__dict__.get("cpu_linear") is packed_linear:
                    pack_weight(layer)

    return reload


@contextmanager
def _parameters_that_stay(models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Put back what loading has put in the place of a parameter, as Medusa does, and fail: that one has not moved."""
    before = {layer: dict(layer._parameters) for model in models for layer in model.modules()}
    try:
        yield
    finally:
        changed = [
            layer for layer, was in before.items()
            if any(layer._parameters.get(name) is not parameter for name, parameter in was.items())
        ]  # fmt: skip
        for layer in changed:
            layer._parameters.update(before[layer])
    if changed:
        raise ValueError(f"loading makes new parameters of {type(changed[0]).__name__}")


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
