# SPDX-License-Identifier: Apache-2.0
"""Engines that share a GPU are small where the user asked for nothing; and what vLLM does to the whole process."""

from __future__ import annotations

import dataclasses
import os
from argparse import Namespace
from types import SimpleNamespace

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs

from tokenpool.serve.launch import model_plan, poolability, small_engines
from tokenpool.serve.launch.small_engines import capture_sizes, keep_engine_small

pytestmark = pytest.mark.vllm

GRAPHS = "VLLM_USE_BREAKABLE_CUDAGRAPH"
NINE = [1, 2, 4, 8, 16, 32, 64, 128, 256]


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(small_engines, "current_platform", SimpleNamespace(is_cuda=lambda: True))


def made(*, config: dict[str, object] | None = None, **asked: object) -> tuple[int | None, list[int] | None]:
    """Sequences and sizes of graphs where the user gave this and nothing else."""
    asked_of_config = {"cudagraph_capture_sizes": None, "max_cudagraph_capture_size": None, **(config or {})}
    values = {
        "max_num_seqs": None,
        "cudagraph_capture_sizes": None,
        "max_cudagraph_capture_size": None,
        "enforce_eager": False,
        "speculative_config": None,
        "compilation_config": SimpleNamespace(**asked_of_config),
        **asked,
    }
    fields = {field.name: field.default for field in dataclasses.fields(AsyncEngineArgs)}
    assert values.keys() <= fields.keys(), "vLLM has no such flags"
    assert fields["max_num_seqs"] is fields["cudagraph_capture_sizes"] is None
    args = SimpleNamespace(**values)
    keep_engine_small(args)
    return args.max_num_seqs, args.cudagraph_capture_sizes


def test_an_engine_on_a_gpu_is_small_unless_asked(cuda):
    """256 sequences and nine sizes of graphs; what the user gave stays, graphs follow the sequences."""
    assert (256, NINE) == made()
    assert (48, [1, 2, 4, 8, 16, 32, 48]) == made(max_num_seqs=48)
    assert (256, [7]) == made(cudagraph_capture_sizes=[7])
    assert (256, None) == made(max_cudagraph_capture_size=512)
    assert (256, None) == made(enforce_eager=True)
    assert (256, None) == made(config={"cudagraph_capture_sizes": [3]})
    assert (256, None) == made(speculative_config={"method": "ngram", "num_speculative_tokens": 2})
    assert [1] == capture_sizes(1)


def test_the_cpu_has_vllms_own_defaults():
    """So that results there stay as they are."""
    assert (None, None) == made()


@pytest.mark.parametrize("before", [None, "0"])
def test_a_model_that_wants_graphs_in_pieces_wants_them_for_itself(monkeypatch, before):
    """vLLM sets a variable when it makes the config of some architectures: the next model does not find it."""
    monkeypatch.delenv(GRAPHS, raising=False)
    if before is not None:
        monkeypatch.setenv(GRAPHS, before)

    def create_engine_config(**_: object) -> Namespace:
        os.environ.setdefault(GRAPHS, "1")
        return Namespace()

    model_plan._config_of(SimpleNamespace(create_engine_config=create_engine_config))
    assert before == os.environ.get(GRAPHS)


@pytest.mark.parametrize(("gib", "group", "asked"), [(0, 0, False), (1, 0, True), (0, 2, True)])
def test_offloading_of_weights_is_seen_however_it_is_asked_for(gib, group, asked):
    """vLLM has one offloader per process, of the engine that was built last."""
    offload = SimpleNamespace(
        uva=SimpleNamespace(cpu_offload_gb=gib), prefetch=SimpleNamespace(offload_group_size=group)
    )
    assert asked == poolability._offloads(offload)
    assert not poolability._offloads(None)
