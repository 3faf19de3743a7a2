# SPDX-License-Identifier: Apache-2.0
"""Two models of a pool share nothing that can change: no flag of one model changes another's answer."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.devices.object_graph import shared_objects, snapshot
from tokenpool.config import ModelSpec, PoolConfig
from tokenpool.errors import ConfigError, PoolError
from tokenpool.serve.launch.flags import _serve_parser, parse_serve_flags
from tokenpool.serve.launch.launch_plan import plan_model, plan_pool
from tokenpool.serve.launch.model_plan import ModelPlan

pytestmark = pytest.mark.vllm


def plan(model: Path, *words: str, name: str = "a") -> ModelPlan:
    return plan_model(ModelSpec(name=name, model=str(model), args=("--max-model-len", "512", *words)))


def config_of(plan: ModelPlan) -> dict[str, str]:
    """A config of the model, without the name that vLLM gives to each."""
    config = plan.engine_config()
    config.instance_id = ""
    return snapshot(config)


def words_of(action: argparse.Action) -> tuple[str, ...] | None:
    """A use of the flag with a value that is not its default, where its declaration says one."""
    flag = max(action.option_strings, key=len)
    if action.nargs == 0:
        return (flag,)
    if action.choices:
        other = [str(choice) for choice in action.choices if choice != action.default]
        return (flag, other[-1]) if other else None
    if action.dest.endswith("_config") or isinstance(action.default, dict):
        return (flag, "{}")
    if isinstance(action.default, bool) or action.dest.endswith("plugin"):
        return None  # the first are flags of two names that are tried as such; plugins are files
    if isinstance(action.default, int | float):
        return (flag, str(type(action.default)(2)))
    return (flag, "2")


def uses() -> Iterator[tuple[str, ...]]:
    """Each flag of `vllm serve` once, and once more those that vLLM writes into an object that others may have."""
    actions = [action for action in _serve_parser()._actions if action.option_strings]
    yield from filter(None, map(words_of, actions))
    yield ("--reasoning-parser", "granite")
    yield ("--reasoning-parser", "deepseek_r1")
    yield ("--enforce-eager", "--compilation-config.custom_ops", '["none"]')
    yield ("--structured-outputs-config", '{"backend": "guidance"}')
    yield ("--structured-outputs-config.reasoning_parser", "granite")
    yield ("--enable-lora", "--max-loras", "2")
    yield ("--limit-mm-per-prompt", '{"image": 1}')
    yield ("--hf-overrides", '{"rope_theta": 5.0}')


def test_no_flag_of_one_model_changes_the_config_of_another(tiny_models, monkeypatch) -> None:
    """Whatever flag a model has, and whether it is accepted, the flags and configs of the others stay as they were."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # some values are names of models
    model = tiny_models.path("llama")
    other = plan(model)
    flags, config = snapshot(other.args), config_of(other)
    written = snapshot(other.args)  # once vLLM has made a config of them
    accepted = 0
    for words in uses():
        try:
            plan(model, *words, name="b").engine_config()
            accepted += 1
        except PoolError:
            pass
        assert written == snapshot(other.args), f"{words} of another model changed the flags of this one"
        assert flags == snapshot(plan(model).args), f"{words} changed the flags of the next model"
    assert accepted > 150
    assert config == config_of(other)
    assert config == config_of(plan(model))


def test_no_two_configs_share_an_object_that_can_change(tiny_models) -> None:
    """Flags, checked configs and configs for engines: of the models of a pool, of one model made twice, and of equal
    models; without exception."""
    models = [(kind, name) for kind in ("llama", "qwen3_moe") for name in ("a", "b")]
    specs = tuple(
        ModelSpec(name=f"{kind}-{name}", model=str(tiny_models.path(kind)), args=("--max-model-len", "512"))
        for kind, name in models
    )
    _, plans = plan_pool(PoolConfig(models=specs, device_memory=1 << 30, page_size=1 << 20))
    roots = {f"{plan.spec.name} flags": plan.args for plan in plans}
    roots |= {f"{plan.spec.name} checked": plan.checked for plan in plans}
    roots |= {f"{plan.spec.name} config {time}": plan.engine_config() for plan in plans for time in (1, 2)}
    shared = {
        f"{a} and {b}": paths
        for (a, first), (b, second) in itertools.combinations(roots.items(), 2)
        if (paths := shared_objects(first, second))
    }
    assert {} == shared


def test_a_reasoning_parser_stays_with_its_model(tiny_models) -> None:
    """It is in the flags that vLLM's frontend reads, and in the engine's config, of its own model alone."""
    first = plan(tiny_models.path("llama"))
    second = plan(tiny_models.path("llama"), "--reasoning-parser", "granite", name="b")
    third = plan(tiny_models.path("llama"), name="c")
    configs = [plan.engine_config() for plan in (first, second, third)]
    parsers = ["", "granite", ""]
    assert parsers == [config.structured_outputs_config.reasoning_parser for config in configs]
    assert parsers == [plan.args.structured_outputs_config.reasoning_parser for plan in (first, second, third)]


def test_a_bad_value_is_one_line_whatever_vllm_raises() -> None:
    """Its validation has errors of its own, which are no ValueError."""
    with pytest.raises(ConfigError, match="nowhere.jinja"):
        parse_serve_flags(["org/a", "--chat-template", "/nowhere.jinja"])


def test_flags_are_new_objects_each_time() -> None:
    """Also for a model that is not planned, such as the one that the server itself is configured by."""
    assert [] == shared_objects(parse_serve_flags(["org/a"]), parse_serve_flags(["org/a"]))
