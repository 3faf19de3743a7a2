# SPDX-License-Identifier: Apache-2.0
"""Lets the block tables that a step reads name no block that its requests do not hold.

vLLM's scheduler frees blocks that left a sliding window, but the tables of its runners keep their ids, and attention
kernels load whole tiles of tokens through them: what no query can attend is masked only after it was loaded. In plain
vLLM these are old bytes. In a pool another model may have them, or nobody, which a kernel does not survive. So such
entries name the null block, in the tables that the step reads; entries behind a request's last block do as well.

vLLM 0.33 does the first of the two by itself (`sliding_window_reach`). Written for model runner V2 as three operations
of torch per group and step; not yet run on hardware.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, SlidingWindowSpec, UniformTypeKVCacheSpecs

FirstToken = Callable[[Any], Any]
"""Numbers of computed tokens -> the first token that a query after them can attend; of a tensor or an array."""


def first_token_of(spec: Any) -> FirstToken | None:
    """Of a group of KV caches; None where all tokens can be attended."""
    if isinstance(spec, UniformTypeKVCacheSpecs):
        spec = spec.first_spec
    if isinstance(spec, SlidingWindowSpec):
        reach = spec.sliding_window - 1 + spec.extra_retained_tokens
        return lambda computed: (computed - reach).clip(0)
    if isinstance(spec, ChunkedLocalAttentionSpec):
        chunk = spec.attention_chunk_size
        return lambda computed: computed - computed % chunk
    return None


def hide_unreadable_blocks(runner: Any) -> None:
    """Do so in every step of a runner from now on; once per runner, when its KV cache is there."""
    config = getattr(runner, "kv_cache_config", None)
    first_tokens = [first_token_of(group.kv_cache_spec) for group in config.kv_cache_groups] if config else []
    if hasattr(runner, "block_tables"):
        if first_tokens:
            _hide_v2(runner, first_tokens)
    elif not getattr(runner, "use_async_spec_decode", False):
        # With drafts and a step ahead, the first runner learns only later how many tokens were computed.
        _hide_v1(runner.input_batch, first_tokens)


def _hide_v1(batch: Any, first_tokens: list[FirstToken | None]) -> None:
    """In the rows of the host, before they are copied: what left a window never comes back to its place."""
    for table, first_token in zip(batch.block_table.block_tables, first_tokens, strict=False):
        if first_token is not None:
            table.commit_block_table = _commit_v1(batch, table, first_token, table.commit_block_table)


def _commit_v1(batch: Any, table: Any, first_token: FirstToken, commit: Callable[[int], None]) -> Callable[[int], None]:
    columns = np.arange(table.block_table.np.shape[1], dtype=np.int32)

    def commit_block_table(num_reqs: int) -> None:
        first = first_token(batch.num_computed_tokens_cpu[:num_reqs]) // table.block_size
        if last := int(first.max(initial=0)):
            rows = table.block_table.np[:num_reqs, :last]
            rows[columns[:last] < first[:, None]] = 0
        commit(num_reqs)

    return commit_block_table


def _hide_v2(runner: Any, first_tokens: list[FirstToken | None]) -> None:
    """In the tables that are gathered on the device for each step, behind the kernel that gathers them."""
    tables, computed = runner.block_tables, runner.req_states.num_computed_tokens
    if tables.cp_size > 1:  # a column of theirs is no run of tokens
        return
    sizes = getattr(tables, "kernel_block_sizes", tables.block_sizes)
    columns = [torch.arange(table.shape[1], device=table.device) for table in tables.input_block_tables]
    gather = tables.gather_block_tables

    def gather_block_tables(idx_mapping: torch.Tensor, num_reqs_padded: int, *args: Any, **kwargs: Any) -> Any:
        gathered = gather(idx_mapping, num_reqs_padded, *args, **kwargs)
        requests = idx_mapping.clip(0).long()  # -1 stands for one that is made up
        num_computed = computed.gpu[requests]
        for group, (table, first_token) in enumerate(zip(gathered, first_tokens, strict=True)):
            rows, places = table[: len(requests)], columns[group]
            readable = places < tables.num_blocks.gpu[group][requests][:, None]
            if first_token is not None:
                readable &= places >= (first_token(num_computed) // sizes[group])[:, None]
            rows.mul_(readable)
        return gathered

    tables.gather_block_tables = gather_block_tables
