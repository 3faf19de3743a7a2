# SPDX-License-Identifier: Apache-2.0
"""A host that maps what another one has read gives the same tokens, and reads no checkpoint."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cases import make_cases, mixed
from tests.helpers.plain import Case, Result, run_plain
from tests.node_store.asking import book, kill_keeper

pytestmark = pytest.mark.vllm

KINDS = ("llama", "qwen3", "gemma3", "mixtral", "qwen3_moe")
PAGE = 256 << 10
MEMORY = 64 << 20
STORE = f"test-{os.getpid()}"


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("models")
    return make_cases(folder, KINDS, mixed(4, 40), lora_kind="llama", enable_prefix_caching=True)


class Reference:
    """What plain vLLM gives, each case alone, with the kernel that movable weights need; of what was asked for."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, Result]] = {}

    def of(self, cases: dict[str, Case]) -> dict[str, dict[str, Result]]:
        if missing := [case for name, case in cases.items() if name not in self._known]:
            self._known |= run_plain(missing, plain_gemm=True)
        return {name: self._known[name] for name in cases}


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """That of the store; nothing is known of any checkpoint before."""
    from tokenpool.host.load import shared_weights
    from tokenpool.node_store.place import folder_of

    monkeypatch.setattr(shared_weights, "KnownProofs", partial(shared_weights.KnownProofs, tmp_path / "proofs"))
    place = folder_of(STORE)
    yield place
    kill_keeper(place)
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each checkpoint was read, by vLLM's loader or without it."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from tokenpool.host.load.straight_read import StraightRead
    from tokenpool.patches import apply_all

    apply_all()  # it looks whether that function is vLLM's
    counted: Counter[str] = Counter()
    get_all = DefaultModelLoader.get_all_weights

    def count(self: Any, model_config: Any, model: Any) -> Any:
        counted[Path(model_config.model).name] += 1
        return get_all(self, model_config, model)

    read = StraightRead.read

    def count_straight(self: Any, *args: Any) -> None:
        counted[next(Path(path).parent.name for path in self._calls)] += 1
        read(self, *args)

    monkeypatch.setattr(DefaultModelLoader, "get_all_weights", count)
    monkeypatch.setattr(StraightRead, "read", count_straight)
    return counted


@contextlib.contextmanager
def pool_of(*cases: Case, host_store: str = STORE) -> Iterator[Any]:
    from tests.helpers.pooled import PooledModels

    pooled = PooledModels(MEMORY, PAGE, poison=True, movable_weights=True, host_memory=1 << 30, host_store=host_store)
    try:
        for case in cases:
            pooled.add(case)
        yield pooled
        pooled.check()
    finally:
        pooled.close()
    assert {} == pooled.host.host_ledger.snapshot()


def assert_equal(pooled: Any, cases: dict[str, Case], reference: Reference) -> None:
    for case in cases.values():
        pooled.submit(case)
    pooled.run()
    for name, wanted in reference.of(cases).items():
        actual = pooled.results(name)
        for request_id, want in wanted.items():
            assert want.tokens == actual[request_id].tokens, f"{request_id}: tokens differ"
            assert want.logprobs == actual[request_id].logprobs, f"{request_id}: logprobs differ"


@pytest.mark.parametrize("kinds", [("qwen3",), pytest.param(KINDS, marks=pytest.mark.slow)], ids=["one", "all"])
def test_the_second_host_reads_nothing(cases, reference, reads, folder, kinds):
    """It maps what the first has left, but for a model with adapters; each gives the tokens of plain vLLM."""
    cases = {kind: cases[kind] for kind in kinds}
    with pool_of(*cases.values()) as pooled:
        names = {Path(case.model).name for case in cases.values()}
        assert {name: 2 for name in names} == reads, "once to load it, once to prove that it can be read again"
        sizes = [pooled.host.weights.bytes_of(name) for name in cases if name != "llama"]
        assert_equal(pooled, cases, reference)
        found = book(folder)
        assert (sorted(sizes), 1) == (sorted(c["bytes"] for c in found["copies"].values()), found["hosts"])
    reads.clear()
    with pool_of(*cases.values()) as pooled:
        assert reads == ({"llama": 2} if "llama" in cases else {})
        assert pooled.host.node.shared_bytes == sum(sizes)
        assert all(view.droppable for view in pooled.host.weights.snapshot().values())
        assert_equal(pooled, cases, reference)
        for name in cases:
            pooled.host.weights.verify(name)
            assert "auto" == pooled.host.models[name].core.vllm_config.load_config.load_format


def test_a_copy_that_was_given_up_is_mapped_again(cases, reference, reads):
    """While the node has it; else it is read, and the node has it again."""
    case = cases["qwen3"]
    with pool_of(case) as pooled:
        store, node, name = pooled.host.weights, pooled.host.node, case.name
        nbytes = store.bytes_of(name)
        store.evict(name)
        reads.clear()
        for expected in (0, 1):
            store.drop_host(name)
            assert 0 == node.shared_bytes
            pooled.check()
            if expected:
                for budget in (1 << 20, 1 << 30):  # what nobody holds goes
                    node.set_budget(budget)
                    node.show()
            assert store.load_host(name).wait(60)
            store.finish(name)
            assert (expected, nbytes) == (reads.total(), node.shared_bytes)
            pooled.check()
        store.map(name)
        store.copy(name).wait(60)
        store.finish(name)
        assert_equal(pooled, {name: case}, reference)


