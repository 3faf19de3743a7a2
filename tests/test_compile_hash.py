# SPDX-License-Identifier: Apache-2.0
"""What names compiled code: equal for fine-tunes of one architecture, and different wherever their graphs may be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.plain import ENGINE_ARGS
from tokenpool.demo.tiny_models import make_tiny_model
from tokenpool.patches import PATCHES, compile_hash
from tokenpool.patches.base import resolve

pytestmark = pytest.mark.vllm

TARGET = compile_hash.PATCH.target


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two fine-tunes: other weights, the same architecture."""
    folder = tmp_path_factory.mktemp("models")
    return [make_tiny_model("llama", folder / name, seed=seed) for seed, name in enumerate(("one", "other"))]


@pytest.fixture(scope="module")
def original() -> Any:
    """vLLM's own."""
    return PATCHES._originals.get(TARGET) or resolve(TARGET)


@pytest.fixture
def patched(original: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    from vllm.config import VllmConfig

    ours = compile_hash._replacement(original)
    monkeypatch.setattr(VllmConfig, "compute_hash", ours)
    return ours


def config_of(path: Path, **args: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(path), **{**ENGINE_ARGS, "enforce_eager": False, **args}).create_engine_config()


def test_fine_tunes_share_what_is_compiled(paths, original, patched):
    """They differ by their weights and paths, which no graph knows."""
    one, other = (config_of(path) for path in paths)
    assert original(one) != original(other), "the patch is not needed any more"
    assert one.compute_hash() == other.compute_hash()
    assert [str(path) for path in paths] == [config.model_config.model for config in (one, other)]


@pytest.mark.parametrize(
    "args",
    [
        {"dtype": "float32"},
        {"max_model_len": 256},
        {"max_num_batched_tokens": 2048},
        {"kv_cache_dtype": "fp8"},
        {"enable_lora": True, "max_lora_rank": 8},
        {"model_impl": "transformers"},
        {"tensor_parallel_size": 2},
        {"compilation_config": {"mode": 2, "backend": "eager"}},
        {"compilation_config": {"custom_ops": ["all"]}},
        {"hf_overrides": {"num_hidden_layers": 1}},
        {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}},
        {"revision": "v2"},
        {"code_revision": "v2"},
        {"trust_remote_code": True},
        {"compilation_config": {"inductor_compile_config": {"max_autotune": True}}},
    ],
    ids=lambda args: "-".join(f"{key}={value}" for key, value in args.items())[:60],
)
def test_what_changes_a_graph_changes_the_name(paths, patched, args):
    """Whatever vLLM's hash told apart beside the path, also between two checkpoints."""
    assert config_of(paths[0]).compute_hash() != config_of(paths[1], **args).compute_hash()


CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "model.dtype": st.sampled_from(["bfloat16", "float32"]),
        "model.max_model_len": st.sampled_from([128, 256]),
        "model.revision": st.sampled_from([None, "v2"]),
        "model.code_revision": st.sampled_from([None, "v2"]),
        "model.max_logprobs": st.sampled_from([5, 20]),
        "model.model_impl": st.sampled_from(["auto", "transformers"]),
        "model.seed": st.sampled_from([0, 1]),
        "model.served_model_name": st.sampled_from(["one", "other"]),
        "model.quantization": st.sampled_from([None, "fp8"]),
        "model.trust_remote_code": st.booleans(),
        "hf.num_hidden_layers": st.sampled_from([2, 3]),
        "hf.hidden_act": st.sampled_from(["silu", "gelu"]),
        "hf.tie_word_embeddings": st.booleans(),
        "cache.cache_dtype": st.sampled_from(["auto", "fp8"]),
        "inductor.max_autotune": st.booleans(),
    },
)


@pytest.fixture(scope="module")
def base(paths: list[Path]) -> Any:
    return config_of(paths[0])


def changed(base: Any, path: str, changes: dict[str, Any]) -> Any:
    made = copy.copy(base)
    model, cache, compilation = (copy.copy(c) for c in (base.model_config, base.cache_config, base.compilation_config))
    made.model_config, made.cache_config, made.compilation_config = model, cache, compilation
    model.hf_config = model.hf_text_config = copy.deepcopy(base.model_config.hf_config)
    compilation.inductor_compile_config = dict(compilation.inductor_compile_config)
    model.model = path
    for name, value in changes.items():
        kind, _, attribute = name.partition(".")
        if kind == "inductor":
            compilation.inductor_compile_config[attribute] = value
        else:
            setattr({"model": model, "hf": model.hf_config, "cache": cache}[kind], attribute, value)
    return made


@given(first=CHANGES, second=CHANGES)
def test_only_the_path_is_left_out(base, original, first, second):
    """Two checkpoints have one name exactly where vLLM gives one path one name, and their configurations tell all."""
    ours = compile_hash._replacement(original)
    one, other = changed(base, "/one", first), changed(base, "/other", second)
    here = [original(changed(base, "/here", changes)) for changes in (first, second)]
    told = [not any(changes.get(key) for key in UNTOLD) for changes in (first, second)]
    assert (here[0] == here[1] and all(told)) == (ours(one) == ours(other))
    assert ["/one", "/other"] == [config.model_config.model for config in (one, other)]


UNTOLD = ("model.quantization", "model.trust_remote_code", "inductor.max_autotune")
