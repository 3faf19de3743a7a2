# SPDX-License-Identifier: Apache-2.0
"""From a pool's settings to what is started: checked engine configs and a memory budget. Loads no weights."""

from __future__ import annotations

import copy
import logging
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import propagate_flash_late_interaction
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext

from tokenpool.access_config import is_path
from tokenpool.config import ModelSpec, PoolConfig
from tokenpool.errors import ConfigError, PoolError, config_errors_under, show
from tokenpool.host.hosted_core import EngineAddresses
from tokenpool.host.hosted_model import HostConfig, HostedModelSpec
from tokenpool.memory.device_nvml import read_gpu
from tokenpool.memory.system_memory import system_memory
from tokenpool.policy.turns import load_turn_policy
from tokenpool.serve.checkpoint import checkpoint_bytes
from tokenpool.serve.flag_table import POOL_SETTINGS
from tokenpool.serve.flags import changed_flags, parse_serve_flags, spell_out
from tokenpool.serve.names import check_names
from tokenpool.serve.poolability import check_config, check_flags, check_media, check_words
from tokenpool.serve.port_flags import settle_logging, share_port_flags
from tokenpool.serve.start_checks import check_start
from tokenpool.serve.tls import check_tls
from tokenpool.units import format_bytes, format_count

logger = logging.getLogger(__name__)

_AUTO_CPU_FRACTION = 0.5
_AUTO_HOST_FRACTION = 0.25
_WEIGHT_FORMATS = ("auto", "hf", "safetensors", "pt")
"""Values of --load-format that read the usual weight files."""
_KV_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"


@dataclass(slots=True)
class ModelPlan:
    """One model that can be pooled."""

    spec: ModelSpec
    args: Namespace
    """vLLM's parsed serve flags; its app is built from them."""
    weight_bytes: int
    """Size of a local checkpoint's weights, of each rank its share; 0 when the model is not a local folder."""
    checked: VllmConfig | None = None
    """The engine config that was checked, to be read and not changed; None for a model added at run time."""
    for_tenants: bool = False
    """Whether tenants use it, who are not to have any address fetched from here."""

    @property
    def num_ranks(self) -> int:
        """Ranks that the model runs on."""
        return self.args.tensor_parallel_size

    def engine_config(self) -> VllmConfig:
        """A fresh engine config, which an engine may change; raises ConfigError of one line.

        It shares no object with the flags or with another config. What vLLM makes of the flags here stays in them:
        its frontend reads the reasoning parser there.
        """
        try:
            engine_args = AsyncEngineArgs.from_cli_args(self.args)
            propagate_flash_late_interaction(self.args, engine_args)
            config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        except PoolError:
            raise
        except Exception as error:  # vLLM raises many kinds for a bad model or flag; all mean "does not start"
            raise ConfigError(first_line(error), key=f"model {self.spec.name!r}") from error
        check_config(self.spec.name, config)
        if self.for_tenants:
            check_media(self.spec.name, config.model_config)
        return copy.deepcopy(config)

    def for_host(
        self, config: VllmConfig, addresses: EngineAddresses | None = None, *, log_stats: bool | None = None
    ) -> HostedModelSpec:
        """What a host is told of the model; `log_stats` is by its flags if not given."""
        return HostedModelSpec(
            name=self.spec.name,
            vllm_config=config,
            addresses=addresses,
            slo=self.spec.slo,
            priority=self.spec.priority,
            weight_bytes=self.weight_bytes,
            log_stats=not self.args.disable_log_stats if log_stats is None else log_stats,
        )


