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
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import rotary_embedding
from vllm.utils.torch_utils import set_default_torch_dtype

logger = logging.getLogger(__name__)

_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of what vLLM casts to the dtype of the model, by the names in a safetensors file."""


def device_bytes(file_bytes: int, folder: Path, config: VllmConfig) -> int:
    """Bytes of a model's weights on the device, of whose files in `folder` it has `file_bytes`; 0 if these are unknown.

    An estimate: some kinds have further buffers, or tie weights that their files have twice. Of a quantised checkpoint
    the files' own dtypes count.
    """
    if not file_bytes:
        return 0
    model = config.model_config
    ranks = config.parallel_config.tensor_parallel_size
    cast = 0 if model.quantization else saved_by_casting(folder, model.dtype.itemsize) // ranks
    return file_bytes - cast + table_bytes(config)


def saved_by_casting(folder: Path, itemsize: int) -> int:
    """Bytes by which the files of a folder are larger than their tensors with `itemsize` bytes per float."""
    saved = 0
    for file in folder.glob("*.safetensors"):
        try:
            with file.open("rb") as opened:
                header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
            for name, tensor in header.items():
                if name != "__metadata__" and (own := _FLOATS.get(tensor["dtype"])):
                    start, end = tensor["data_offsets"]
                    saved += (end - start) // own * (own - itemsize)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            logger.debug("the header of %s cannot be read", file, exc_info=True)
            return 0
    return saved


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
