# SPDX-License-Identifier: Apache-2.0
"""vLLM's MLA backend for the CPU, on a KV cache whose blocks are not one dense run.

In the arena a block holds all layers, so the blocks of one layer lie `L * 16` tokens apart. Selected through vLLM's
`register_backend`; results are bit for bit those of the original, because the kernels and their order are.

     arena   | block 0: layer 0 | layer 1 | block 1: layer 0 | layer 1 | ...
     row     0                  16        32                 48
     layer 0 at row 0: slot 5 of block 1 is row 32 + 5
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

_MAX_OFFSET = 2**31
"""The decode kernel counts elements from the start of the cache in 32 bits: 4 GiB of bfloat16."""


class PooledCPUMLAImpl(CPUMLAImpl):
    """Writes by row and reads by block stride. `kv_cache` is (num_blocks, block_size, latent), last two dense."""

    def do_kv_cache_update(
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        *rest: Any,
    ) -> None:
        """Write new tokens; the original does it by row of a dense cache, so it is shown the rows between as well."""
        if kv_cache.numel() > 0:
            num_blocks, block_size, width = kv_cache.shape
            rows_per_block = kv_cache.stride(0) // width
            num_rows = (num_blocks - 1) * rows_per_block + block_size
            kv_cache = kv_cache.as_strided((num_rows, width), (width, 1))
            blocks = torch.div(slot_mapping, block_size, rounding_mode="floor")
            rows = blocks * rows_per_block + slot_mapping % block_size
            slot_mapping = torch.where(slot_mapping < 0, slot_mapping, rows)  # -1 is padding
        super().do_kv_cache_update(kv_c_normed, k_pe, kv_cache, slot_mapping, *rest)

    def forward_mqa(
        self, q: Any, kv_c_and_k_pe_cache: torch.Tensor, attn_metadata: Any, layer: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Decode; the kernel takes the block stride, but blocks beyond its reach are copied together first."""
        cache, decode = kv_c_and_k_pe_cache, attn_metadata.decode
        if (int(decode.block_table.max()) + 1) * cache.stride(0) > _MAX_OFFSET:
            cache, block_table = _gather(cache, decode.block_table, decode.seq_lens)
            attn_metadata = copy.copy(attn_metadata)
            attn_metadata.decode = replace(decode, block_table=block_table)
        return super().forward_mqa(q, cache, attn_metadata, layer)


def _gather(
    cache: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy the blocks that hold tokens, and only those: what the table says behind them may not be mapped."""
    num_blocks = -(-seq_lens // cache.shape[1])
    used = torch.arange(block_table.shape[1]) < num_blocks[:, None]
    gathered = torch.zeros_like(block_table)
    gathered[used] = torch.arange(int(used.sum()), dtype=block_table.dtype)
    return cache[block_table[used].long()], gathered


class PooledCPUMLABackend(CPUMLABackend):
    """CPU_MLA, by name as well, with `PooledCPUMLAImpl`."""

    @staticmethod
    def get_impl_cls() -> type[PooledCPUMLAImpl]:
        """The implementation."""
        return PooledCPUMLAImpl


def register() -> None:
    """Let vLLM choose this backend wherever it would choose CPU_MLA; in an engine outside the pool it is as good."""
    register_backend(AttentionBackendEnum.CPU_MLA, f"{__name__}.{PooledCPUMLABackend.__name__}")
