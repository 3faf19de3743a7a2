# SPDX-License-Identifier: Apache-2.0
"""Refuse by name, before anything loads, what cannot be pooled yet."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Set
from typing import Any

from vllm.platforms import current_platform

from tokenpool.errors import ModelRefusedError
from tokenpool.serve.launch.flag_table import REFUSED
from tokenpool.serve.launch.flags import changed_flags

_OUTSIDE = "serve it with plain vLLM outside the pool"

DRAFTERS = ("ngram", "draft_model", "eagle", "medusa", "mtp")
"""Methods of speculative decoding that can be pooled, by vLLM's names."""

_ONLY_ASKED_FOR = ("--grpc-port", "--data-parallel-multi-port-external-lb")
"""Refused flags about which vLLM's parser has something else to say."""


def check_words(name: str, flags: Set[str]) -> None:
    """Refuse, by the flags that are given, what vLLM's parser would refuse in misleading words."""
    for flag in _ONLY_ASKED_FOR:
        if flag in flags:
            raise _refusal(name, flag)


def check_flags(name: str, args: Namespace) -> None:
    """Refuse flags that would have no effect in a pool; raises ModelRefusedError that names the first."""
    for flag in changed_flags(args):
        if flag in REFUSED and (flag, args.api_server_count) != ("--api-server-count", 1):
            raise _refusal(name, flag)


def _refusal(name: str, flag: str) -> ModelRefusedError:
    return ModelRefusedError(name, f"{flag} ({REFUSED[flag].replace('`', '')})", "remove the flag")


def check_config(name: str, config: Any) -> None:
    """Refuse engine features that two engines of one process cannot share; `config` is a VllmConfig.

    Flags that ask for them are refused before; this is for what the model's own files ask for.
    """
    parallel, model = config.parallel_config, config.model_config
    refused = {
        "a KV connector": config.kv_transfer_config is not None,
        "an EC connector": config.ec_transfer_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "tensor parallelism (on the CPU only yet)": parallel.tensor_parallel_size > 1 and not current_platform.is_cpu(),
        "data parallelism": parallel.data_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        "sleep mode, which the pool replaces": model.enable_sleep_mode,
        "weight transfer (an eviction would lose it)": config.weight_transfer_config is not None,
        "KV offloading": config.cache_config.kv_offloading_size is not None,
    }
    for feature, present in refused.items():
        if present:
            raise ModelRefusedError(name, feature, _OUTSIDE)
    if config.speculative_config is not None:
        _check_drafter(name, config)


def _check_drafter(name: str, config: Any) -> None:
    method = config.speculative_config.method
    if method not in DRAFTERS:
        hint = f"choose one of {', '.join(DRAFTERS)}"
        raise ModelRefusedError(name, f"speculative decoding by {method}, which was not tried in a pool", hint)
    if config.parallel_config.tensor_parallel_size > 1:
        feature = "speculative decoding with tensor parallelism, which was not tried in a pool"
        raise ModelRefusedError(name, feature, "remove --speculative-config or --tensor-parallel-size")
    if config.model_config.has_inner_state and current_platform.is_cpu():
        feature = (
            "speculative decoding of a model whose layers keep a state, for which vLLM on the CPU gives other tokens "
            "than without a drafter"
        )
        raise ModelRefusedError(name, feature, "remove --speculative-config")


def check_media(name: str, config: Any) -> None:
    """Refuse a multimodal model that fetches any address a tenant names; `config` is vLLM's ModelConfig."""
    media = config.multimodal_config
    if media is not None and not media.language_model_only and not config.allowed_media_domains:
        raise ModelRefusedError(
            name, "with tenants, a multimodal model would fetch any address that one of them names",
            "give --allowed-media-domains HOST [HOST ...] (for none, none.invalid: data: URLs pass), or "
            "--language-model-only",
        )  # fmt: skip
