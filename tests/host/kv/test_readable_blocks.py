# SPDX-License-Identifier: Apache-2.0
"""No step can read through the id of a block that its requests do not hold: windows, chunks, and what lies behind."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.core.single_type_kv_cache_manager import ChunkedLocalAttentionManager, SlidingWindowManager
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, SlidingWindowSpec

from tests.helpers.cases import make_cases
from tests.helpers.plain import Case, RequestSpec, prompts_for, run_plain
from tokenpool.host.kv.readable_blocks import first_token_of, hide_unreadable_blocks

pytestmark = pytest.mark.vllm

ROWS, COLUMNS, BLOCK = 5, 24, 16
LIMIT = ROWS * COLUMNS * BLOCK
SIZE = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float16}


def spec(kind: type, **fields: Any) -> Any:
    return kind(**SIZE, **fields)


WINDOW, CHUNK, FULL = (
    spec(SlidingWindowSpec, sliding_window=50),
    spec(ChunkedLocalAttentionSpec, attention_chunk_size=64),
    spec(FullAttentionSpec),
)


@pytest.mark.parametrize(
    ("kind", "manager", "field"),
    [
        (WINDOW, SlidingWindowManager, "sliding_window"),
        (spec(SlidingWindowSpec, sliding_window=50, extra_retained_tokens=3), SlidingWindowManager, "sliding_window"),
        (CHUNK, ChunkedLocalAttentionManager, "attention_chunk_size"),
    ],
)
def test_what_is_hidden_is_what_the_scheduler_frees(kind, manager, field):
    """For every number of computed tokens, of arrays and of tensors."""
    fields = {field: getattr(kind, field), "extra_retained_tokens": getattr(kind, "extra_retained_tokens", 0)}
    freed = [manager.get_num_skipped_tokens(SimpleNamespace(**fields), computed) for computed in range(300)]
    first = first_token_of(kind)
    assert freed == first(np.arange(300)).tolist() == first(torch.arange(300)).tolist()
    assert first_token_of(FULL) is None


def random_rows(rng: random.Random) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of ids that are never 0, how many of them are a request's, and how many tokens it has computed."""
    rows = np.arange(1, ROWS * COLUMNS + 1, dtype=np.int32).reshape(ROWS, COLUMNS)
    lengths = np.array([rng.randint(1, COLUMNS) for _ in range(ROWS)], np.int32)
    return rows, lengths, np.array([rng.randint(0, int(n) * BLOCK) for n in lengths], np.int32)


def expected_row(row: np.ndarray, kind: Any, computed: int, length: int) -> list[int]:
    first = first_token_of(kind)(np.array([computed]))[0] // BLOCK if first_token_of(kind) else 0
    return [int(block_id) if first <= column < length else 0 for column, block_id in enumerate(row)]


@pytest.mark.parametrize("seed", range(20))
def test_rows_of_the_first_runner(seed):
    """Only rows of the batch change, and of those only entries in front of the window."""
    rng = random.Random(seed)
    rows, lengths, computed = random_rows(rng)
    num_reqs = rng.randint(1, ROWS)
    copied: list[int] = []
    tables = [
        SimpleNamespace(block_table=SimpleNamespace(np=rows.copy()), block_size=BLOCK, commit_block_table=copied.append)
        for _ in range(3)
    ]
    batch = SimpleNamespace(
        num_computed_tokens_cpu=computed, block_table=SimpleNamespace(block_tables=tables), rows=lengths
    )
    groups = [SimpleNamespace(kv_cache_spec=kind) for kind in (WINDOW, CHUNK, FULL)]
    runner = SimpleNamespace(input_batch=batch, kv_cache_config=SimpleNamespace(kv_cache_groups=groups))
    hide_unreadable_blocks(runner)
    for table, kind in zip(tables, (WINDOW, CHUNK, FULL), strict=True):
        table.commit_block_table(num_reqs)
        for index, row in enumerate(table.block_table.np):
            wanted = expected_row(rows[index], kind, computed[index], COLUMNS)
            assert wanted == row.tolist() if index < num_reqs else rows[index].tolist() == row.tolist()
    assert copied == [num_reqs] * 3


