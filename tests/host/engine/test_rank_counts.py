# SPDX-License-Identifier: Apache-2.0
"""Ranks of tokens are those of vLLM, and no kernel is compiled for them."""

from __future__ import annotations

import pytest
import torch

from tokenpool.patches import rank_counts
from tokenpool.patches.base import resolve

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("rows", [1, 2, rank_counts.ROWS, 2 * rank_counts.ROWS + 1])
def test_ranks_are_counted_at_once(rows: int) -> None:
    """The same counts as of the uncompiled original, with ties, of any number of rows."""
    original = resolve(rank_counts.PATCH.target)
    patched = rank_counts.PATCH.replacement(original)
    torch.manual_seed(rows)
    x = torch.randint(0, 9, (rows, 50)).float()
    values = x[:, :1].contiguous()
    assert not hasattr(patched, "_torchdynamo_orig_callable")
    assert torch.equal(patched(x, values), (x >= values).sum(-1))
