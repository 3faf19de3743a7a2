# SPDX-License-Identifier: Apache-2.0
"""Kinds of model that stand for many others: each gives in a pool what it gives in plain vLLM, and leaves it meanwhile.

`make test-models` tries all kinds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.models.run import try_kinds
from tests.models.table import KINDS

pytestmark = pytest.mark.vllm

GENERATING = ("cohere2", "falcon_alibi", "llama4")
"""Windows, biases by distance, attention in chunks with experts. More are in test_token_exactness."""
OTHERS = ("bert", "xlmr_seqcls", "q_w4a16")
"""Vectors, scores, 4-bit weights."""
FEW = GENERATING + OTHERS


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("models")
    return try_kinds(FEW, folder)


@pytest.mark.parametrize("name", FEW)
def test_a_kind_gives_what_it_gives_alone(entries: dict[str, dict[str, Any]], name: str):
    """Its streams do not collapse, its weights and its KV leave the device, and no token or logprob changes."""
    entry = entries[name]
    assert entry.get("pooled"), entry.get("why")
    assert entry["same"], entry
    assert entry["weight_evictions"] > 0
    if KINDS[name].task is None:
        assert entry["distinct"] >= 5


def test_weights_are_as_large_as_they_were_planned(entries: dict[str, dict[str, Any]]):
    """Before a start no less is counted than what a model has on the device, but for a few buffers."""
    for name in FEW:
        held = entries[name]["held_bytes"]
        assert 0.9 * held <= entries[name]["planned_bytes"] <= 1.2 * held + (64 << 10), name


def test_kv_of_each_group_leaves_the_device(entries: dict[str, dict[str, Any]]):
    """Not only weights move."""
    assert sum(entry["kv_evictions"] for entry in entries.values()) > 3
