# SPDX-License-Identifier: Apache-2.0
"""Makes tiny checkpoints whose linear layers are quantised, in the format of compressed-tensors; downloads nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SCHEMES = ("int8", "int8_static", "int8_asymmetric", "fp8")
"""W8A8: int8 with a dynamic scale per token, with one of the checkpoint, with zero points; fp8 with dynamic scales."""


def make_w8a8(base: Path, directory: Path, scheme: str) -> Path:
    """Write the checkpoint of `base` with 8-bit weights, a scale per channel, and 8-bit activations, to `directory`."""
    from safetensors.torch import load_file, save_file

    if directory.exists():
        return directory
    shutil.copytree(base, directory)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            tensors |= _quantized(name.removesuffix(".weight"), tensor, scheme)
        else:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = _config(scheme)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _quantized(name: str, weight: torch.Tensor, scheme: str) -> dict[str, torch.Tensor]:
    import torch

    dtype, largest = (torch.float8_e4m3fn, 448.0) if scheme == "fp8" else (torch.int8, 127.0)
    wide = weight.float()
    scale = wide.abs().amax(dim=1, keepdim=True) / largest
    values = wide / scale
    if dtype is torch.int8:
        values = values.round()
    made = {f"{name}.weight": values.clamp(-largest, largest).to(dtype), f"{name}.weight_scale": scale}
    if scheme == "int8_static":
        made[f"{name}.input_scale"] = torch.tensor([0.05])
    return made


def _config(scheme: str) -> dict[str, Any]:
    kind = "float" if scheme == "fp8" else "int"
    common = {"num_bits": 8, "type": kind}
    static = scheme == "int8_static"
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if scheme == "fp8" else "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**common, "strategy": "channel", "symmetric": True, "dynamic": False},
                "input_activations": {
                    **common,
                    "strategy": "tensor" if static else "token",
                    "symmetric": scheme != "int8_asymmetric",
                    "dynamic": not static,
                },
            }
        },
    }
