# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of one architecture are compiled once, and each computes with its own weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.cases import greedy, make_cases
from tests.helpers.plain import Case

pytestmark = pytest.mark.vllm

INDUCTOR = {"enforce_eager": False, "compilation_config": {"mode": 3, "compile_sizes": [], "cudagraph_mode": "NONE"}}


@pytest.fixture(scope="module")
def tunes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Two checkpoints of one architecture with other weights, and one of another architecture."""
    made = {}
    for name, kind in (("first", "llama"), ("second", "llama"), ("other", "qwen2")):
        folder = tmp_path_factory.mktemp(name)
        made[name] = replace(make_cases(folder, (kind,), greedy(2, 6))[kind], name=name)
    _change_weights(made["second"])
    return made


def _change_weights(case: Case) -> None:
    from safetensors.torch import load_file, save_file

    (file,) = Path(case.model).glob("*.safetensors")
    save_file({name: tensor.flip(0) for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def test_one_architecture_has_one_key(tunes):
    """Whatever the folder; another architecture, or the same one with other settings, has another."""
    from tests.helpers.pooled import make_spec
    from tokenpool.host.load.compile_key import share_compiled_code

    configs = {name: make_spec(case, **INDUCTOR).vllm_config for name, case in tunes.items()}
    configs["longer"] = make_spec(tunes["first"], **INDUCTOR, max_model_len=64).vllm_config
    before = {name: config.compute_hash() for name, config in configs.items()}
    assert 4 == len(set(before.values()))
    assert all(map(share_compiled_code, configs.values()))
    after = {name: config.compute_hash() for name, config in configs.items()}
    assert after["first"] == after["second"]
    assert 3 == len(set(after.values()))


@pytest.mark.parametrize("change", ["quantization", "trust_remote_code"])
def test_what_may_hold_constants_of_a_checkpoint_shares_nothing(tunes, change):
    """The key stays vLLM's."""
    from tests.helpers.pooled import make_spec
    from tokenpool.host.load.compile_key import share_compiled_code

    config = make_spec(tunes["first"], **INDUCTOR).vllm_config
    before = config.compute_hash()
    object.__setattr__(config.model_config, change, "fp8" if change == "quantization" else True)
    assert not share_compiled_code(config)
    object.__setattr__(config.model_config, change, None if change == "quantization" else False)
    assert before == config.compute_hash()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler on the CPU")
def test_a_fine_tune_uses_what_was_compiled_for_another(tunes, tmp_path, monkeypatch):
    """Nothing is compiled for the second, and its tokens are those that it has when it is compiled alone."""
    from tests.helpers.pooled import PooledModels

    tokens = {}
    for names in (("first", "second"), ("second",)):
        root = tmp_path / "-".join(names)
        monkeypatch.setenv("VLLM_CACHE_ROOT", str(root))
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(root / "inductor"))
        pool = PooledModels(32 << 20, 256 << 10)
        kept = []
        for name in names:
            pool.add(tunes[name], **INDUCTOR)
            kept.append(sorted(path for path in (root / "torch_compile_cache").rglob("*") if path.is_file()))
            pool.submit(tunes[name])
        pool.run()
        tokens |= {(len(names), name): [r.tokens for r in pool.results(name).values()] for name in names}
        pool.close()
        assert kept[0], "nothing was compiled: the test proves nothing"
        assert kept[0] == kept[-1], "the second checkpoint was compiled anew"
    assert tokens[2, "second"] == tokens[1, "second"]
    assert tokens[2, "first"] != tokens[2, "second"]
