# SPDX-License-Identifier: Apache-2.0
"""From a pool's settings to what is started: checked engine configs and a memory budget. Loads no weights."""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from tokenpool.access_config import is_path
from tokenpool.config import ModelSpec, PoolConfig
from tokenpool.errors import ConfigError, PoolError, config_errors_under
from tokenpool.memory.devices.nvml import NO_GPU, read_gpu, uuid_of_gpu
from tokenpool.memory.page_counts import needed_pages
from tokenpool.memory.system_memory import system_memory
from tokenpool.policy.turns import load_turn_policy
from tokenpool.serve.launch.checkpoint import checkpoint_bytes
from tokenpool.serve.launch.flag_table import POOL_SETTINGS
from tokenpool.serve.launch.flags import changed_flags, parse_serve_flags, spell_out
from tokenpool.serve.launch.model_plan import ModelPlan
from tokenpool.serve.launch.names import check_names
from tokenpool.serve.launch.plugged_formats import check_formats
from tokenpool.serve.launch.poolability import check_flags, check_words
from tokenpool.serve.launch.port_flags import settle_logging, share_port_flags
from tokenpool.serve.launch.start_checks import check_start, draft_model_of
from tokenpool.serve.launch.tls import check_tls
from tokenpool.serve.launch.weight_sizes import device_bytes
from tokenpool.settings import CPU_KV_BYTES
from tokenpool.units import format_bytes, format_count
from tokenpool.wire.spec import HostConfig

logger = logging.getLogger(__name__)

