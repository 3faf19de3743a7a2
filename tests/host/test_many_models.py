# SPDX-License-Identifier: Apache-2.0
"""Twelve models on a quarter of the memory that their weights need: mixed traffic, nothing leaks, nobody starves."""

from __future__ import annotations

import random
from pathlib import Path

import psutil
import pytest

from tests.helpers.plain import Case, RequestSpec, prompts_for

pytestmark = pytest.mark.vllm

PAGE = 256 << 10
NUM_MODELS = 12
PAGES = 15
"""All weights are 58 pages and more."""
NUM_REQUESTS = 160


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    from tokenpool.demo.tiny_models import make_tiny_model

    folder = tmp_path_factory.mktemp("models")
    made = {}
    for index in range(NUM_MODELS):
        kind = ("llama", "qwen2", "gemma3")[index % 3]
        name = f"{kind}-{index}"
        model = make_tiny_model(kind, Path(folder, name), seed=index)
        made[name] = Case(name, str(model), {"max_model_len": 512}, [])
    return made


class Traffic:
    """Random requests, aborts, removals and additions, drawn from one seed."""

    def __init__(self, pooled, cases: dict[str, Case], seed: int) -> None:
        self.pooled, self.cases = pooled, cases
        self.sent: dict[tuple[str, str], int] = {}
        self.aborted: set[tuple[str, str]] = set()
        self.removals = 0
        self._random = random.Random(seed)
        self._prompts = prompts_for(seed, 40)

    def __call__(self, step: int) -> None:
        if step % 20 == 0:
            self.pooled.check()
        if len(self.sent) < NUM_REQUESTS and self._random.random() < 0.25:
            self._send()
        if self._random.random() < 0.02:
            self._abort()
        if step % 150 == 149 and self.removals < 4:
            self._replace()

    def _send(self) -> None:
        weights = [1 / (rank + 1) for rank in range(len(self.cases))]  # some models are asked far more than others
        name = self._random.choices(list(self.cases), weights)[0]
        request_id = f"{name}-{len(self.sent)}"
        tokens = self._random.randrange(4, 24)
        temperature, seed = (1.0, len(self.sent)) if self._random.random() < 0.3 else (0.0, None)
        spec = RequestSpec(request_id, self._random.choice(self._prompts), tokens, temperature, seed)
        self.pooled.submit_one(name, spec, [])
        self.sent[name, request_id] = tokens

    def _abort(self) -> None:
        running = [key for key in self.sent if self.pooled.finish_reason(*key) is None and key not in self.aborted]
        if running:
            name, request_id = self._random.choice(running)
            self.pooled.abort(name, request_id)
            self.aborted.add((name, request_id))

    def _replace(self) -> None:
        """Remove an idle model, wherever it is, and add it again."""
        host = self.pooled.host
        idle = [n for n, m in host.models.items() if not m.core.has_work() and m.core.input_queue.empty()]
        if idle:
            name = self._random.choice(idle)
            host.remove_model(name)
            self.pooled.check()
            self.pooled.add(self.cases[name])
            self.removals += 1


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["slack", "aegaeon"])
def test_twelve_models_on_a_quarter_of_their_memory(cases, policy):
    """Every request that is not aborted gets all its tokens; books, host memory and the process stay in bounds."""
    from tests.helpers.pooled import PooledModels
    from tokenpool.memory.devices.cpu import CpuDevice

    device = CpuDevice(keeps_bytes=True)
    pooled = PooledModels(
        PAGES * PAGE, PAGE, device=device, poison=True, movable_weights=True, host_memory=64 << 20, policy=policy
    )
    try:
        for case in cases.values():
            pooled.add(case)
        snapshot = pooled.host.weights.snapshot()
        assert sum(w.pages for w in snapshot.values()) >= 58
        weight_bytes = pooled.host.host_ledger.snapshot()["weights"]
        traffic = Traffic(pooled, cases, seed=7)
        for key in range(20):
            traffic(key)
        pooled.run(each_step=traffic)
        rss = psutil.Process().memory_info().rss
        traffic.sent.clear()
        while len(traffic.sent) < NUM_REQUESTS:
            traffic(1)
            pooled.run(each_step=traffic)

        for (name, request_id), tokens in traffic.sent.items():
            if (name, request_id) not in traffic.aborted:
                assert "length" == pooled.finish_reason(name, request_id)
                assert tokens == len(pooled.results(name)[request_id].tokens)
        assert traffic.removals and traffic.aborted
        assert weight_bytes == pooled.host.host_ledger.snapshot()["weights"]
        assert pooled.host.host_ledger.total("paused_kv") == 0
        assert psutil.Process().memory_info().rss < rss + (128 << 20)
        assert pooled.host.weights.device.bytes_to_host == 0
    finally:
        pooled.close()
    assert pooled.host.ledger.num_free + pooled.host.ledger.total("null") == pooled.host.ledger.num_pages
