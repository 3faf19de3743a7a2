# SPDX-License-Identifier: Apache-2.0
"""Ways to copy many KV blocks at once, by name, for measurements to choose from. Not yet run on hardware."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokenpool.memory.device_cuda import BatchCopy


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
"""Name -> what `CudaDevice(batch_copy=...)` takes; None, the default, is one copy per run of neighbouring blocks."""
