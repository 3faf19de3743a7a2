# SPDX-License-Identifier: Apache-2.0
"""Make tiny checkpoints that draft tokens for a tiny llama, with random weights, in the formats that vLLM reads.

A draft model is the target with noise on its weights, so that it guesses right often; an EAGLE layer and Medusa heads
are random and guess right where few tokens are likely.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenpool.demo.tiny_files import NUM_SPECIAL_TOKENS, write_beside

if TYPE_CHECKING:
    import torch

    Weights = dict[str, torch.Tensor]
    Maker = Callable[[dict[str, Any], Weights], tuple[dict[str, Any], Weights]]

NUM_DRAFTS = 2
"""Tokens that a drafter is made to guess."""
_NOISE = 0.02
_EAGLE3_WORDS = 64
"""Tokens that an EAGLE-3 layer can guess."""


def make_tiny_drafter(method: str, target: Path, directory: Path | str, *, seed: int = 0) -> dict[str, Any]:
    """Write a drafter of `method` for the llama in `target`; returns vLLM's speculative config that names it.

    Raises ValueError for a method that needs no checkpoint, or of which there is none here.
    """
    if method not in _MAKERS:
        raise ValueError(f"no tiny drafter {method!r}; choose one of {', '.join(_MAKERS)}")
    _write_made(target, Path(directory), {"kind": method, "seed": seed}, _MAKERS[method])
    return {"method": method, "model": str(directory), "num_speculative_tokens": NUM_DRAFTS}


def make_few_words(model: Path, directory: Path | str, *, words: int = 12) -> Path:
    """Write a copy of a tiny model that says only `words` tokens: n-grams come again, and a guess is often right."""

    def change(config: dict[str, Any], weights: Weights) -> tuple[dict[str, Any], Weights]:
        if "lm_head.weight" not in weights:  # it is that of the embeddings
            config["tie_word_embeddings"] = False
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["lm_head.weight"][NUM_SPECIAL_TOKENS + words :] = 0  # as the special tokens' rows are
        return config, weights

    _write_made(model, Path(directory), {"kind": "few_words", "words": words}, change, is_copy=True)
    return Path(directory)


def make_tiny_mtp(model: Path, directory: Path | str, *, seed: int = 0) -> Path:
    """Write a copy of a tiny qwen2 that is a MiMo: it has a layer more that predicts a further token."""

    def change(config: dict[str, Any], weights: Weights) -> tuple[dict[str, Any], Weights]:
        import torch

        config |= {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
        size, layer, more = config["hidden_size"], "model.layers.0.", "model.mtp_layers.0."
        weights |= {f"{more}{n.removeprefix(layer)}": _noisy(w, _NOISE) for n, w in weights.items() if layer in n}
        weights[f"{more}input_proj.weight"] = _noisy(_joining(size), _NOISE)
        for norm in ("token", "hidden", "final"):
            weights[f"{more}{norm}_layernorm.weight"] = torch.ones(size, dtype=torch.bfloat16)
        return config, weights

    _write_made(model, Path(directory), {"kind": "mtp", "seed": seed}, change, is_copy=True)
    return Path(directory)


def _write_made(model: Path, directory: Path, what: dict[str, Any], make: Maker, *, is_copy: bool = False) -> None:
    """Write the config and weights that `make` makes of a model's, with the model's other files if it is a copy."""

    def write(folder: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        if is_copy:
            shutil.copytree(model, folder, dirs_exist_ok=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(what.get("seed", 0))
            config = json.loads((model / "config.json").read_text())
            config, weights = make(config, load_file(model / "model.safetensors"))
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        contiguous = {name: weight.contiguous() for name, weight in weights.items()}
        save_file(contiguous, folder / "model.safetensors", {"format": "pt"})

    write_beside(model, directory, what, write)


def _draft_model(config: dict[str, Any], target: Weights) -> tuple[dict[str, Any], Weights]:
    return config, {name: _noisy(weight, _NOISE) for name, weight in target.items()}


def _eagle(config: dict[str, Any], target: Weights) -> tuple[dict[str, Any], Weights]:
    """The target's first layer, after a layer that joins its hidden states and the token; its head is shared."""
    prefix, size = "model.layers.0.", config["hidden_size"]
    layer = {name.removeprefix("model."): _noisy(w, _NOISE) for name, w in target.items() if name.startswith(prefix)}
    del layer["layers.0.input_layernorm.weight"]
    layer["fc.weight"] = _noisy(_joining(size), _NOISE)
    return config | {"num_hidden_layers": 1}, layer


def _eagle3(config: dict[str, Any], target: Weights) -> tuple[dict[str, Any], Weights]:
    """The target's last layer on hidden states of two of its layers, with a head for the first few tokens alone."""
    import torch

    prefix, size = f"model.layers.{config['num_hidden_layers'] - 1}.", config["hidden_size"]
    layer = {name.removeprefix(prefix): _noisy(w, _NOISE) for name, w in target.items() if name.startswith(prefix)}
    layer["hidden_norm.weight"] = torch.ones(size, dtype=torch.bfloat16)
    for name in ("q", "k", "v"):  # of the token and the hidden states
        weight = layer[f"self_attn.{name}_proj.weight"]
        layer[f"self_attn.{name}_proj.weight"] = torch.cat((torch.zeros_like(weight), weight), dim=1)
    weights = {f"midlayer.{name}": weight for name, weight in layer.items()}
    weights["fc.weight"] = _noisy(_joining(size), _NOISE)
    weights["norm.weight"] = target["model.norm.weight"].clone()
    weights["lm_head.weight"] = target["lm_head.weight"][:_EAGLE3_WORDS].clone()
    weights["d2t"] = torch.zeros(_EAGLE3_WORDS, dtype=torch.long)  # how far the target's id is from the drafter's
    made = {
        "num_hidden_layers": 1,
        "draft_vocab_size": _EAGLE3_WORDS,
        "num_aux_hidden_states": 2,
        "eagle_aux_hidden_state_layer_ids": [1, config["num_hidden_layers"]],
    }
    return config | made, weights


def _medusa(config: dict[str, Any], target: Weights) -> tuple[dict[str, Any], Weights]:
    """Heads on the target's last hidden states, with its words."""
    import torch

    size, head = config["hidden_size"], target["lm_head.weight"]
    weights = {}
    for index in range(NUM_DRAFTS):
        weights[f"blocks.{index}.layers.0.weight"] = _noisy(torch.zeros(size, size, dtype=head.dtype), 0.5)
        weights[f"lm_heads.{index}.weight"] = head.clone()
    made = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": size,
        "vocab_size": config["vocab_size"],
        "num_heads": NUM_DRAFTS,
        "num_hidden_layers": 1,
    }
    return made, weights


def _joining(size: int) -> torch.Tensor:
    """Weights that take the hidden states of (token, hidden states)."""
    import torch

    return torch.cat((torch.zeros(size, size), torch.eye(size)), dim=1).to(torch.bfloat16)


def _noisy(weight: torch.Tensor, size: float) -> torch.Tensor:
    import torch

    return weight + (torch.randn(weight.shape) * size).to(weight.dtype)


_MAKERS: dict[str, Maker] = {
    "draft_model": _draft_model,
    "eagle": _eagle,
    "eagle3": _eagle3,
    "medusa": _medusa,
}
