# SPDX-License-Identifier: Apache-2.0
"""Ways to copy many KV blocks at once, by name, and which one goes for which size. Not yet run on hardware."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch

from tokenpool.memory.devices.cuda import BatchCopy


def _driver_batch(copies: Sequence[tuple[int, int, int]], stream: int) -> None:
    """One cuMemcpyBatchAsync for all, through vLLM's op (vllm/_custom_ops.py, `swap_blocks_batch`)."""
    from vllm._custom_ops import swap_blocks_batch

    targets, sources, sizes = _columns(copies)
    with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
        swap_blocks_batch(sources, targets, sizes)


def _triton(copies: Sequence[tuple[int, int, int]], stream: int) -> None:
    """One kernel that reads and writes pinned memory, vLLM's own (vllm/v1/kv_offload/cpu/swap_blocks_triton.py).

    It copies whole words of 8 bytes; fewer than 16 copies go the way of `batch`.
    """
    from vllm.v1.kv_offload.cpu.swap_blocks_triton import swap_blocks_batch

    targets, sources, sizes = _columns(copies)
    if sizes.remainder(8).any():
        raise ValueError("the Triton copy moves words of 8 bytes: a block of another size must go another way")
    with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
        swap_blocks_batch(sources, targets, sizes, bytes_per_chunk=8192)


def _columns(copies: Sequence[tuple[int, int, int]]) -> list[torch.Tensor]:
    return list(torch.tensor(copies, dtype=torch.int64).T.contiguous())


BATCH_COPIES: dict[str, BatchCopy | None] = {"each": None, "batch": _driver_batch, "triton": _triton}
"""Name -> what `CudaDevice(ways=...)` takes; None is one call of the driver per run of neighbouring blocks."""

Table = Sequence[tuple[int, str]]
"""Rows (least bytes of a copy, name of the way), in rising order from 0 on."""

CHOSEN: Table = ((0, "each"),)
"""What hosts use: nothing has been measured. `python -m bench.gpu.link` prints the table that its figures choose."""


def ways(table: Table = CHOSEN) -> list[tuple[int, BatchCopy | None]]:
    """The table with functions for names, for `CudaDevice`."""
    return [(least, BATCH_COPIES[name]) for least, name in table]


def fastest(rates: Mapping[int, Mapping[str, float]]) -> list[tuple[int, str]]:
    """The table that takes the fastest way at each measured size, from bytes of a copy -> name -> rate.

    A size between two measured ones goes the way of the smaller one, so does one below all that of the smallest.
    """
    best = [(size, max(by_name, key=by_name.__getitem__)) for size, by_name in sorted(rates.items()) if by_name]
    rows = [next(rows) for _, rows in groupby(best, key=lambda row: row[1])]
    return [(0, rows[0][1]), *rows[1:]] if rows else []
