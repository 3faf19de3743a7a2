# SPDX-License-Identifier: Apache-2.0
"""Formats of quantised weights that vLLM leaves to plugins: a model in one is refused by name before it loads."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

from tokenpool.errors import ModelRefusedError
from tokenpool.serve.launch.checkpoint import WEIGHT_FILES

PLUGGED = {"gguf": "vllm-gguf-plugin", "bitsandbytes": "vllm-bnb-plugin"}
"""By vLLM's name of the format, the package that has it."""
HINT = (
    "take a checkpoint in FP8, compressed-tensors, AWQ, GPTQ or MXFP4, or serve it with plain vLLM and that plugin "
    "outside the pool"
)
_GGUF_ON_THE_HUB = re.compile(r"[^:]/[^:]+:(I?Q\d\w*|MXFP4\w*|BF16|F16|F32)", re.IGNORECASE)
"""Repository and name of a variant, as the plugin takes them."""
_UNKNOWN_TO_VLLM = re.compile(rf"quantization method: ({'|'.join(PLUGGED)})\b")


def check_formats(name: str, args: Namespace, drafter: str | None) -> None:
    """Refuse a model by its flags and local files; `drafter` is the draft model that its flags name, if any."""
    for flag in ("quantization", "load_format"):
        if (given := str(getattr(args, flag)).lower()) in PLUGGED:
            raise _refusal(name, given)
    for model in (args.model, drafter):
        if model is not None and (found := _format_of(model)):
            raise _refusal(name, found)


def check_format(name: str, config: Any) -> None:
    """Refuse a model by what vLLM read of it, where a plugin knows the format; `config` is a VllmConfig."""
    drafter = getattr(config.speculative_config, "draft_model_config", None)
    for model in (config.model_config, drafter):
        if model is not None and model.quantization in PLUGGED:
            raise _refusal(name, model.quantization)


def unknown_format(name: str, refusal: Exception) -> ModelRefusedError | None:
    """Say which plugin has the format if that is why vLLM refuses a model, of which the hub has the files."""
    found = _UNKNOWN_TO_VLLM.search(str(refusal))
    return _refusal(name, found[1]) if found else None


def _refusal(name: str, weights: str) -> ModelRefusedError:
    feature = f"weights as {weights}, which vLLM leaves to {PLUGGED[weights]}, which was not tried in a pool"
    return ModelRefusedError(name, feature, HINT)


def _format_of(model: str) -> str | None:
    """The format of a model that its name, or its folder, tells."""
    folder = Path(model).expanduser()
    if model.lower().endswith(".gguf") or _GGUF_ON_THE_HUB.search(model):
        return "gguf"
    if not folder.is_dir():
        return None
    if any(folder.glob("*.gguf")) and not any(file for pattern in WEIGHT_FILES for file in folder.glob(pattern)):
        return "gguf"
    try:
        method = json.loads((folder / "config.json").read_bytes())["quantization_config"]["quant_method"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None  # vLLM says what is wrong with it, if anything is
    return method if method in PLUGGED else None