@pytest.mark.parametrize("seed", range(20))
def test_tables_of_the_second_runner(seed):
    """Gathered in the order of the batch, in front of the window and behind the last block they name block 0."""
    rng = random.Random(seed)
    rows, lengths, computed = random_rows(rng)
    order = rng.sample(range(ROWS), rng.randint(1, ROWS))
    kinds = (WINDOW, CHUNK, FULL)
    inputs = [torch.full((ROWS, COLUMNS), 7, dtype=torch.int32) for _ in kinds]

    def gather(idx_mapping: torch.Tensor, num_reqs_padded: int) -> tuple[torch.Tensor, ...]:
        for table in inputs:  # what is behind the last block stays as the step before left it
            for place, index in enumerate(idx_mapping.tolist()):
                table[place, : lengths[index]] = torch.from_numpy(rows[index, : lengths[index]])
        return tuple(table[:num_reqs_padded] for table in inputs)

    tables = SimpleNamespace(
        cp_size=1,
        block_sizes=[BLOCK] * 3,
        input_block_tables=inputs,
        num_blocks=SimpleNamespace(gpu=torch.from_numpy(np.tile(lengths, (3, 1)))),
        gather_block_tables=gather,
    )
    states = SimpleNamespace(num_computed_tokens=SimpleNamespace(gpu=torch.from_numpy(computed)))
    groups = [SimpleNamespace(kv_cache_spec=kind) for kind in kinds]
    hide_unreadable_blocks(
        SimpleNamespace(block_tables=tables, req_states=states, kv_cache_config=SimpleNamespace(kv_cache_groups=groups))
    )
    gathered = tables.gather_block_tables(torch.tensor(order, dtype=torch.int32), num_reqs_padded=len(order))
    for kind, table, own in zip(kinds, gathered, inputs, strict=True):
        assert table.data_ptr() == own.data_ptr(), "graphs read the tensor that was there when they were captured"
        for place, index in enumerate(order):
            wanted = expected_row(rows[index], kind, computed[index], lengths[index])
            assert wanted == table[place].tolist()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A model with windows of 64 tokens in blocks of 32: most blocks of a long request leave them."""

    def requests(kind: str, index: int, lora: str | None) -> list[RequestSpec]:
        return [RequestSpec(f"{kind}-{i}", p, 40) for i, p in enumerate(prompts_for(3, 3, lengths=(20, 150, 260)))]

    args = {"max_model_len": 512, "block_size": 32, "max_num_batched_tokens": 96, "enable_prefix_caching": False}
    return make_cases(tmp_path_factory.mktemp("window"), ("gemma3",), requests, **args)["gemma3"]


def _run(case: Case, hide: Any) -> tuple[Any, Any]:
    """Each slab that nobody uses is taken away and poisoned after every step."""
    from tests.helpers.devices.table_reads import TableReads
    from tests.helpers.stepping import SteppedModels
    from tokenpool.host.engine import cpu_worker

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_worker, "hide_unreadable_blocks", hide)
        pooled = SteppedModels(32 << 20, 64 << 10)
        pooled.add(case)
    reads = TableReads(pooled, case.name)
    pooled.submit(case)
    pooled.run_all(pooled.evict)
    results = pooled.results(case.name)
    pooled.close()
    return reads, results


def test_no_step_names_a_block_that_left_the_window(case):
    """Prompts in chunks and decoding, with slabs taken away and poisoned at once: the streams are plain vLLM's.

    Without it steps could read blocks that were freed: the test would find out.
    """
    reads, results = _run(case, hide_unreadable_blocks)
    assert [] == reads.freed
    assert reads.hidden > 100
    assert run_plain([case])[case.name] == results
    found, _ = _run(case, lambda runner: None)
    assert len(found.freed) > 50
