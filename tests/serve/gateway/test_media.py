# SPDX-License-Identifier: Apache-2.0
"""What a client's URL makes the server fetch: no redirects, and with tenants only from hosts that were named."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tokenpool.config import ModelSpec, PoolConfig
from tokenpool.errors import ModelRefusedError

pytestmark = pytest.mark.vllm

HASH = "sha256:" + "0" * 64


def model_config(domains: list[str] | None, *, is_multimodal: bool = True, text_only: bool = False) -> Any:
    media = SimpleNamespace(language_model_only=text_only) if is_multimodal else None
    return SimpleNamespace(multimodal_config=media, allowed_media_domains=domains)


def test_tenants_name_no_address_of_their_own() -> None:
    """A multimodal model without named hosts is refused; one that takes no media, or is of text, is not."""
    from tokenpool.serve.launch.poolability import check_media

    for domains in (None, []):
        with pytest.raises(ModelRefusedError, match="--allowed-media-domains HOST"):
            check_media("a", model_config(domains))
    check_media("a", model_config(["example.com"]))
    check_media("a", model_config(None, text_only=True))
    check_media("a", model_config(None, is_multimodal=False))


@pytest.mark.parametrize("tenants", [[], [{"name": "t", "keys": HASH}]])
def test_a_pool_with_tenants_asks_it_of_every_model(tenants: Any, monkeypatch: Any, tiny_models: Any) -> None:
    """At the start and when a model is added; a pool without tenants is as plain vLLM is."""
    from tokenpool.serve.launch import launch_plan, model_plan

    asked: list[str] = []
    monkeypatch.setattr(model_plan, "check_media", lambda name, config: asked.append(name))
    model = {"name": "llama", "model": str(tiny_models.path("llama")), "args": "--max-model-len 128"}
    memory = {"device_memory": "64MiB", "page_size": "1MiB"}
    launch_plan.plan_pool(PoolConfig.from_dict({"models": [model], "tenants": tenants, **memory}))
    assert ["llama"] * len(tenants) == asked
    launch_plan.plan_model(ModelSpec("more", model["model"], ("--max-model-len", "128")), bool(tenants)).engine_config()
    assert ["llama", "more"] * len(tenants) == asked


@pytest.mark.parametrize("said", [None, "1"])
def test_redirects_are_off_unless_somebody_says_otherwise(said: str | None, monkeypatch: Any, tmp_path: Path) -> None:
    """`tokenpool serve` says so before vLLM is there to read it."""
    from tokenpool import patches
    from tokenpool.cli.main import run

    class _StopError(Exception):
        pass

    def stop() -> None:
        raise _StopError

    monkeypatch.setattr(patches, "apply_all", stop)  # what comes after everything that vLLM reads at import
    for name in ("PROMETHEUS_MULTIPROC_DIR", "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH", "VLLM_MEDIA_URL_ALLOW_REDIRECTS"):
        monkeypatch.setenv(name, said or "")
    if said is None:
        monkeypatch.delenv("VLLM_MEDIA_URL_ALLOW_REDIRECTS")
    monkeypatch.setattr("tempfile.mkdtemp", lambda prefix: str(tmp_path))
    with pytest.raises(_StopError):
        run(["serve", "org/a"])

    assert (said or "0") == os.environ["VLLM_MEDIA_URL_ALLOW_REDIRECTS"]
