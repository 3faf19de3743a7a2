# SPDX-License-Identifier: Apache-2.0
"""What a kind of model is: a config of transformers with tiny sizes, and how vLLM is asked. Imports no vLLM."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenpool.demo.tiny_files import MAX_POSITION, VOCAB_SIZE, write_once
from tokenpool.demo.tiny_multimodal import Processing

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_POSITION,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.12,
    "tie_word_embeddings": False,
}
"""Sizes of every config that has fields of these names."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One architecture, with the sizes in which it is tried."""

    config: str
    """Class of transformers, without `Config`."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Fields beside `COMMON`, or in their place."""
    without: tuple[str, ...] = ()
    """Names of `COMMON` that the config computes by itself."""
    auto: str = "AutoModelForCausalLM"
    """Class of transformers that makes the model."""
    architecture: str | None = None
    """Name for vLLM in the place of the one that transformers writes."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Engine arguments of vLLM."""
    task: str | None = None
    """What is asked of a pooling model; None for one that generates."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """By the end of a weight's name, what it is multiplied by so that streams do not collapse."""
    after: Mapping[str, Any] = field(default_factory=dict)
    """Fields that are changed in the written config.json."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Pattern and replacement for weights' names, where vLLM knows others than transformers writes."""
    transposed: str | None = None
    """Pattern for names of weights whose last two dimensions checkpoints of the hub have the other way round."""
    demo: str | None = None
    """The kind of `tokenpool.demo.tiny_models` that this is; the fields above are not used then."""
    media: str | None = None
    """What its prompts hold beside text: modality and tokens that stand for it, as `media.prompt_with` reads them."""
    processing: Processing | None = None
    """What a kind that sees or hears has beside its config; it names the class that makes the model."""
    tokenizer: Mapping[str, str] = field(default_factory=dict)
    """Names under which processors look for special tokens."""
    scheme: str | None = None
    """How its weights are quantised; see `quantise`."""


def pooling(config: str, task: str, auto: str, more: Mapping[str, Any] | None = None, **fields: Any) -> Kind:
    """A kind that gives vectors or scores, `task` by vLLM's name."""
    args = {"runner": "pooling", **fields.pop("args", {})}
    return Kind(config, more or {}, auto=auto, task=task, args=args, **fields)


def make(kind: Kind, name: str, directory: Path, seed: int) -> Path:
    """Write a checkpoint to `directory`, unless the same one is there; raises whatever transformers raises."""
    if kind.demo is not None:
        from tokenpool.demo.tiny_models import make_tiny_model

        return make_tiny_model(kind.demo, directory)
    marker = {"format": 2, "kind": name, "seed": seed, "fields": repr(kind)}

    def write(target: Path) -> None:
        if kind.scheme is None:
            _write(kind, target, seed)
            return
        from tests.models.quantise import quantise

        with tempfile.TemporaryDirectory() as base:
            _write(kind, Path(base), seed)
            quantise(Path(base), target, kind.scheme)

    write_once(directory, marker, write)
    return directory


def _write(kind: Kind, target: Path, seed: int) -> None:
    import transformers

    from tokenpool.demo.tiny_files import make_tokenizer
    from tokenpool.demo.tiny_models import add_processing, random_model

    fields = {key: value for key, value in COMMON.items() if key not in kind.without} | dict(kind.more)
    config = getattr(transformers, f"{kind.config}Config")(**fields)
    more = kind.processing
    tokens = make_tokenizer(more)
    if kind.tokenizer:
        tokens._set_model_specific_special_tokens(dict(kind.tokenizer))
    tokens.save_pretrained(target)
    auto, media = (more.auto_class, len(more.tokens)) if more else (kind.auto, 0)
    model = random_model(config, seed, auto_class=auto, num_media_tokens=media, factors=kind.factors)
    model.save_pretrained(target)
    if more is not None:
        add_processing(target, more)
    if kind.renamed or kind.transposed:
        _rewrite(target / "model.safetensors", kind)
    if kind.after or kind.architecture:
        file = target / "config.json"
        architecture = {"architectures": [kind.architecture]} if kind.architecture else {}
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(kind.after) | architecture, indent=2) + "\n")


def _rewrite(file: Path, kind: Kind) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    for pattern, name in kind.renamed:
        weights = {re.sub(pattern, name, old): weight for old, weight in weights.items()}
    if kind.transposed:
        turned = {name for name in weights if re.search(kind.transposed, name)}
        weights = {n: w.transpose(-1, -2).contiguous() if n in turned else w for n, w in weights.items()}
    save_file(weights, file, {"format": "pt"})