_AUTO_CPU_FRACTION = 0.5
_AUTO_HOST_FRACTION = 0.25
_WEIGHT_FORMATS = ("auto", "hf", "safetensors", "pt")
"""Values of --load-format that read the usual weight files."""


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
        args = parse_serve_flags(words)
        if "--served-model-name" not in given:
            args.served_model_name = [spec.name]
        check_formats(spec.name, args, draft_model_of(args))
        weight_bytes = checkpoint_bytes(path)
        if args.load_format in _WEIGHT_FORMATS and path.is_dir() and not weight_bytes:
            raise ConfigError(f"{path} has no weights", key="model")
        weight_bytes += _draft_bytes(args)
    check_flags(spec.name, args)
    if "--gpu-memory-utilization" in changed_flags(args):
        logger.warning("--gpu-memory-utilization has no effect model=%s: device_memory is for all models", spec.name)
    args.api_key = None  # keys are checked once, in front of all models
    settle_logging(args)
    for flags in (args, args.structured_outputs_config):
        if flags.reasoning_parser_plugin.endswith(".py"):  # vLLM's engine takes a path that begins with . for a package
            flags.reasoning_parser_plugin = os.path.abspath(flags.reasoning_parser_plugin)
    return ModelPlan(spec, args, -(-weight_bytes // args.tensor_parallel_size), for_tenants=for_tenants)


def _draft_bytes(args: Namespace) -> int:
    """Size of the weights of a draft model that is a local folder; raises ConfigError if they cannot be read."""
    drafter = draft_model_of(args)
    if drafter is None:
        return 0
    try:
        return checkpoint_bytes(Path(os.path.expanduser(drafter)))
    except ConfigError as error:
        raise ConfigError(error.problem, key="--speculative-config") from error


def plan_added(spec: ModelSpec, others: Sequence[ModelPlan], for_tenants: bool = False) -> ModelPlan:
    """Plan a model for a pool that runs, whose other models tell the flags of the port; raises PoolError."""
    plan = plan_model(spec, for_tenants)
    if others:
        share_port_flags(plan, others[0])
    check_start(spec.name, plan.args)
    return plan


def plan_pool(
    config: PoolConfig, on_first: Callable[[VllmConfig], None] | None = None, *, thorough: bool = False
) -> tuple[PoolConfig, list[ModelPlan]]:
    """Plan every model and the budget; returns the config with `device_memory` set.

    `on_first` is given the engine config of the first model before the others are planned. That of a model that is
    loaded on demand is made when it is loaded, unless the plan is to be `thorough`.
    """
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        if current_platform.is_unspecified():
            raise PoolError(NO_GPU)
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
        if thorough or plan is plans[0] or config.loading_of(plan.spec).at_start:
            plan.checked = plan.engine_config()
            plan.weight_bytes = device_bytes(plan.weight_bytes, Path(os.path.expanduser(plan.spec.model)), plan.checked)
            if on_first is not None and plan is plans[0]:
                on_first(plan.checked)
    if config.device_memory is None:
        config = replace(config, device_memory=_auto_device_memory(config, plans))
    elif current_platform.is_cpu() and CPU_KV_BYTES.get():
        logger.warning("%s has no effect: device_memory is given", CPU_KV_BYTES.name)
    if config.host_memory is None:
        config = replace(config, host_memory=_share_of_memory(_AUTO_HOST_FRACTION))
    if config.weights == "auto":
        config = replace(
            config,
            weights="fixed" if _pages_together(config, _together(config, plans)) <= _pages(config) else "movable",
        )
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
        host_store="" if config.host_store == "private" else config.host_store,
        tensor_parallel_size=plans[0].num_ranks,
        cpu_link=config.cpu_link,
        host_timeout_s=config.host_timeout_s,
        load_timeout_s=config.load_timeout_s,
    )


def describe_plan(config: PoolConfig, plans: list[ModelPlan]) -> str:
    """The plan in a few lines for people."""
    assert config.device_memory is not None
    memory = f"device memory {format_bytes(config.device_memory)} in pages of {format_bytes(config.page_size)}"
    lines = [f"{memory}, weights {config.weights}"]
    if config.weights == "movable" and config.host_memory is not None:
        lines[0] += f", host memory {format_bytes(config.host_memory)}"
    for item in plans:
        weights = format_bytes(item.weight_bytes) if item.weight_bytes else "weights of unknown size"
        slo = f", ttft {item.spec.slo.ttft_s:g} s, tpot {item.spec.slo.tpot_s:g} s" if item.spec.slo else ""
        lines.append(f"  {item.spec.name}: {item.spec.model}, {weights}{slo}")
    total = sum(item.weight_bytes for item in plans)
    if config.weights == "movable" and config.host_memory is not None and total > config.host_memory:
        lines.append(
            f"  host memory is less than the {format_bytes(total)} of all weights: models take turns in it, "
            "and are read from disk before their turn"
        )
    lines.append("ok")
    return "\n".join(lines)


def _auto_device_memory(config: PoolConfig, plans: list[ModelPlan]) -> int:
    asked = [plan.args.kv_cache_memory_bytes for plan in plans]
    if kv_bytes := _kv_of_the_environment() or (sum(asked) if all(asked) else 0):
        return kv_bytes + _pages_together(config, plans) * config.page_size
    if current_platform.is_cuda():
        return read_gpu(uuid_of_gpu(current_platform)).budget_bytes()
    return _share_of_memory(_AUTO_CPU_FRACTION)


def _kv_of_the_environment() -> int:
    """KV of all models together, by vLLM's variable for CPUs; 0 if it says nothing. It wins over flags, as there."""
    return (current_platform.is_cpu() and CPU_KV_BYTES.get()) or 0


def _share_of_memory(fraction: float) -> int:
    """A share of what the machine, or this process' container, has left; a byte where that is nothing."""
    return max(1, int(system_memory().available_bytes * fraction))


def _check_ranks(plans: list[ModelPlan]) -> None:
    sizes = {plan.spec.name: plan.num_ranks for plan in plans}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ConfigError(
            f"models of one pool need the same, here {listed}: serve the others in a pool of their own",
            key="--tensor-parallel-size",
        )


def _pages(config: PoolConfig) -> int:
    assert config.device_memory is not None
    return config.device_memory // config.page_size


def _together(config: PoolConfig, plans: list[ModelPlan]) -> list[ModelPlan]:
    """Those that may be loaded at the same time, if `max_loaded` says how many: the largest ones."""
    by_size = sorted(plans, key=lambda plan: (config.loading_of(plan.spec).at_start, plan.weight_bytes), reverse=True)
    return by_size[: config.max_loaded]


def _pages_together(config: PoolConfig, plans: list[ModelPlan]) -> int:
    return needed_pages((plan.weight_bytes for plan in plans), config.page_size, config.kv_floor_pages)


def _check_budget(config: PoolConfig, plans: list[ModelPlan]) -> None:
    assert config.device_memory is not None and config.host_memory is not None
    if config.weights == "fixed":
        together = _together(config, plans)
        needed, what = _pages_together(config, together), f"the weights of {format_count(len(together), 'model')}"
        fix = "raise it, lower page_size, serve fewer models, or let weights move (weights: movable)"
    else:
        largest = max(plans, key=lambda plan: plan.weight_bytes)
        kept = [plan for plan in plans if plan.spec.keep == "device"]
        together = kept if largest in kept else [*kept, largest]
        needed, what = _pages_together(config, together), f"the weights of model {largest.spec.name!r}"
        what += f" beside {format_count(len(kept), 'model')} kept on the device" if kept else ""
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
