# SPDX-License-Identifier: Apache-2.0
"""Makes llama-like checkpoints with random weights of a given size, nearly all of it in linear layers.

    python -m bench.parts.sized_models '[["DIR", MIB, SEED], ...]'

Run as a process of its own where the bench must not load torch. Tokens are those of the tiny models.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenpool.demo import tiny_files, tiny_models

_HEAD_DIM = 64
_MAX_POSITION = 2048
_BYTES = 2  # per weight, bfloat16


def shape(mib: float) -> dict[str, int]:
    """Layers and widths of a model of about `mib` MiB: proportions as in larger models, the MLP makes the size right.

    Widths are multiples of 32 and 128, which CPU kernels for packed weights ask for.
    """
    num_weights = mib * (1 << 20) / _BYTES
    num_layers = 2 if mib < 4 else 4 if mib < 32 else 8
    hidden = max(128, round(math.sqrt(num_weights / num_layers / 12) / 128) * 128)
    attention = 3 * hidden * hidden  # query and output are square, key and value half as wide
    mlp = (num_weights - 2 * tiny_files.VOCAB_SIZE * hidden) / num_layers - attention
    return {
        "num_hidden_layers": num_layers,
        "hidden_size": hidden,
        "intermediate_size": max(32, round(mlp / (3 * hidden) / 32) * 32),
        "num_attention_heads": hidden // _HEAD_DIM,
        "num_key_value_heads": hidden // _HEAD_DIM // 2,
        "head_dim": _HEAD_DIM,
    }


def kv_bytes_per_token(mib: float) -> int:
    """Bytes of KV that a model of this size keeps for each token."""
    sizes = shape(mib)
    return 2 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * _HEAD_DIM * _BYTES


def make(folder: Path, mib: float, seed: int) -> None:
    """Write one checkpoint, with its tokenizer."""
    from transformers import LlamaConfig

    fixed: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False}
    config = LlamaConfig(**shape(mib), **fixed, vocab_size=tiny_files.VOCAB_SIZE, max_position_embeddings=_MAX_POSITION)
    tiny_files.make_tokenizer().save_pretrained(folder)
    tiny_models.random_model(config, seed).save_pretrained(folder)


def make_all(folder: Path, mib_of: Mapping[str, float]) -> dict[str, Path]:
    """Write one checkpoint for each name, seeded by its place, in a child process; returns where they are."""
    paths = {name: folder / name.replace("/", "_") for name in mib_of}
    jobs = [[str(path), mib_of[name], seed] for seed, (name, path) in enumerate(paths.items(), start=1)]
    command = [sys.executable, "-m", "bench.parts.sized_models", json.dumps(jobs)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
    return paths


if __name__ == "__main__":
    for directory, size, number in json.loads(sys.argv[1]):
        make(Path(directory), size, number)
