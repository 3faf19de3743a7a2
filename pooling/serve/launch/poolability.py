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
from tokenpool.serve.launch.plugged_formats import check_format

_OUTSIDE = "serve it with plain vLLM outside the pool"

DRAFTERS = ("ngram", "draft_model", "eagle", "eagle3", "medusa", "mtp")
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
    for present, feature, hint in _features(config):
        if present:
            raise ModelRefusedError(name, feature, hint)
    check_format(name, config)
    if config.speculative_config is not None:
        _check_drafter(name, config)


def _features(config: Any) -> list[tuple[bool, str, str]]:
    """Whether a config has a feature, what of it is against a pool, and what serves instead."""
    parallel, model = config.parallel_config, config.model_config
    context = max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size)
    return [
        (
            config.kv_transfer_config is not None,
            "a KV connector, which would copy blocks that the pool may have moved",
            "remove it: host_memory keeps KV, and the hosts of a cluster hand it over to one another",
        ),
        (
            config.cache_config.kv_offloading_size is not None,
            "KV offloading, which would copy blocks that the pool may have moved",
            "remove it: host_memory of the pool keeps KV of all models",
        ),
        (config.ec_transfer_config is not None, "an EC connector, which was not tried in a pool", _OUTSIDE),
        (
            parallel.pipeline_parallel_size > 1,
            "pipeline parallelism, whose stages run several steps at once where the pool changes models between two",
            "use --tensor-parallel-size",
        ),
        (
            parallel.tensor_parallel_size > 1 and not current_platform.is_cpu(),
            "tensor parallelism (on the CPU only yet)",
            _OUTSIDE,
        ),
        (parallel.data_parallel_size > 1, "data parallelism", "let more hosts of a cluster serve the model"),
        (context > 1, "context parallelism, which spreads the KV of a request over several devices", _OUTSIDE),
        (
            model.enable_sleep_mode,
            "sleep mode, which the pool replaces: weights leave the device when others need it",
            "remove --enable-sleep-mode",
        ),
        (
            config.weight_transfer_config is not None,
            "weight transfer, whose weights would be lost when the model leaves the device",
            "load the new checkpoint as another model, or serve it with plain vLLM outside the pool",
        ),
        (
            _offloads(getattr(config, "offload_config", None)),
            "offloading of weights, which vLLM has once per process",
            "remove it: with weights: movable the pool moves weights by itself",
        ),
    ]


def _offloads(offload: Any) -> bool:
    return offload is not None and (offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0)


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
