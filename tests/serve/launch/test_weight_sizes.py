# SPDX-License-Identifier: Apache-2.0
"""What weights take on the device is known before they are loaded: in the model's dtype, with tables of positions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import TinyModels
from tests.models.quantise import GROUP, quantise
from tokenpool.config import ModelSpec, PoolConfig
from tokenpool.errors import ConfigError
from tokenpool.serve.launch import weight_sizes
from tokenpool.serve.launch.checkpoint import checkpoint_bytes
from tokenpool.serve.launch.launch_plan import plan_pool

pytestmark = pytest.mark.vllm

PAGE = 256 << 10


def planned(folder: Path, *flags: str) -> int:
    """Bytes that are planned for the model in a folder."""
    config = PoolConfig((ModelSpec("m", str(folder), flags),), device_memory=1 << 30, page_size=PAGE)
    _, (plan,) = plan_pool(config)
    return plan.weight_bytes


def changed(base: Path, folder: Path, **fields: object) -> Path:
    """A copy of a checkpoint with other fields in its config."""
    shutil.copytree(base, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


def test_a_checkpoint_in_float32_counts_in_the_dtype_of_the_model(tiny_models: TinyModels, tmp_path: Path):
    """Half of its files; what is no float keeps its size."""
    import torch
    from safetensors.torch import save_file

    base = tiny_models.path("llama")
    wide = changed(base, tmp_path / "wide")
    tensors = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors | {"indices": torch.zeros(1000, dtype=torch.int64)}, wide / "model.safetensors", {"format": "pt"})
    assert checkpoint_bytes(wide) > 1.9 * checkpoint_bytes(base)
    assert abs(planned(wide, "--dtype", "bfloat16") - planned(base, "--dtype", "bfloat16") - 8000) < 4096
    assert planned(wide, "--dtype", "float32") > 1.9 * planned(base, "--dtype", "bfloat16")


def test_the_table_of_a_stretched_context_counts(tiny_models: TinyModels, tmp_path: Path):
    """With YaRN vLLM's table is as long as the context that it is stretched to; then a small device is refused."""
    base = tiny_models.path("llama")
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 32.0, "original_max_position_embeddings": 2048}
    long = changed(base, tmp_path / "long", rope_parameters=yarn, max_position_embeddings=65536)
    rows, dim = 65536, 32
    assert planned(base) - checkpoint_bytes(base) in range(2048 * dim * 2, 2048 * dim * 4 + 1)
    assert planned(long) - checkpoint_bytes(long) in range(rows * dim * 2, rows * dim * 4 + 1)
    small = PoolConfig(
        (ModelSpec("m", str(long), ()),), device_memory=checkpoint_bytes(long) + 8 * PAGE, page_size=PAGE
    )
    with pytest.raises(ConfigError, match="device_memory: .* is too little: the weights of"):
        plan_pool(small)
    plan_pool(PoolConfig((ModelSpec("m", str(base), ()),), device_memory=small.device_memory, page_size=PAGE))


def test_no_engine_is_given_a_table_without_bytes(tiny_models: TinyModels):
    """The tables that are only measured stay out of vLLM's."""
    from vllm.model_executor.layers import rotary_embedding

    before = dict(rotary_embedding._ROPE_DICT)
    planned(tiny_models.path("gemma3"))
    assert before == rotary_embedding._ROPE_DICT


@pytest.mark.parametrize("scheme", ["w4a16", "gptq", "awq", "int8"])
def test_what_the_kernels_add_to_4_bit_integers_counts(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
):
    """9 bytes per group in the place of the files' scales and zero points, where such a kernel is taken."""
    folder = tmp_path / scheme
    folder.mkdir()
    quantise(tiny_models.path("llama"), folder, scheme)
    monkeypatch.setattr(weight_sizes, "_has_int8_activations", lambda dtype: False)
    bare = planned(folder, "--dtype", "bfloat16")
    monkeypatch.setattr(weight_sizes, "_has_int8_activations", lambda dtype: dtype.itemsize == 2)
    weights = load_file(tiny_models.path("llama") / "model.safetensors")
    groups = sum(w.numel() // GROUP for name, w in weights.items() if name.endswith("_proj.weight"))
    in_files = {"w4a16": 2 * groups, "gptq": 2 * groups + groups // 2, "awq": 2 * groups + groups // 2}
    added = 9 * groups - in_files[scheme] if scheme in in_files else 0
    assert bare + added == planned(folder, "--dtype", "bfloat16")
