# SPDX-License-Identifier: Apache-2.0
"""Reads a vLLM model's checkpoint again, and its draft model's, into the tensors that exist, wherever they lie.

Whether that gives the same bytes is not taken for granted: the weight store tries it before it gives a host copy up.
So a model whose loading does more than what is done here is refused by the trial, not spoiled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from vllm.config import ModelConfig, VllmConfig, replace
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader import get_model_loader

from tokenpool.host.load.straight_read import CopiesOfFiles, StraightRead
from tokenpool.memory.weight_reload import Advance, OnFinal, Reload
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
    sources = [(model, config, loader) for model, (config, _), loader in zip(models, configs, loaders, strict=True)]
    return CheckpointReload(sources)


class CheckpointReload:
    """See `Reload`. What the first time has shown of where the bytes go spares later times vLLM's loader."""

    def __init__(self, sources: Sequence[tuple[torch.nn.Module, ModelConfig, Any]]) -> None:
        """`sources` are models, each with its config and the loader that reads its tensors."""
        self._sources = sources
        self._models = [model for model, _, _ in sources]
        self._plan: StraightRead | None = None
        self._is_first = True

    def __call__(self, advance: Advance, on_final: OnFinal) -> None:
        """Read all of it."""
        with torch.no_grad():
            if self._plan is not None and self._plan.is_on_host():
                packed = self._read_straight(self._plan, advance, on_final)
            else:
                self._load(advance)
                packed = set()
            self._pack(packed, advance)

    def _read_straight(self, plan: StraightRead, advance: Advance, on_final: OnFinal) -> set[Any]:
        """Read it to its place; a side thread packs what is there meanwhile. Returns the layers that are packed."""
        layers = {id(layer.weight): layer for layer in self._layers() if _is_packed(layer)}
        of_experts = {id(tensor) for layer in self._layers() if _has_experts(layer) for tensor in layer.parameters()}
        packed = set()

        def finish(tensor: torch.Tensor) -> None:
            if (layer := layers.get(id(tensor))) is not None:
                pack_weight(layer)
                packed.add(layer)
            if id(tensor) not in of_experts:
                on_final(tensor)

        finished: list[Future[None]] = []
        with ThreadPoolExecutor(1) as side:
            plan.read(advance, lambda tensor: finished.append(side.submit(finish, tensor)))
        for each in finished:
            each.result()
        return packed

    def _load(self, advance: Advance) -> None:
        tensors = [t for model in self._models for of_model in (model.parameters(), model.buffers()) for t in of_model]
        copies = CopiesOfFiles(tensors) if self._is_first else None
        with _parameters_that_stay(self._models), copies or nullcontext():
            for model, config, loader in self._sources:
                model.load_weights(_counted(loader.get_all_weights(config, model), advance))
        if copies is not None:
            self._is_first, self._plan = False, copies.plan()

    def _pack(self, packed: set[Any], advance: Advance) -> None:
        """Pack what is not packed yet, once all is read."""
        for layer in self._layers():
            advance(0)
            if _has_experts(layer):
                _pack_experts(layer)
            elif _is_packed(layer) and layer not in packed:
                pack_weight(layer)

    def _layers(self) -> Iterable[Any]:
        """Each once: a draft model may share some of its target."""
        return dict.fromkeys(layer for model in self._models for layer in model.modules())


def _has_experts(layer: torch.nn.Module) -> bool:
    return isinstance(getattr(layer, "quant_method", None), UnquantizedFusedMoEMethod)


def _is_packed(layer: torch.nn.Module) -> bool:
    return layer.__dict__.get("cpu_linear") is packed_linear


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
