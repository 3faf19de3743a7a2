# SPDX-License-Identifier: Apache-2.0
"""What a request asks of its tokens is asked of its drafts too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tokenpool.patches import PATCHES, apply_all

pytestmark = pytest.mark.vllm


@pytest.fixture
def patched() -> Iterator[None]:
    was_applied = bool(PATCHES._originals)
    apply_all()
    yield
    if not was_applied:
        PATCHES.undo()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_each_draft_has_the_value_of_its_request(patched, dtype):
    """Requests have 2, 0, 3 and 1 drafts; one value stands for another, as temperature 0 does for 1."""
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    values, ends = torch.tensor([5, 7, 0, 9], dtype=dtype), torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    expanded = expand_batch_to_tokens(values, ends, 6, replace_from=0, replace_to=1)

    assert expanded.dtype is dtype
    assert [5, 5, 1, 1, 1, 9] == expanded.tolist()
    assert [5, 7, 0, 9] == values.tolist()
