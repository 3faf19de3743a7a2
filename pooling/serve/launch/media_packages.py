# SPDX-License-Identifier: Apache-2.0
"""The packages with which vLLM reads images, videos and sounds: it installs none of them for sure, and names none.

Without torchvision a model "failed to be inspected", or ends at its first image. Without a decoder for sounds each
request with one is answered with 400, as if its file were broken.
"""

from __future__ import annotations

import importlib
import re
from importlib.util import find_spec
from typing import Any

from vllm.model_executor.models.registry import ModelRegistry
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokenpool.errors import ModelRefusedError

AUDIO_DECODERS = ("soundfile", "av")
"""Packages that read sounds; vLLM takes the first that there is. av also changes sample rates."""
_FAILED = " failed to be inspected"
_TORCHVISION = "install the torchvision of this torch (for CPUs from https://download.pytorch.org/whl/cpu)"


def check_packages(name: str, config: Any) -> None:
    """Refuse a model whose media could not be read here; `config` is vLLM's ModelConfig."""
    media = config.multimodal_config
    if media is None or media.language_model_only:
        return
    if find_spec("torchvision") is None:
        raise ModelRefusedError(name, "a multimodal model without the package torchvision", _TORCHVISION)
    limits = MULTIMODAL_REGISTRY.get_processing_info(config).allowed_mm_limits
    if limits.get("audio") and not any(find_spec(decoder) for decoder in AUDIO_DECODERS):
        feature = f"a model for sounds without the packages {' or '.join(AUDIO_DECODERS)}"
        raise ModelRefusedError(
            name, feature, "pip install 'tokenpool[audio]', or --limit-mm-per-prompt '{\"audio\": 0}'"
        )


def missing_package(refusal: Exception) -> str | None:
    """Say which package is missing if that is why vLLM "failed to inspect" an architecture; None if it is not."""
    if _FAILED not in str(refusal):
        return None
    for architecture in re.findall(r"'(\w+)'", str(refusal).partition(_FAILED)[0]):
        module = getattr(ModelRegistry.models.get(architecture), "module_name", None)
        try:
            if module is not None:
                importlib.import_module(module)
        except ModuleNotFoundError as error:
            return f"{architecture} needs the package {error.name}, which is not installed"
        except Exception:  # noqa: S112 - what else is wrong with it is no package; vLLM has logged it
            continue
    return None
