# SPDX-License-Identifier: Apache-2.0
"""What a model's weights take on the device, as far as it can be told before they are loaded.

A checkpoint has its tensors in its own dtype, and no tables of positions, which vLLM computes: with YaRN they are as
long as the stretched context, and can be most of what a small model holds.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm import envs
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import rotary_embedding
from vllm.platforms import CpuArchEnum, current_platform
from vllm.utils.torch_utils import set_default_torch_dtype

logger = logging.getLogger(__name__)

_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of what vLLM casts to the dtype of the model, by the names in a safetensors file."""
_INT4 = {"qweight": ("scales", "qzeros"), "weight_packed": ("weight_scale", "weight_zero_point")}
"""By the name of packed 4-bit weights, those of their scales and zero points: AWQ and GPTQ, compressed-tensors."""


def device_bytes(file_bytes: int, folder: Path, config: VllmConfig) -> int:
    """Bytes of a model's weights on the device, of whose files in `folder` it has `file_bytes`; 0 if these are unknown.

    An estimate: some kinds have further buffers, or tie weights that their files have twice. Of a quantised checkpoint
    the files' own dtypes count, but for what the CPU's kernels add to 4-bit integers.
    """
    if not file_bytes:
        return 0
    model = config.model_config
    ranks = config.parallel_config.tensor_parallel_size
    if model.quantization:
        change = added_to_int4(folder) if _has_int8_activations(model.dtype) else 0
    else:
        change = -saved_by_casting(folder, model.dtype.itemsize)
    return file_bytes + change // ranks + table_bytes(config)


def saved_by_casting(folder: Path, itemsize: int) -> int:
    """Bytes by which the files of a folder are larger than their tensors with `itemsize` bytes per float."""
    saved = 0
    for tensor in _tensors(folder).values():
        if own := _FLOATS.get(tensor.dtype):
            saved += tensor.nbytes // own * (own - itemsize)
    return saved


def added_to_int4(folder: Path) -> int:
    """Bytes that 4-bit integers take beside their files where vLLM multiplies them with 8-bit activations on a CPU.

    Each group of them then has a scale of 4 bytes, a zero point of one, and a sum of 4.
    """
    tensors = _tensors(folder)
    added = 0
    for name in tensors:
        layer, dot, last = name.rpartition(".")
        if last not in _INT4:
            continue
        scales, zeros = (tensors.get(f"{layer}{dot}{other}") for other in _INT4[last])
        if scales is not None and (own := _FLOATS.get(scales.dtype)):
            added += scales.nbytes // own * 9 - scales.nbytes - (zeros.nbytes if zeros else 0)
    return added


def _has_int8_activations(dtype: torch.dtype) -> bool:
    if not current_platform.is_cpu() or dtype != torch.bfloat16 or not envs.VLLM_CPU_INT4_W4A8:
        return False
    return torch.cpu._is_amx_tile_supported() or current_platform.get_cpu_architecture() == CpuArchEnum.RISCV


@dataclass(frozen=True, slots=True)
class _Tensor:
    dtype: str
    nbytes: int


def _tensors(folder: Path) -> dict[str, _Tensor]:
    """The tensors of a folder's safetensors files by name; none if one of the files cannot be read."""
    found: dict[str, _Tensor] = {}
    for file in folder.glob("*.safetensors"):
        try:
            with file.open("rb") as opened:
                header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
            for name, tensor in header.items():
                if name != "__metadata__":
                    start, end = tensor["data_offsets"]
                    found[name] = _Tensor(tensor["dtype"], end - start)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            logger.debug("the header of %s cannot be read", file, exc_info=True)
            return {}
    return found


def table_bytes(config: VllmConfig) -> int:
    """Bytes of the tables of positions that vLLM computes for a model's rotary embeddings; 0 where it has none."""
    model = config.model_config
    text = model.hf_text_config
    size = getattr(text, "qk_rope_head_dim", None) or model.get_head_size()
    longest = getattr(text, "max_position_embeddings", None)
    if not longest or model.using_transformers_backend():  # whose models compute positions as they go
        return 0
    total = 0
    try:
        with (
            _own_tables(),
            set_current_vllm_config(config),
            set_default_torch_dtype(model.dtype),
            torch.device("meta"),
        ):
            for parameters in _rope_parameters(text):
                rope = rotary_embedding.get_rope(size, longest, rope_parameters=dict(parameters))
                total += sum(buffer.nbytes for buffer in rope.buffers())
    except Exception:  # whatever vLLM says to parameters that it does not use for this model
        logger.debug("the tables of positions of %s are not known", model.model, exc_info=True)
    return total


@contextmanager
def _own_tables() -> Iterator[None]:
    """What vLLM keeps of tables is as before afterwards, so that no engine is given one without bytes."""
    tables = rotary_embedding._ROPE_DICT
    kept = dict(tables)
    tables.clear()
    try:
        yield
    finally:
        tables.clear()
        tables.update(kept)


def _rope_parameters(text: Any) -> Iterator[Mapping[str, Any]]:
    """Of each kind of layers that has its own, once."""
    given = getattr(text, "rope_parameters", None)
    if not given:
        return
    per_layer = [value for value in given.values() if isinstance(value, Mapping)]
    seen: list[Mapping[str, Any]] = []
    for parameters in per_layer or [given]:
        if parameters not in seen:
            seen.append(parameters)
            yield parameters