def plan_model(spec: ModelSpec, for_tenants: bool = False) -> ModelPlan:
    """Parse a model's flags and refuse what cannot be pooled; raises ConfigError or ModelRefusedError."""
    path = Path(os.path.expanduser(spec.model))
    if is_path(spec.model) and not os.path.exists(path):
        raise ConfigError(f"missing path {spec.model}: correct it, or give a Hugging Face id", key="model")
    with config_errors_under(source=f"model {spec.name!r}"):
        if any(word.partition("=")[0] == "--model" for word in spec.args):
            raise ConfigError("is what `model` says: remove the flag", key="--model")
        words = spell_out([spec.model, *spec.args])
        given = {word.partition("=")[0] for word in words}
        for flag, key in POOL_SETTINGS.items():
            if flag in given:
                raise ConfigError(f"is a setting of the pool: give {key} for the whole pool", key=flag)
        check_words(spec.name, given)
        if "--served-model-name" not in given:
            words += ["--served-model-name", spec.name]
        args = parse_serve_flags(words)
        weight_bytes = checkpoint_bytes(path)
        if args.load_format in _WEIGHT_FORMATS and path.is_dir() and not weight_bytes:
            raise ConfigError(f"{path} has no weights", key="model")
    check_flags(spec.name, args)
    if "--gpu-memory-utilization" in changed_flags(args):
        logger.warning("--gpu-memory-utilization has no effect model=%s: device_memory is for all models", spec.name)
    args.api_key = None  # keys are checked once, in front of all models
    settle_logging(args)
    for flags in (args, args.structured_outputs_config):
        if flags.reasoning_parser_plugin.endswith(".py"):  # vLLM's engine takes a path that begins with . for a package
            flags.reasoning_parser_plugin = os.path.abspath(flags.reasoning_parser_plugin)
    return ModelPlan(spec, args, -(-weight_bytes // args.tensor_parallel_size), for_tenants=for_tenants)


def plan_added(spec: ModelSpec, others: Sequence[ModelPlan], for_tenants: bool = False) -> ModelPlan:
    """Plan a model for a pool that runs, whose other models tell the flags of the port; raises PoolError."""
    plan = plan_model(spec, for_tenants)
    if others:
        share_port_flags(plan, others[0])
    check_start(spec.name, plan.args)
    return plan


def plan_pool(config: PoolConfig) -> tuple[PoolConfig, list[ModelPlan]]:
    """Plan every model and the budget; returns the config with `device_memory` set."""
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        raise PoolError(f"device {current_platform.device_name} is not supported: install tokenpool[cpu] or [cuda]")
    _kv_of_the_environment()  # vLLM reads it too, and says less when it is wrong
    plans = [plan_model(spec, bool(config.tenants)) for spec in config.models]
    check_names(plans)
    _check_ranks(plans)
    with config_errors_under(source=f"model {plans[0].spec.name!r}"):
        check_tls(plans[0].args)
    for plan in plans:
        share_port_flags(plan, plans[0])
        check_start(plan.spec.name, plan.args)
        plan.checked = plan.engine_config()
    if config.device_memory is None:
        config = replace(config, device_memory=_auto_device_memory(config, plans))
    elif current_platform.is_cpu() and os.environ.get(_KV_VARIABLE):
        logger.warning("%s has no effect: device_memory is given", _KV_VARIABLE)
    if config.host_memory is None:
        config = replace(config, host_memory=_share_of_memory(_AUTO_HOST_FRACTION))
    if config.weights == "auto":
        config = replace(config, weights="fixed" if _pages_for_all(config, plans) <= _pages(config) else "movable")
    if config.scheduling.policy == "auto":
        policy = "slack" if config.weights == "movable" else "round_robin"
        config = replace(config, scheduling=replace(config.scheduling, policy=policy))
    load_turn_policy(config.scheduling.policy, dict(config.scheduling.options))  # refuses a wrong name or option
    _check_budget(config, plans)
    return config, plans


def host_config(config: PoolConfig, plans: list[ModelPlan]) -> HostConfig:
    """What the host is given of a planned pool."""
    assert config.device_memory is not None and config.host_memory is not None
    return HostConfig(
        device_memory=config.device_memory,
        page_size=config.page_size,
        kv_floor_pages=config.kv_floor_pages,
        policy=config.scheduling.policy,
        policy_options=config.scheduling.options,
        movable_weights=config.weights == "movable",
        host_memory=config.host_memory,
        tensor_parallel_size=plans[0].num_ranks,
        cpu_link=config.cpu_link,
        host_timeout_s=config.host_timeout_s,
        load_timeout_s=config.load_timeout_s,
    )


def _auto_device_memory(config: PoolConfig, plans: list[ModelPlan]) -> int:
    asked = [plan.args.kv_cache_memory_bytes for plan in plans]
    if kv_bytes := _kv_of_the_environment() or (sum(asked) if all(asked) else 0):
        return kv_bytes + _pages_for_all(config, plans) * config.page_size
    if current_platform.is_cuda():
        return read_gpu(current_platform.get_device_uuid()).budget_bytes()
    return _share_of_memory(_AUTO_CPU_FRACTION)


def _kv_of_the_environment() -> int:
    """KV of all models together, by vLLM's variable for CPUs; 0 if it says nothing. It wins over flags, as there."""
    text = os.environ.get(_KV_VARIABLE, "")
    if not text or not current_platform.is_cpu():
        return 0
    if not text.strip().isdecimal():
        raise ConfigError(f"{show(text)} is no whole number of GiB", key=_KV_VARIABLE)
    return int(text) << 30


def _share_of_memory(fraction: float) -> int:
    """A share of what the machine, or this process' container, has left; a byte where that is nothing."""
    return max(1, int(system_memory().available_bytes * fraction))


def _check_ranks(plans: list[ModelPlan]) -> None:
    sizes = {plan.spec.name: plan.num_ranks for plan in plans}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ConfigError(f"models of one pool need the same, here {listed}: serve the others in a pool of their own",
                          key="--tensor-parallel-size")


def _needed_pages(config: PoolConfig, plan: ModelPlan) -> int:
    return -(-plan.weight_bytes // config.page_size) + config.kv_floor_pages


def _pages(config: PoolConfig) -> int:
    assert config.device_memory is not None
    return config.device_memory // config.page_size


def _pages_for_all(config: PoolConfig, plans: list[ModelPlan]) -> int:
    return sum(_needed_pages(config, plan) for plan in plans) + 1  # one page for null blocks


def _check_budget(config: PoolConfig, plans: list[ModelPlan]) -> None:
    assert config.device_memory is not None and config.host_memory is not None
    if config.weights == "fixed":
        needed, what = _pages_for_all(config, plans), f"the weights of {format_count(len(plans), 'model')}"
        fix = "raise it, lower page_size, serve fewer models, or let weights move (weights: movable)"
    else:
        largest = max(plans, key=lambda plan: plan.weight_bytes)
        needed, what = _needed_pages(config, largest) + 1, f"the weights of model {largest.spec.name!r}"
        fix = "raise it, or lower page_size"
        if largest.weight_bytes > config.host_memory:
            raise ConfigError(
                f"{format_bytes(config.host_memory)} is too little: {what} take "
                f"{format_bytes(largest.weight_bytes)} of it; raise it",
                key="host_memory",
            )
    if needed > _pages(config):
        raise ConfigError(
            f"{format_bytes(config.device_memory)} is too little: {what} and {config.kv_floor_pages} KV page each "
            f"need {format_bytes(needed * config.page_size)}; {fix}",
            key="device_memory",
        )


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Pydantic's first line only counts the errors; the third says what is wrong.
    if lines and "validation error" in lines[0] and len(lines) > 1:
        lines = lines[-2:] if lines[-1].startswith("For further") else lines[1:]
    return lines[0] if lines else type(error).__name__
