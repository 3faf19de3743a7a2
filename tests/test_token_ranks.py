# SPDX-License-Identifier: Apache-2.0
"""Ranks of log probabilities are vLLM's, and no compiler runs for them in a step."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tokenpool.patches import token_ranks

pytestmark = pytest.mark.vllm

CODE = """
import torch
from tokenpool.patches import apply_all
apply_all()
from vllm.v1.sample.sampler import Sampler
scores = torch.rand(3, 7).log_softmax(-1)
found = Sampler.gather_logprobs(scores, 2, torch.tensor([1, 2, 3]))
assert found.selected_token_ranks.tolist() == [
    int((row >= row[token]).sum()) for row, token in zip(scores, (1, 2, 3))
]
from torch._dynamo.utils import counters
print("compiled" if counters["stats"]["unique_graphs"] else "plain")
"""


def test_log_probabilities_start_no_compiler() -> None:
    """The first request for them takes no seconds of a step."""
    told = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True).stdout
    assert "plain" == told.split()[-1]


@pytest.mark.parametrize("rows", [1, 2, 5, 64])
def test_pieces_give_what_the_whole_does(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows one piece has, equal values included."""
    monkeypatch.setattr(token_ranks, "_MOST_VALUES", rows * 9 // 2)
    count = token_ranks._replacement(None)
    x = torch.randint(0, 4, (rows, 9), generator=torch.Generator().manual_seed(rows)).float()
    assert torch.equal(count(x, x[:, 3:4]), (x >= x[:, 3:4]).sum(-1))
