# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose weights are quantised, made of one that is not, in the formats that people publish."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tokenpool.demo.tiny_quantized import SCHEMES, make_w8a8

GROUP = 32
"""Weights that share a scale, along the inputs."""
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Tensors = dict[str, torch.Tensor]


def quantise(base: Path, target: Path, scheme: str) -> None:
    """Write the checkpoint of `base` to the folder `target` with its linear layers quantised by `scheme`."""
    if scheme in SCHEMES:
        made = make_w8a8(base, target / "made", scheme)
        for file in made.iterdir():
            file.replace(target / file.name)
        made.rmdir()
        return
    convert, config = _FORMATS[scheme]
    tensors: Tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        tensors |= convert(name, tensor)
    for file in base.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (target / file.name).write_bytes(file.read_bytes())
    save_file({name: t.contiguous() for name, t in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    written = json.loads((base / "config.json").read_text()) | {"quantization_config": config}
    (target / "config.json").write_text(json.dumps(written, indent=2) + "\n")


def _linear(convert: Callable[[str, torch.Tensor], Tensors]) -> Callable[[str, torch.Tensor], Tensors]:
    """Convert the weights of linear layers, given as name of the layer and (outputs, inputs); keep all others."""

    def apply(name: str, tensor: torch.Tensor) -> Tensors:
        if not name.endswith("_proj.weight") or tensor.ndim != 2:
            return {name: tensor}
        return convert(name.removesuffix(".weight"), tensor.float())

    return apply


def _int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(outputs, inputs) of 0 to 15 with zero at 8, and (outputs, groups) of scales."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(dim=2, keepdim=True) / 7
    values = (groups / scale).round().clamp(-8, 7) + 8
    return values.flatten(1).to(torch.int32), scale.squeeze(2)


def _pack(values: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight of the last dimension in an int32, the `order`-th of them in the i-th four bits."""
    eights = values.unflatten(-1, (-1, 8)).to(torch.int64)
    packed = sum(eights[..., one] << 4 * place for place, one in enumerate(order))
    assert isinstance(packed, torch.Tensor)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def _packed(name: str, weight: torch.Tensor) -> Tensors:
    values, scale = _int4(weight)
    shape = torch.tensor(weight.shape, dtype=torch.int64)
    scales = scale.to(torch.bfloat16)
    return {f"{name}.weight_packed": _pack(values), f"{name}.weight_scale": scales, f"{name}.weight_shape": shape}


def _gptq(name: str, weight: torch.Tensor) -> Tensors:
    values, scale = _int4(weight)
    inputs, zeros = weight.shape[1], torch.full_like(scale, 7, dtype=torch.int32)  # one less than the zero
    return {
        f"{name}.qweight": _pack(values).T,
        f"{name}.qzeros": _pack(zeros.T),
        f"{name}.scales": scale.T.to(torch.bfloat16),
        f"{name}.g_idx": (torch.arange(inputs) // GROUP).to(torch.int32),
    }


def _awq(name: str, weight: torch.Tensor) -> Tensors:
    values, scale = _int4(weight)
    zeros = torch.full_like(scale, 8, dtype=torch.int32)
    return {
        f"{name}.qweight": _pack(values.T, _AWQ_ORDER),
        f"{name}.qzeros": _pack(zeros.T, _AWQ_ORDER),
        f"{name}.scales": scale.T.to(torch.bfloat16),
    }


def _fp8(name: str, weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax() / 448
    return {f"{name}.weight": (weight / scale).to(torch.float8_e4m3fn), f"{name}.weight_scale": scale.reshape(1)}


def _fp8_blocks(name: str, weight: torch.Tensor) -> Tensors:
    """A scale per 128 x 128, as DeepSeek publishes."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    scale = torch.empty(rows, columns)
    values = torch.empty_like(weight)
    for i in range(rows):
        for j in range(columns):
            part = (slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1)))
            scale[i, j] = weight[part].abs().amax() / 448
            values[part] = weight[part] / scale[i, j]
    return {f"{name}.weight": values.to(torch.float8_e4m3fn), f"{name}.weight_scale_inv": scale}


def _mxfp4(name: str, tensor: torch.Tensor) -> Tensors:
    """Experts of gpt-oss, (experts, inputs, outputs), as 4-bit floats with a power of two per 32 of their inputs."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {name: tensor}
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    wide = tensor.float().transpose(1, 2).unflatten(2, (-1, GROUP))
    exponent = torch.floor(torch.log2(wide.abs().amax(dim=3, keepdim=True).clamp(min=2**-20))) - 2
    scaled = wide / torch.exp2(exponent)
    codes = (scaled.abs().unsqueeze(-1) - values).abs().argmin(-1) + 8 * (scaled < 0)
    pairs = codes.unflatten(3, (-1, 2))
    blocks = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": (exponent.squeeze(3) + 127).to(torch.uint8)}


_WEIGHTS4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
_W4A16 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": _WEIGHTS4, "input_activations": None}},
}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]}
_MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                                             "model.embed_tokens", "lm_head"]}  # fmt: skip
_FORMATS: dict[str, tuple[Callable[[str, torch.Tensor], Tensors], dict[str, Any]]] = {
    "w4a16": (_linear(_packed), _W4A16),
    "gptq": (_linear(_gptq), _GPTQ),
    "awq": (_linear(_awq), _AWQ),
    "fp8_native": (_linear(_fp8), _FP8),
    "fp8_blocks": (_linear(_fp8_blocks), {**_FP8, "weight_block_size": [128, 128]}),
    "mxfp4": (_mxfp4, _MXFP4),
}
