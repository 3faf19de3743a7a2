# SPDX-License-Identifier: Apache-2.0
"""What the pool does to the state that a model runner keeps between steps, for the two model runners of vLLM.

It maps block ids when KV moves, and it drops what a crashed step left behind.

A runner keeps ids in its table of requests and in the block tables of its batch. All else that it derives from them
(slot mappings, attention metadata, CUDA graph inputs, block tables of drafters) it computes anew in each step. Ids of
blocks that a request no longer has, such as those behind a sliding window or of an aborted request, become 0, the
null block: they must not name another request's block. Steps do not see them before either: readable_blocks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch

from tokenpool.errors import ModelRefusedError
from tokenpool.host.kv.pool_relabel import IdMap


class RunnerAdapter(Protocol):
    """All that the pool asks of a runner, between two steps and on the thread that steps."""

    def remap(self, ids: IdMap) -> None:
        """Rewrite every block id."""

    def is_between_steps(self) -> bool:
        """False while a step was executed and not sampled."""

    def drop_step(self) -> None:
        """Drop what a crashed step left behind; the requests of the batch are preempted."""

    def can_resume(self, request_id: str) -> bool:
        """Whether the scheduler may send a preempted request as one that the runner has seen before."""


class RunnerAdapterV1:
    """vLLM's first model runner (the CPU's): lists per request, and tables in host memory copied in each step."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        _try_all(self)

    def remap(self, ids: IdMap) -> None:
        """Rewrite the ids of running and preempted requests, and the valid part of each row of the tables."""
        for request in self._runner.requests.values():
            for block_ids in request.block_ids:
                block_ids[:] = ids.translate(np.array(block_ids, dtype=np.int64)).tolist()
        for table in self._runner.input_batch.block_table.block_tables:
            rows = table.block_table.np
            valid = np.arange(rows.shape[1]) < table.num_blocks_per_row[:, None]
            # vLLM 0.29 may keep ids of kernel blocks, of which one KV block has several.
            rows[valid] = ids.translate(rows[valid], getattr(table, "blocks_per_kv_block", 1))

    def is_between_steps(self) -> bool:
        """See `RunnerAdapter`."""
        return self._runner.execute_model_state is None

    def drop_step(self) -> None:
        """See `RunnerAdapter`; preempted requests leave the batch in the next step, with what is kept of their last."""
        self._runner.execute_model_state = None

    def can_resume(self, request_id: str) -> bool:
        """See `RunnerAdapter`; a step may crash before the runner takes its new requests in."""
        return request_id in self._runner.requests


