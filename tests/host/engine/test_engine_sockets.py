# SPDX-License-Identifier: Apache-2.0
"""An engine that is gone leaves no thread, no file and no memory behind, whether or not a frontend ever came."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import pytest

from tests.helpers.cases import greedy, make_cases
from tests.helpers.plain import Case
from tests.helpers.server import poll
from tokenpool.errors import CapacityError

pytestmark = pytest.mark.vllm

PAGE = 256 << 10


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return make_cases(tmp_path_factory.mktemp("models"), ("llama", "qwen2"), greedy(2, 20))


def _spec(case: Case, folder: Path):
    """The case as a model with socket addresses at which no frontend ever listens."""
    from tests.helpers.pooled import make_spec
    from tokenpool.wire.addresses import EngineAddresses

    return make_spec(case, addresses=EngineAddresses((f"ipc://{folder}/in",), (f"ipc://{folder}/out",)))


def _held() -> tuple[int, int]:
    """Threads and open files of this process."""
    gc.collect()
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def _wait_until_held(before: tuple[int, int]) -> None:
    poll(lambda: (_held(), before), until=lambda seen: all(now <= then for now, then in zip(*seen, strict=True)))


def _refuse_late(host, spec, monkeypatch) -> weakref.ref:
    """Let the host refuse a model after its engine was built; returns a weak reference to that engine."""
    seen = []

    def check_fits(model, core, pool):
        seen.append(weakref.ref(core))
        raise CapacityError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(host._relief, "check_fits", check_fits)
        with pytest.raises(CapacityError, match="no room"):
            host.add_model(spec)
    return seen[0]


def test_a_model_refused_after_its_build_leaves_nothing(cases, tmp_path, monkeypatch):
    """Threads and open files are those of before, the pages are back, and the other model's stream is the same."""
    from tests.helpers.pooled import PooledModels

    pooled = PooledModels(32 << 20, PAGE)
    pooled.add(cases["llama"])
    pooled.submit(cases["llama"])
    pooled.run()
    alone = {name: result.tokens for name, result in pooled.results("llama").items()}
    # The first one also starts what stays, such as thread pools.
    _refuse_late(pooled.host, _spec(cases["qwen2"], tmp_path), monkeypatch)
    before = poll(_held, until=lambda held: held == _held())
    free = pooled.host.ledger.num_free
    for _ in range(2):
        engine = _refuse_late(pooled.host, _spec(cases["qwen2"], tmp_path), monkeypatch)
    _wait_until_held(before)
    assert free == pooled.host.ledger.num_free
    assert ["llama"] == list(pooled.host.models)
    assert engine() is None, "the refused engine and its weights are still in memory"

    pooled.submit(cases["llama"])
    pooled.run()
    assert alone == {name: result.tokens for name, result in pooled.results("llama").items()}
    pooled.check()
    pooled.close()


def test_a_model_whose_frontend_never_came_can_be_removed(cases, tmp_path):
    """Its threads end although nobody sends the message they wait for and nobody takes their greeting."""
    from tests.helpers.pooled import PooledModels

    pooled = PooledModels(32 << 20, PAGE)
    pooled.add(cases["llama"])
    for turn in range(3):
        pooled.host.add_model(_spec(cases["qwen2"], tmp_path))
        pooled.host.remove_model("qwen2")
        if turn == 0:
            before = poll(_held, until=lambda held: held == _held())
    _wait_until_held(before)
    pooled.close()
