# SPDX-License-Identifier: Apache-2.0
"""Fixtures that cost seconds and are shared: tiny checkpoints and one running server. Imports no vLLM."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.helpers.server import PoolServerProcess
from tokenpool.demo.tiny_models import ENGINE_ARGS, make_tiny_lora, make_tiny_model

# With AMX oneDNN rounds a row otherwise beside four others than beside three: streams would depend on the batch. This
# is the highest level without AMX: one lower has no FP8, which torch asks oneDNN for wherever the CPU has AMX.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
# No test is timed: a busy machine is not a fault.
settings.register_profile("untimed", deadline=None)
settings.register_profile("same", deadline=None, derandomize=True)
settings.load_profile("untimed")

LORA_NAME = "llama-lora"
SLO = {"ttft": "1us", "tpot": "60s"}
"""Every first token is late and every other one on time, on any machine."""


@pytest.fixture(autouse=True)
def own_log_lines() -> Iterator[None]:
    """Lines of tokenpool reach caplog whatever ran before in this process: packages set the root's level at import."""
    own = logging.getLogger("tokenpool")
    handlers, level, propagate = list(own.handlers), own.level, own.propagate
    own.handlers[:], own.propagate = [], True
    own.setLevel(logging.INFO)
    yield
    own.handlers[:], own.propagate = handlers, propagate
    own.setLevel(level)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give several workers the long files first, with clusters, which keep all cores busy, among the others."""
    if not hasattr(config, "workerinput"):
        return
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    needing: dict[str, list[list[pytest.Item]]] = {"ray": [], "vllm": [], "cpu": []}
    for tests in files.values():
        needs = {mark.name for item in tests for mark in item.iter_markers()}
        needing[next((name for name in needing if name in needs), "cpu")].append(tests)
    in_turns = chain.from_iterable(zip_longest(needing["ray"], needing["vllm"], fillvalue=[]))
    items[:] = chain.from_iterable([*in_turns, *needing["cpu"]])


class TinyModels:
    """Makes tiny checkpoints below one folder, each on first use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: str) -> Path:
        """The checkpoint of `kind`."""
        return make_tiny_model(kind, self.folder / kind)

    def lora(self, kind: str) -> Path:
        """An adapter of rank 8 for `kind`."""
        return make_tiny_lora(self.path(kind), self.folder / f"{kind}-lora")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Tiny checkpoints by kind."""
    return TinyModels(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def pool_server(tiny_models: TinyModels) -> Iterator[PoolServerProcess]:
    """One server for the whole session: llama with an adapter, qwen2 with an SLO, gemma3, embed."""
    # Two slots for one adapter: on the CPU vLLM 0.32.0 gives a base-model row that shares a batch with an adapter's
    # row the adapter in the last slot (vllm-project/vllm#48421). An empty last slot adds nothing.
    lora: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    lora["lora_modules"] = [f"{LORA_NAME}={tiny_models.lora('llama')}"]
    models = [
        {"name": "llama", "model": str(tiny_models.path("llama")), "args": lora},
        {"name": "qwen2", "model": str(tiny_models.path("qwen2")), "slo": SLO},
        {"name": "gemma3", "model": str(tiny_models.path("gemma3"))},
        {"name": "embed", "model": str(tiny_models.path("embed")), "args": ENGINE_ARGS["embed"]},
    ]
    pool = {
        "models": models,
        "device_memory": "96MiB",
        "page_size": "1MiB",
        "api_key": "test-api-key-0123",
        "admin_key": "test-admin-key-0123",
    }
    with PoolServerProcess(pool) as server:
        yield server