class RunnerAdapterV2:
    """vLLM's second model runner (CUDA's): tables on the device, gathered in each step."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        _try_all(self)

    def remap(self, ids: IdMap) -> None:
        """Rewrite the tables in place, in stream order, and ids that are staged for them.

        Of the rows of known requests, as far as the longest of them goes: all else is rewritten before it is read.
        """
        tables = self._runner.block_tables
        rows = sorted(self._runner.req_states.req_id_to_index.values())
        splits = getattr(tables, "blocks_per_kv_block", [1] * len(tables.block_tables))
        for group, (table, split) in enumerate(zip(tables.block_tables, splits, strict=True)):
            staged = table._staged_write_contents
            staged[:] = ids.translate(np.array(staged, dtype=np.int64), split).tolist()
            num_columns = int(tables.num_blocks.np[group, rows].max(initial=0))
            if num_columns:
                _translate_rows(table.gpu, rows, num_columns, ids, split)

    def is_between_steps(self) -> bool:
        """See `RunnerAdapter`."""
        return self._runner.execute_model_state is None

    def drop_step(self) -> None:
        """See `RunnerAdapter`; the runner forgets all requests, whose rows may be half written.

        The scheduler sends preempted requests as new ones.
        """
        runner, states = self._runner, self._runner.req_states
        runner.execute_model_state = None
        for request_id in list(states.req_id_to_index):
            runner._remove_request(request_id)
        staged = (*runner.block_tables.block_tables, states.all_token_ids, states.total_len, states.num_computed_tokens)
        for tensor in staged:
            tensor.clear_staged_writes()

    def can_resume(self, request_id: str) -> bool:
        """See `RunnerAdapter`."""
        return True


@contextmanager
def warm_up_in_null_block(runner: Any) -> Iterator[None]:
    """Send what a new engine's warm-up writes to its null block; the runner must have no requests.

    The warm-up of the second runner makes requests up, with the block ids 1, 2, ... (vLLM's gpu/warmup.py). In a pool
    there is another model's memory under them, or none.
    """
    tables = getattr(runner, "block_tables", None)  # the first runner has none; its dummy steps write nothing
    if tables is None:
        yield
        return
    assert not tables.redirect_writes_to_null_block
    tables.redirect_writes_to_null_block = True
    try:
        yield
    finally:
        tables.redirect_writes_to_null_block = False


def _try_all(adapter: RunnerAdapter) -> None:
    """Do everything once to a runner without requests: what it lacks shows here rather than in the first swap."""
    adapter.remap(IdMap(np.empty(0, np.int64), np.empty(0, np.int64)))
    adapter.is_between_steps()
    adapter.drop_step()
    adapter.can_resume("")


def _translate_rows(table: torch.Tensor, rows: list[int], num_columns: int, ids: IdMap, split: int) -> None:
    """`IdMap.translate` on the device that holds `table`, in place; takes memory for these rows and columns only."""
    where = _to_device_of(table, np.array(rows, dtype=np.int64))
    before = table[where, :num_columns]
    blocks = torch.div(before, split, rounding_mode="floor")
    after = before - blocks * split
    if len(ids.old):
        old, new = (_to_device_of(table, part.astype(np.int32)) for part in ids)
        places = torch.searchsorted(old, blocks, out_int32=True).clamp_(max=len(ids.old) - 1)
        after += torch.where(old[places] == blocks, new[places], 0) * split
    table[where, :num_columns] = after.to(table.dtype)


def _to_device_of(table: torch.Tensor, values: np.ndarray) -> torch.Tensor:
    """A copy of `values` there, which a GPU makes in its stream's order and nobody waits for."""
    here = torch.from_numpy(values)
    return here.pin_memory().to(table.device, non_blocking=True) if table.is_cuda else here.to(table.device)


_ADAPTERS: dict[tuple[str, str], Callable[[Any], RunnerAdapter]] = {
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner"): RunnerAdapterV1,
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner"): RunnerAdapterV2,
}
"""By the class that a runner is derived from, named so that neither runner is imported for nothing."""


def adapter_of(model: str, executor: Any) -> RunnerAdapter:
    """The adapter for the runner of an engine's executor, on all its ranks; raises ModelRefusedError if none fits."""
    adapter = make_runner_adapter(model, executor.driver_worker.worker.model_runner)
    mirrored = getattr(executor, "mirrored", None)
    return mirrored(adapter) if mirrored else adapter


def make_runner_adapter(model: str, runner: Any) -> RunnerAdapter:
    """The adapter for a freshly built runner, which has no requests; raises ModelRefusedError if none fits."""
    for base in type(runner).__mro__:
        adapter = _ADAPTERS.get((base.__module__, base.__qualname__))
        if adapter is None:
            continue
        try:
            return adapter(runner)
        except (AttributeError, TypeError, ValueError) as error:
            raise ModelRefusedError(
                model,
                f"model runner {type(runner).__qualname__} keeps its block tables otherwise: {error}",
                "install a vLLM version that `tokenpool doctor` knows",
            ) from error
    raise ModelRefusedError(
        model,
        f"model runner {type(runner).__module__}.{type(runner).__qualname__}, whose block tables are not known",
        "serve it outside the pool",
    )