@pytest.mark.slow
def test_what_others_want_is_given_up_while_it_is_idle(cases, reference, folder):
    """A model with requests keeps its copy; the others' are the node's to evict, and come back when they are needed."""
    names = ("mixtral", "qwen3", "gemma3")
    with pool_of(*(cases[name] for name in names)) as pooled:
        pooled.submit(cases["qwen3"])
        pooled.run_once()
        pooled.host.residency.room.host.give_back(1 << 30)
        pooled.host.node.show()  # the keeper knows
        ledger, weights = pooled.host.host_ledger, pooled.host.weights
        assert ["qwen3"] == [name for name in names if ledger.held(name, "weights") >= weights.bytes_of(name)]
        assert [0, 0, 1] == sorted(copy["hosts"] for copy in book(folder)["copies"].values())
        pooled.check()
        pooled.run()
        assert_equal(pooled, {name: cases[name] for name in ("mixtral", "gemma3")}, reference)


@pytest.mark.slow
def test_what_was_shown_of_a_checkpoint_is_not_shown_twice(cases, reads, folder):
    """The next keeper knows no copies; the checkpoint is read once, to load it. One that was changed is tried anew."""
    case = cases["gemma3"]
    with pool_of(case) as pooled:
        assert 2 == reads.total()
    for path, expected in ((None, 1), (Path(case.model, "config.json"), 2)):
        os.kill(book(folder)["pid"], signal.SIGKILL)
        if path is not None:
            os.utime(path)
        reads.clear()
        with pool_of(case) as pooled:
            assert expected == reads.total()
            assert pooled.host.weights.snapshot()[case.name].droppable


def test_a_host_without_a_store_does_not_show_it_twice_either(cases, reads):
    """It reads the checkpoint to load it, and gives its copy up and reads it again as one that has tried."""
    case = cases["qwen3"]
    for expected, touched in ((2, ()), (1, ()), (2, ("config.json",))):
        for name in touched:
            os.utime(Path(case.model, name))
        reads.clear()
        with pool_of(case, host_store="") as pooled:
            assert expected == reads.total()
            store = pooled.host.weights
            assert store.snapshot()[case.name].droppable
            store.evict(case.name)
            store.drop_host(case.name)
            assert store.load_host(case.name).wait(60)
            store.finish(case.name)
            store.map(case.name)
            store.copy(case.name).wait(60)
            store.finish(case.name)
            assert expected + 1 == reads.total()
            store.verify(case.name)


@pytest.mark.slow
def test_a_copy_that_computes_something_else_is_not_used(cases, reference, reads, monkeypatch):
    """The model is built again, from the checkpoint, with a copy of its own."""
    from tokenpool.host.load.adoption_check import AdoptionCheck

    case = cases["mixtral"]
    with pool_of(case):
        reads.clear()
    alone = AdoptionCheck.alone

    def differs(self: Any) -> None:
        alone(self)
        self.outputs = self.outputs[::-1]

    monkeypatch.setattr(AdoptionCheck, "alone", differs)
    with pool_of(case) as pooled:
        assert 2 == reads.total()
        assert 0 == pooled.host.node.shared_bytes
        assert_equal(pooled, {case.name: case}, reference)


def test_a_host_without_a_keeper_does_it_all_itself(cases, reference, reads, monkeypatch):
    """It cannot be started: weights are read, proven and kept as without a store."""
    from tokenpool.errors import HostError
    from tokenpool.node_store import client, line

    def fails(folder: Path) -> None:
        raise HostError("no process is left")

    monkeypatch.setattr(line, "start_keeper", fails)
    monkeypatch.setattr(client, "BEGIN_LIMIT_S", 0.1)
    case = cases["qwen3"]
    with pool_of(case) as pooled:
        store, name = pooled.host.weights, case.name
        assert 0 == pooled.host.node.shared_bytes
        store.evict(name)
        store.drop_host(name)
        assert store.load_host(name).wait(60)
        store.finish(name)
        pooled.check()
        store.map(name)
        store.copy(name).wait(60)
        store.finish(name)
        assert_equal(pooled, {name: case}, reference)


def test_contents_differ_where_bytes_may(cases, tmp_path):
    """Another file in its place, even with the same size and time, or other flags: another content."""
    from vllm.engine.arg_utils import EngineArgs

    from tokenpool.host.load.content import content_key

    model = tmp_path / "model"
    shutil.copytree(cases["qwen3"].model, model)

    def key(**args: Any) -> str | None:
        config = EngineArgs(**{"model": str(model), "max_model_len": 512, "dtype": "bfloat16", **args})
        return content_key(config.create_engine_config())

    keys = [key()]
    assert keys[0] is not None and keys[0] == key() == key(max_num_seqs=3)
    keys += [key(dtype="float32"), key(max_model_len=256), key(hf_overrides={"rope_theta": 5.0})]
    weights = next(model.glob("*.safetensors"))
    times = weights.stat()
    (model / "new").write_bytes(weights.read_bytes())
    os.utime(model / "new", ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(model / "new", weights)
    keys.append(key())
    weights.write_bytes(weights.read_bytes())
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    keys.append(key())
    assert len(keys) == len(set(keys)) and None not in keys
    assert None is key(load_format="dummy")
    assert None is key(enable_lora=True)
    shutil.rmtree(model)
    shutil.copytree(cases["qwen3"].model, model)
    assert key() not in keys
