# SPDX-License-Identifier: Apache-2.0
"""Adapters rewrite exactly the block ids that a model runner keeps, for both runners of vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tokenpool.errors import ModelRefusedError
from tokenpool.host.kv.pool_relabel import IdMap
from tokenpool.host.kv.runner_adapter import RunnerAdapterV1, RunnerAdapterV2, make_runner_adapter

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
        execute_model_state=None,
    )


class StagedTable(SimpleNamespace):
    """A table of the second runner with writes that wait."""

    def __init__(self, rows: torch.Tensor, staged: Sequence[int] = ()) -> None:
        super().__init__(gpu=rows, _staged_write_contents=list(staged))

    def clear_staged_writes(self) -> None:
        self._staged_write_contents.clear()


def make_v2(*groups: StagedTable) -> SimpleNamespace:
    """A runner with requests "a" and "b"."""
    states = {name: StagedTable(torch.zeros(2), [1]) for name in ("all_token_ids", "total_len", "num_computed_tokens")}
    req_states = SimpleNamespace(req_id_to_index={"a": 0, "b": 1}, **states)
    return SimpleNamespace(
        block_tables=SimpleNamespace(
            block_tables=list(groups), num_blocks=SimpleNamespace(np=np.full((max(1, len(groups)), 2), 2, np.int32))
        ),
        req_states=req_states,
        _remove_request=req_states.req_id_to_index.pop,
        execute_model_state=None,
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
    """Device tables and staged ids of every group change in place, as far as requests have blocks."""
    rows = torch.tensor([[3, 4, 7, 0, 4], [9, 9, 4, 3, 9], [3, 3, 3, 3, 3]], dtype=torch.int32)
    rows = (rows[:, :, None] * split + torch.arange(split)).reshape(3, -1).to(torch.int32)
    groups = [StagedTable(rows.clone()) for _ in range(2)]
    num_blocks = SimpleNamespace(np=np.array([[3 * split, 4 * split, 5 * split]] * 2, np.int32))
    tables = SimpleNamespace(block_tables=groups, num_blocks=num_blocks)
    if split > 1:
        tables.blocks_per_kv_block = [split] * 2
    runner = make_v2()
    adapter = RunnerAdapterV2(runner)
    runner.block_tables, runner.req_states = tables, make_v2().req_states
    groups[1]._staged_write_contents += [4 * split, 7 * split + split - 1]
    addresses = [group.gpu.data_ptr() for group in groups]
    adapter.remap(IDS)
    expected = torch.tensor([[40, 3, 0, 0, 4], [9, 9, 3, 40, 9], [3, 3, 3, 3, 3]])
    expected = (expected[:, :, None] * split + torch.arange(split)).reshape(3, -1)
    assert all(expected.tolist() == group.gpu.tolist() for group in groups)
    assert addresses == [group.gpu.data_ptr() for group in groups]
    assert ([], [3 * split, split - 1]) == tuple(group._staged_write_contents for group in groups)


def test_nothing_survived():
    """When no block came back, every id becomes the null block."""
    nothing = IdMap(np.empty(0, np.int64), np.empty(0, np.int64))
    runner = make_v1()
    RunnerAdapterV1(runner).remap(nothing)
    assert [0, 0, 0, 4] == runner.input_batch.block_table.block_tables[0].block_table.np[0].tolist()
    group = StagedTable(torch.tensor([[5, 6], [6, 5]], dtype=torch.int32))
    runner = make_v2()
    adapter = RunnerAdapterV2(runner)
    runner.block_tables.block_tables, runner.req_states = [group], make_v2().req_states
    group._staged_write_contents.append(7)
    adapter.remap(nothing)
    assert ([[0, 0], [0, 0]], [0]) == (group.gpu.tolist(), group._staged_write_contents)


def test_a_crashed_step_leaves_nothing_in_the_first_runner():
    """The first runner keeps its requests, which the scheduler may resume; one that it never saw it may not."""
    runner = make_v1()
    adapter = RunnerAdapterV1(runner)
    runner.execute_model_state = "left behind"
    assert not adapter.is_between_steps()
    adapter.drop_step()
    assert adapter.is_between_steps()
    assert (True, False) == (adapter.can_resume("a"), adapter.can_resume("new"))


def test_a_crashed_step_leaves_nothing_in_the_second_runner():
    """The second runner forgets all requests and writes that wait: the scheduler sends resumed requests as new."""
    groups = [StagedTable(torch.zeros(2, 2, dtype=torch.int32)) for _ in range(2)]
    runner = make_v2(*groups)
    adapter = RunnerAdapterV2(runner)
    again = make_v2(*groups)
    adapter._runner = again
    again.execute_model_state = "left behind"
    groups[1]._staged_write_contents.append(3)
    assert not adapter.is_between_steps()
    adapter.drop_step()
    assert adapter.is_between_steps() and adapter.can_resume("a")
    assert {} == again.req_states.req_id_to_index
    states = vars(again.req_states)
    waiting = [*groups, *(states[name] for name in ("all_token_ids", "total_len", "num_computed_tokens"))]
    assert [[]] * 5 == [tensor._staged_write_contents for tensor in waiting]


def test_an_unknown_runner_is_refused():
    """A runner of another family, or one that keeps its tables otherwise, is refused when the model is built."""
    with pytest.raises(ModelRefusedError, match="model 'm' cannot be pooled: model runner types.SimpleNamespace"):
        make_runner_adapter("m", SimpleNamespace())
    changed = type("Runner", (), {"__module__": "vllm.v1.worker.gpu_model_runner", "__qualname__": "GPUModelRunner"})
    with pytest.raises(ModelRefusedError, match="keeps its block tables otherwise: .*has no attribute 'requests'"):
        make_runner_adapter("m", changed())
