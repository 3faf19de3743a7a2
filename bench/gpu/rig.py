# SPDX-License-Identifier: Apache-2.0
"""What the GPU benches share: the check for a device, and models of well-known shapes without weights on disk."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

NO_DEVICE = 3
"""Exit status on a machine without a CUDA device: nothing was measured."""

SHAPES: dict[str, dict[str, int]] = {
    "1b": dict(hidden_size=2048, num_hidden_layers=16, intermediate_size=8192, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128256),
    "8b": dict(hidden_size=4096, num_hidden_layers=32, intermediate_size=14336, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128256),
    "14b": dict(hidden_size=5120, num_hidden_layers=48, intermediate_size=13824, num_attention_heads=40,
                num_key_value_heads=8, vocab_size=152064),
}  # fmt: skip
"""Llama 3.2 1B and 3.1 8B, and Qwen2.5 14B as far as sizes go; input and output embeddings are separate."""
BLOCK_TOKENS = 32
PAGE_BYTES = 32 << 20


def require_cuda() -> None:
    """Exit with status 3 and one line on stderr where torch finds no CUDA device."""
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured", file=sys.stderr)
        sys.exit(NO_DEVICE)


def describe_gpu() -> dict[str, Any]:
    """The device, for the results."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}


def model_flags(graphs: bool) -> list[str]:
    """Flags of each model on both sides: random weights, and full graphs of decode steps, which are quick to make."""
    quick = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]}
    how = ["--compilation-config", json.dumps(quick)] if graphs else ["--enforce-eager"]
    fixed = ["--max-model-len", "2048", "--dtype", "bfloat16", "--block-size", str(BLOCK_TOKENS)]
    return [*fixed, "--load-format", "dummy", *how]


def weight_bytes(shape: str) -> int:
    """Bytes of all weights in bfloat16."""
    s = SHAPES[shape]
    hidden, head = s["hidden_size"], s["hidden_size"] // s["num_attention_heads"]
    attention = 2 * hidden * hidden + 2 * hidden * head * s["num_key_value_heads"]
    layer = attention + 3 * hidden * s["intermediate_size"] + 2 * hidden
    return 2 * (s["num_hidden_layers"] * layer + 2 * s["vocab_size"] * hidden + hidden)


def kv_bytes_per_token(shape: str) -> int:
    """Bytes of KV for each token in bfloat16."""
    s = SHAPES[shape]
    return 4 * s["num_hidden_layers"] * s["num_key_value_heads"] * (s["hidden_size"] // s["num_attention_heads"])


def make_model(folder: Path, shape: str) -> Path:
    """Write config and tokenizer, to be served with `--load-format dummy`.

    A sparse file in the place of the weights tells the pool how large they are.
    """
    from transformers import LlamaConfig

    from tokenpool.demo import tiny_files

    fixed: dict[str, Any] = dict(tie_word_embeddings=False, max_position_embeddings=8192, torch_dtype="bfloat16")
    LlamaConfig(architectures=["LlamaForCausalLM"], **SHAPES[shape], **fixed).save_pretrained(folder)
    tiny_files.make_tokenizer().save_pretrained(folder)
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(weight_bytes(shape))
    return folder
