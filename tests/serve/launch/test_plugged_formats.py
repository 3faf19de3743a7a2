# SPDX-License-Identifier: Apache-2.0
"""Weights in a format that vLLM leaves to a plugin are refused in one line, by whatever names them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import TinyModels
from tokenpool.config import ModelSpec
from tokenpool.errors import ConfigError, ModelRefusedError
from tokenpool.serve.launch.launch_plan import plan_model
from tokenpool.serve.launch.plugged_formats import unknown_format
from tokenpool.serve.launch.poolability import check_config

pytestmark = pytest.mark.vllm

GGUF = "'m' cannot be pooled: weights as gguf, which vLLM leaves to vllm-gguf-plugin.*; take a checkpoint in FP8"
BITSANDBYTES = "'m' cannot be pooled: weights as bitsandbytes, which vLLM leaves to vllm-bnb-plugin.*; take a"


def refused(expected: str, model: object, *flags: str) -> bool:
    """Whether a model is refused so when it is planned, in one line."""
    with pytest.raises(ModelRefusedError) as raised:
        plan_model(ModelSpec("m", str(model), flags))
    return re.search(expected, str(raised.value)) is not None and "\n" not in str(raised.value)


def copy_of(base: Path, folder: Path, **fields: object) -> Path:
    """A checkpoint with other fields in its config."""
    shutil.copytree(base, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


@pytest.mark.parametrize("model", ["a/b-GGUF:Q4_K_M", "a/b:iq2_xs", "a/b/model-q4.gguf"])
def test_gguf_of_the_hub_is_refused_by_its_name(model: str):
    """Nothing is asked of the hub."""
    assert refused(GGUF, model)


def test_gguf_files_are_refused(tmp_path: Path):
    """One that is named, and a folder that has nothing else."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert refused(GGUF, tmp_path / "model.gguf")
    assert refused(GGUF, tmp_path)


def test_a_gguf_file_beside_others_is_not_read(tiny_models: TinyModels, tmp_path: Path):
    """Many repositories have both; vLLM takes the safetensors."""
    folder = copy_of(tiny_models.path("llama"), tmp_path / "both")
    (folder / "model-q4.gguf").write_bytes(b"GGUF")
    assert plan_model(ModelSpec("m", str(folder), ())).weight_bytes > 0


@pytest.mark.parametrize("flag", ["--quantization", "--load-format"])
def test_flags_are_refused(tiny_models: TinyModels, flag: str):
    """Weights that vLLM would quantise by a plugin as it loads them."""
    assert refused(BITSANDBYTES, tiny_models.path("llama"), flag, "bitsandbytes")
    assert refused(GGUF, tiny_models.path("llama"), f"{flag}=gguf")


def test_a_quantised_checkpoint_is_refused_by_its_config(tiny_models: TinyModels, tmp_path: Path):
    """As a model, and as the draft model of another."""
    base = tiny_models.path("llama")
    folder = copy_of(base, tmp_path / "bnb", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert refused(BITSANDBYTES, folder)
    drafter = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 2}
    assert refused(BITSANDBYTES, base, "--speculative-config", json.dumps(drafter))


def test_what_vllm_says_of_files_on_the_hub_is_told_so(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch):
    """Without the plugin vLLM knows no such method, in a list of thirty; with it, it makes a config."""
    plan = plan_model(ModelSpec("m", str(tiny_models.path("llama")), ()))
    plan.args.quantization = "bitsandbytes"
    with pytest.raises(ModelRefusedError, match=BITSANDBYTES):
        plan.engine_config()
    plan.args.quantization = "nonsense"
    with pytest.raises(ConfigError, match="nonsense"):
        plan.engine_config()
    assert unknown_format("m", ValueError("Unknown quantization method: bits")) is None

    plan.args.quantization = None
    config = plan.engine_config()
    monkeypatch.setattr(config.model_config, "quantization", "gguf")
    with pytest.raises(ModelRefusedError, match=GGUF):
        check_config("m", config)
