# SPDX-License-Identifier: Apache-2.0
"""Makes hosts and models of a simulation: real EngineHosts, real engine configs, and grammars that allow all tokens."""

from __future__ import annotations

import copy
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from tests.helpers.plain import ENV

os.environ.update(ENV)

import torch
from transformers import LlamaConfig
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputBackend, StructuredOutputGrammar

from tests.dst.oracle import VOCAB, ModelFacts
from tests.dst.scenario import PAGE, ModelPlan, RequestPlan, Scenario
from tests.dst.stub_engine import LAYERS_PER_GROUP, executor_for
from tests.dst.world import World, weights_sum
from tokenpool.config import SLO
from tokenpool.host.engine_host import EngineHost
from tokenpool.wire.budget import BudgetState
from tokenpool.wire.continued_request import ContinuedRequest
from tokenpool.wire.spec import HostConfig, HostedModelSpec

_BACKEND = "xgrammar"


class _Grammar(StructuredOutputGrammar):
    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        return True

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        return tokens

    def rollback(self, num_tokens: int) -> None:
        pass

    def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None:
        pass

    def is_terminated(self) -> bool:
        return False

    def reset(self) -> None:
        pass


class _Grammars(StructuredOutputBackend):
    def __init__(self) -> None:
        pass

    def compile_grammar(self, request_type: Any, grammar_spec: str, **_: Any) -> StructuredOutputGrammar:
        return _Grammar()

    def allocate_token_bitmask(self, max_num_seqs: int) -> torch.Tensor:
        return torch.full((max_num_seqs, VOCAB // 32), -1, dtype=torch.int32)

    def destroy(self) -> None:
        pass


@cache
def _template(folder: Path) -> VllmConfig:
    """A config that vLLM made, to be copied: making one takes as long as a short simulation."""
    place = folder / "config"
    place.mkdir(exist_ok=True)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=256,
        architectures=["LlamaForCausalLM"],
    )
    (place / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    args = dict(enforce_eager=True, dtype="float32", block_size=32, kv_cache_memory_bytes=1 << 20, max_model_len=64)
    return EngineArgs(model=str(place), skip_tokenizer_init=True, **args).create_engine_config()


def make_config(plan: ModelPlan, world: World, async_scheduling: bool) -> VllmConfig:
    """The engine config of a model, its own."""
    config = copy.deepcopy(_template(world.folder))
    config.model_config.model = str(world.folder / f"checkpoint-{plan.checkpoint}")
    config.model_config.max_model_len = plan.max_model_len
    config.cache_config.block_size = plan.block_size
    config.cache_config.enable_prefix_caching = plan.prefix_caching
    scheduler = config.scheduler_config
    scheduler.max_model_len, scheduler.max_num_seqs = plan.max_model_len, plan.max_num_seqs
    scheduler.max_num_batched_tokens = max(plan.max_num_batched_tokens, plan.max_num_seqs)
    scheduler.max_num_scheduled_tokens = scheduler.max_num_batched_tokens
    scheduler.enable_chunked_prefill = True
    scheduler.async_scheduling = async_scheduling
    return config


def make_spec(plan: ModelPlan, world: World, scenario: Scenario) -> HostedModelSpec:
    """A model for `EngineHost.add_model`, whose stub finds its facts in the world."""
    facts = ModelFacts(plan.name, plan.checkpoint, weights_sum(plan.checkpoint), plan.windows)
    world.facts[plan.name] = facts
    slo = SLO(*plan.slo) if plan.slo else None
    config = make_config(plan, world, scenario.async_scheduling)
    return HostedModelSpec(plan.name, config, slo=slo, weight_bytes=plan.weight_bytes)


def num_pages(scenario: Scenario) -> int:
    """Pages that hold the weights which must be there at a time and one request of full length, and what is spare."""
    needs, weights = [], []
    for plan in scenario.models:
        block_bytes = LAYERS_PER_GROUP * 2 * plan.block_size * scenario.head_size * 4
        blocks = len(plan.windows) * (-(-plan.max_model_len // plan.block_size) + 1)
        needs.append(-(-blocks // max(1, PAGE // block_bytes - 1)))
        weights.append(-(-plan.weight_bytes // PAGE) + 1)
    floors = len(scenario.models)
    if scenario.movable:
        most = max(need + held for need, held in zip(needs, weights, strict=True))
        return most + floors + 2 + scenario.spare_pages
    return sum(weights) + max(needs) + floors + 2 + scenario.spare_pages


def host_memory_of(scenario: Scenario) -> int:
    """Host memory in bytes, before anybody changes it."""
    return int(scenario.host_memory_frac * sum(plan.weight_bytes for plan in scenario.models))


def make_host(world: World, scenario: Scenario, budget: BudgetState | None = None) -> EngineHost:
    """A fresh host without models, with the budget that the one before it had."""
    config = HostConfig(
        num_pages(scenario) * PAGE,
        PAGE,
        policy=scenario.policy,
        movable_weights=scenario.movable,
        host_memory=budget.host_memory if budget else host_memory_of(scenario),
        device_budget=budget.device_memory if budget else None,
    )
    return EngineHost(
        config, device=world.device, poison=True, executor_class=executor_for(world), copy_engine=world.copy_engine()
    )


def add_model(host: EngineHost, world: World, plan: ModelPlan, scenario: Scenario) -> None:
    """Add a model, whose grammars are compiled when the world says; raises PoolError."""
    hosted = host.add_model(make_spec(plan, world, scenario))
    manager = hosted.core.structured_output_manager
    manager.executor, manager.backend = world.grammars, _Grammars()
    of_all = copy.copy(manager)
    of_all.__class__ = StructuredOutputManager
    manager.managers = {_BACKEND: of_all}
    step_once = hosted.core.step_once

    def watched(**kwargs: Any) -> bool:
        world.faults.in_step = True
        try:
            return step_once(**kwargs)
        finally:
            world.faults.in_step = False

    hosted.core.step_once = watched


def make_request(plan: RequestPlan, arrival_s: float, delivered: list[int]) -> EngineCoreRequest:
    """The request as a frontend sends it; one that lost its host has the tokens that its client has."""
    params = SamplingParams(temperature=0.0, max_tokens=plan.max_tokens, ignore_eos=True)
    if plan.structured:
        params.structured_outputs = StructuredOutputsParams(regex="x*")
        params.structured_outputs._backend = _BACKEND
    fields = dict(
        request_id=plan.request_id,
        prompt_token_ids=list(plan.prompt),
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=arrival_s,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        client_index=plan.client,
    )
    return ContinuedRequest(**fields, delivered_token_ids=delivered) if delivered else EngineCoreRequest(**fields)
