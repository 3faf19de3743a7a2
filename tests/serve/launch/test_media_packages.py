# SPDX-License-Identifier: Apache-2.0
"""A model whose images or sounds could not be read here is refused with the name of the package that is missing."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest

from tokenpool.errors import ModelRefusedError

pytestmark = pytest.mark.vllm


def config(limits: dict[str, int] | None, *, text_only: bool = False) -> Any:
    """What is looked at of a model's config; without `limits` it takes text only."""
    media = None if limits is None else SimpleNamespace(language_model_only=text_only)
    return SimpleNamespace(multimodal_config=media, limits=limits)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The packages that are there; a test may take some away."""
    from tokenpool.serve.launch import media_packages

    there = {"torchvision", "soundfile", "av"}
    monkeypatch.setattr(media_packages, "find_spec", lambda name: name if name in there else None)
    registry = SimpleNamespace(get_processing_info=lambda config: SimpleNamespace(allowed_mm_limits=config.limits))
    monkeypatch.setattr(media_packages, "MULTIMODAL_REGISTRY", registry)
    return there


def test_images_need_torchvision_and_sounds_a_decoder(installed: set[str]) -> None:
    from tokenpool.serve.launch.media_packages import check_packages

    sees, hears = config({"image": 8, "video": 1}), config({"audio": 1})
    deaf, text = config({"image": 1, "audio": 0}), config({"image": 1}, text_only=True)
    for model in (sees, hears, deaf, text, config(None)):
        check_packages("a", model)
    installed.remove("soundfile")
    check_packages("a", hears)  # av reads them, too
    installed.remove("av")
    with pytest.raises(ModelRefusedError, match=r"soundfile or av.*tokenpool\[audio\].*--limit-mm-per-prompt"):
        check_packages("a", hears)
    for model in (sees, deaf, text, config(None)):
        check_packages("a", model)
    installed.remove("torchvision")
    for model in (sees, deaf):
        with pytest.raises(ModelRefusedError, match="torchvision.*download.pytorch.org"):
            check_packages("a", model)
    for model in (text, config(None)):
        check_packages("a", model)


def test_what_failed_to_be_inspected_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM says only that it failed; a failure that no package causes stays as vLLM tells it."""
    from tokenpool.serve.launch.media_packages import missing_package

    def fail(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    failed = "Model architectures ['Qwen2VLForConditionalGeneration'] failed to be inspected. Please check the logs."
    assert missing_package(ValueError(failed)) is None
    monkeypatch.setattr(importlib, "import_module", fail)
    missing = "torchvision"
    assert missing_package(ValueError(failed)) == (
        "Qwen2VLForConditionalGeneration needs the package torchvision, which is not installed"
    )
    assert missing_package(ValueError("max_model_len 'Qwen2VLForConditionalGeneration' is too large")) is None
    assert missing_package(ValueError(failed.replace("Qwen2VL", "Nobody"))) is None
