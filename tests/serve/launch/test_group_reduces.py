# SPDX-License-Identifier: Apache-2.0
"""What engines of one process cannot share of the ways to reduce among ranks: off by default, refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs

from tokenpool.errors import ConfigError, ModelRefusedError
from tokenpool.serve.launch import group_reduces
from tokenpool.serve.launch.group_reduces import keep_reduces_apart
from tokenpool.settings import ALLOCATOR, OFF_IN_GROUPS

pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True)
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A platform of GPUs, and an environment that asks for nothing."""
    platform = SimpleNamespace(is_cpu=lambda: False)
    monkeypatch.setattr(group_reduces, "current_platform", platform)
    for variable in (*OFF_IN_GROUPS, ALLOCATOR):
        monkeypatch.delenv(variable.name, raising=False)
    return platform


def asked(ranks: int = 2, **passes: Any) -> AsyncEngineArgs:
    config = {"pass_config": passes}
    return AsyncEngineArgs(model="m", tensor_parallel_size=ranks, compilation_config=config)  # type: ignore[arg-type]


def fused(args: AsyncEngineArgs) -> bool | None:
    keep_reduces_apart("m", args)
    return args.compilation_config.pass_config.fuse_allreduce_rms


def test_fused_all_reduces_are_off_in_groups() -> None:
    """vLLM turns them on by itself where nothing is said; a model on one GPU has none."""
    args = asked()
    assert args.compilation_config.pass_config.fuse_allreduce_rms is None
    assert fused(args) is False
    assert fused(args) is False, "the second config of a model is made from the same flags"
    assert fused(asked(fuse_allreduce_rms=False)) is False
    assert fused(asked(ranks=1)) is None
    with pytest.raises(ModelRefusedError, match="'m' cannot be pooled: fuse_allreduce_rms.*remove it"):
        fused(asked(fuse_allreduce_rms=True))


def test_the_cpu_has_vllms_own_defaults(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them is there: what a variable says does no harm."""
    gpus.is_cpu = lambda: True
    monkeypatch.setenv(OFF_IN_GROUPS[0].name, "1")
    assert fused(asked()) is None


@pytest.mark.parametrize("variable", OFF_IN_GROUPS, ids=lambda variable: variable.name)
def test_a_variable_that_asks_for_one_is_refused(variable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, for models on several GPUs only; a wrong value is told as such."""
    monkeypatch.setenv(variable.name, "1")
    with pytest.raises(ModelRefusedError, match=f"{variable.name}=1 with tensor parallelism.*unset it"):
        fused(asked())
    assert fused(asked(ranks=1)) is None
    monkeypatch.setenv(variable.name, "0")
    assert fused(asked()) is False
    monkeypatch.setenv(variable.name, "maybe")
    with pytest.raises(ConfigError, match=variable.name):
        fused(asked())


def test_vllm_knows_the_variables() -> None:
    """By their names, as on or off; the last is NCCL's own."""
    *of_vllm, nccl = (variable.name for variable in OFF_IN_GROUPS)
    assert 4 == len(of_vllm)
    assert all(isinstance(getattr(envs, name), bool) for name in of_vllm)
    assert "NCCL_GRAPH_REGISTER" == nccl


def test_graphs_need_memory_that_other_ranks_can_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the custom all-reduce; without it nothing stands against segments that grow."""
    monkeypatch.setenv(ALLOCATOR.name, "max_split_size_mb:20,expandable_segments:True")
    with pytest.raises(ModelRefusedError, match="expandable_segments:True.*--disable-custom-all-reduce"):
        fused(asked())
    args = asked()
    args.disable_custom_all_reduce = True
    assert fused(args) is False
    monkeypatch.setenv(ALLOCATOR.name, "expandable_segments:False")
    assert fused(asked()) is False
