# SPDX-License-Identifier: Apache-2.0
"""Adapters rewrite exactly the block ids that a model runner keeps, for both runners of vLLM."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.helpers.plain import ENV
from tokenpool.errors import ModelRefusedError
from tokenpool.host.pool_relabel import IdMap
from tokenpool.host.runner_adapter import RunnerAdapterV1, RunnerAdapterV2, make_runner_adapter

pytestmark = pytest.mark.vllm

IDS = IdMap(np.array([3, 4, 9]), np.array([40, 3, 9]))
"""3 -> 40, 4 -> 3, 9 -> 9; all other blocks are gone."""


def make_v1(split: int = 1) -> SimpleNamespace:
    """A runner with one request of blocks 3, 4, 7 in row 0, and a stale row behind it."""
    table = SimpleNamespace(
        block_table=SimpleNamespace(np=np.full((3, 4 * split), 4 * split, np.int32)),
        num_blocks_per_row=np.array([3 * split, 0, 0], np.int32),
    )
    if split > 1:
        table.blocks_per_kv_block = split
    table.block_table.np[0, : 3 * split] = [i * split + k for i in (3, 4, 7) for k in range(split)]
    return SimpleNamespace(
        requests={"a": SimpleNamespace(block_ids=([3, 4, 7], [0, 9])), "preempted": SimpleNamespace(block_ids=([4],))},
        input_batch=SimpleNamespace(block_table=SimpleNamespace(block_tables=[table])),
    )


@pytest.mark.parametrize("split", [1, 2])
def test_lists_and_valid_rows_of_the_first_runner(split):
    """Ids of requests and of the valid part of rows change, kernel blocks stay in order, the rest is not touched."""
    runner = make_v1()
    adapter = RunnerAdapterV1(runner)
    runner = make_v1(split)
    adapter._runner = runner
    lists = runner.requests["a"].block_ids
    adapter.remap(IDS)
    assert ([40, 3, 0], [0, 9]) == lists
    assert runner.requests["a"].block_ids is lists
    assert ([3],) == runner.requests["preempted"].block_ids
    rows = runner.input_batch.block_table.block_tables[0].block_table.np
    assert [i * split + k for i in (40, 3, 0) for k in range(split)] == rows[0, : 3 * split].tolist()
    assert (rows[0, 3 * split :] == 4 * split).all()
    assert (rows[1:] == 4 * split).all()


@pytest.mark.parametrize("split", [1, 2])
def test_tables_of_the_second_runner(split):
    """Device tables and staged ids of every group change in place."""
    rows = torch.tensor([[3, 4, 7, 0], [9, 9, 4, 3]], dtype=torch.int32)
    rows = (rows[:, :, None] * split + torch.arange(split)).reshape(2, -1).to(torch.int32)
    groups = [SimpleNamespace(gpu=rows.clone(), _staged_write_contents=[]) for _ in range(2)]
    tables = SimpleNamespace(block_tables=groups)
    if split > 1:
        tables.blocks_per_kv_block = [split] * 2
    runner = SimpleNamespace(block_tables=SimpleNamespace(block_tables=[]))
    adapter = RunnerAdapterV2(runner)
    runner.block_tables = tables
    groups[1]._staged_write_contents += [4 * split, 7 * split + split - 1]
    addresses = [group.gpu.data_ptr() for group in groups]
    adapter.remap(IDS)
    expected = torch.tensor([[40, 3, 0, 0], [9, 9, 3, 40]])
    expected = (expected[:, :, None] * split + torch.arange(split)).reshape(2, -1)
    assert all(expected.tolist() == group.gpu.tolist() for group in groups)
    assert addresses == [group.gpu.data_ptr() for group in groups]
    assert ([], [3 * split, split - 1]) == tuple(group._staged_write_contents for group in groups)


def test_nothing_survived():
    """When no block came back, every id becomes the null block."""
    nothing = IdMap(np.empty(0, np.int64), np.empty(0, np.int64))
    runner = make_v1()
    RunnerAdapterV1(runner).remap(nothing)
    assert [0, 0, 0, 4] == runner.input_batch.block_table.block_tables[0].block_table.np[0].tolist()
    group = SimpleNamespace(gpu=torch.tensor([[5, 6]], dtype=torch.int32), _staged_write_contents=[7])
    RunnerAdapterV2(SimpleNamespace(block_tables=SimpleNamespace(block_tables=[group])))
    assert ([[0, 0]], [0]) == (group.gpu.tolist(), group._staged_write_contents)


def test_an_unknown_runner_is_refused():
    """A runner of another family, or one that keeps its tables otherwise, is refused when the model is built."""
    with pytest.raises(ModelRefusedError, match="model 'm' cannot be pooled: model runner types.SimpleNamespace"):
        make_runner_adapter("m", SimpleNamespace())
    changed = type("Runner", (), {"__module__": "vllm.v1.worker.gpu_model_runner", "__qualname__": "GPUModelRunner"})
    with pytest.raises(ModelRefusedError, match="keeps its block tables otherwise: .*has no attribute 'requests'"):
        make_runner_adapter("m", changed())


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the second runner needs Triton")
def test_moved_requests_on_the_second_runner(tmp_path):
    """On vLLM's second model runner, one group and several: moved requests give what they give without moves."""
    from tokenpool.demo.tiny_models import make_tiny_model

    models = [str(make_tiny_model(kind, tmp_path / kind)) for kind in ("llama", "gemma3")]
    child = subprocess.run(
        [sys.executable, "-m", "tests.helpers.second_runner", *models],
        cwd=Path(__file__).parents[2],
        env=os.environ | ENV,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, (child.stdout + child.stderr)[-4000:]
    if "this vLLM finds no Triton" in child.stdout:
        pytest.skip("this vLLM finds no Triton")
    found = json.loads(next(line for line in child.stdout.splitlines() if line.startswith('{"moved_ids"')))
    assert found["moved_ids"] > 50
    for results in found["results"].values():
        for index in range(3):
            assert 24 == len(results[f"still-{index}"][0])
            assert results[f"still-{index}"] == results[f"moved-{index}"]
