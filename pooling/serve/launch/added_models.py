# SPDX-License-Identifier: Apache-2.0
"""Which models may be added over HTTP, as `admin_models` of the pool file says. Imports no vLLM.

Many flags of vLLM import code by name, read any file or write some: with `listed`, a key that leaks is no login.
docs/security.md lists what the flags can do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from tokenpool.access_config import is_path
from tokenpool.config import ModelSpec, PoolConfig
from tokenpool.errors import ConfigError

HARMLESS_FLAGS = frozenset({
    "--allowed-media-domains", "--async-scheduling", "--block-size", "--convert", "--disable-cascade-attn",
    "--disable-chunked-mm-input", "--disable-log-stats", "--disable-sliding-window", "--dtype",
    "--enable-auto-tool-choice", "--enable-chunked-prefill", "--enable-lora", "--enable-prefix-caching",
    "--enable-prompt-tokens-details", "--enforce-eager", "--exclude-tools-when-tool-choice-none",
    "--gpu-memory-utilization", "--kv-cache-dtype", "--kv-cache-memory-bytes", "--language-model-only",
    "--limit-mm-per-prompt", "--long-prefill-token-threshold", "--max-logprobs", "--max-lora-rank", "--max-loras",
    "--max-model-len", "--max-num-batched-tokens", "--max-num-seqs", "--mm-processor-cache-gb",
    "--override-generation-config", "--quantization", "--reasoning-parser", "--return-tokens-as-token-ids",
    "--revision", "--runner", "--scheduling-policy", "--seed", "--served-model-name", "--tensor-parallel-size",
    "--tool-call-parser",
})  # fmt: skip
"""Flags that choose among what vLLM itself brings, or give a size or a name."""

_NUMBER = re.compile(r"-\.?\d")


def check_added(spec: ModelSpec, config: PoolConfig) -> None:
    """Refuse a model that `admin_models` does not let in; raises ConfigError that says what would."""
    if config.admin_models == "any":
        return
    if config.admin_models == "none":
        raise ConfigError("no model is added over HTTP here: write it into the pool file", key="admin_models")
    if not _is_below(spec.model, roots_of(config)) and spec.model not in {model.model for model in config.models}:
        roots = ", ".join(roots_of(config)) or "none"
        raise ConfigError(
            f"only models below admin_roots may be added over HTTP, here {roots}: name its folder or its owner there, "
            "or write admin_models: any", key="model",
        )  # fmt: skip
    for flag in map(_flag, spec.args):
        if flag is not None and flag not in HARMLESS_FLAGS:
            raise ConfigError(
                f"{flag} may not be given over HTTP: it can run code or reach files; write the model into the pool "
                "file, or admin_models: any", key="args",
            )  # fmt: skip


def roots_of(config: PoolConfig) -> Sequence[str]:
    """Folders, and owners on the hub, below which models may be added.

    Those of `admin_roots`, else the folders and owners of the models in the pool file; the root folder is none of them.
    """
    if config.admin_roots is not None:
        return config.admin_roots
    parents = (os.path.dirname(os.path.abspath(m.model) if is_path(m.model) else m.model) for m in config.models)
    return [parent for parent in dict.fromkeys(parents) if parent not in ("", "/")]


def _is_below(model: str, roots: Sequence[str]) -> bool:
    if not is_path(model):
        owner, slash, name = model.partition("/")
        return bool(slash) and owner in roots and name.strip(".") != "" and "/" not in name
    real = os.path.realpath(model)  # a link leads where it points
    return any(os.path.commonpath((real, top)) == top for top in map(os.path.realpath, filter(is_path, roots)))


def _flag(word: str) -> str | None:
    """The flag that a word of the command line is, as vLLM spells it; None for a value."""
    if not word.startswith("-") or _NUMBER.match(word):
        return None
    name = word.partition("=")[0].partition(".")[0].replace("_", "-")  # --flag.key is one key of a flag's JSON
    on = "--" + name.removeprefix("--no-")
    return on if name.startswith("--no-") and on in HARMLESS_FLAGS else name
