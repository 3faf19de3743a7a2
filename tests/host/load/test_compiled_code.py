# SPDX-License-Identifier: Apache-2.0
"""A model is compiled in a process of its own while others go on, once for all fine-tunes of its architecture."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cases import greedy, make_cases
from tests.helpers.plain import Case
from tests.helpers.server import is_running, poll
from tokenpool.demo.tiny_models import make_tiny_model
from tokenpool.errors import CapacityError

pytestmark = pytest.mark.vllm

COMPILED: dict[str, Any] = {"enforce_eager": False}
TRACED = {**COMPILED, "compilation_config": {"mode": 2, "backend": "eager"}}
"""Compiled without a compiler of C++."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder of vLLM, for this process and its children."""
    from tokenpool.host.engine.process_choices import variables_read_anew

    folder = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(folder))
        with variables_read_anew():
            pass
        yield folder
    with variables_read_anew():
        pass


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return make_cases(tmp_path, ("llama",), greedy(2, 20))["llama"]


def code_of(spec: Any) -> Any:
    from tokenpool.host.load.compiled_code import CompiledCode

    return CompiledCode(spec.name, spec.vllm_config, movable_weights=True)


def libraries(cache: Path) -> set[str]:
    """What a compiler of C++ has made so far, named by its source."""
    return {path.name for path in cache.rglob("*.so")}


@pytest.mark.slow
def test_a_fine_tune_loads_what_another_has_compiled(tmp_path, cache, case, monkeypatch):
    """In the way of a GPU, by pieces and all ahead: nothing is compiled, and its tokens are its own."""
    from vllm.compilation.counter import compilation_counter
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.config import CompilationMode

    from tests.helpers.pooled import PooledModels, make_spec
    from tokenpool.host.engine.process_choices import variables_read_anew

    # It looks graphs through for operators that vLLM's build for the CPU does not even have names for.
    monkeypatch.setattr(FixFunctionalizationPass, "__call__", lambda self, graph: None)

    def run(*names: str) -> tuple[dict[str, Any], list[tuple[int, int]]]:
        """What requests get, and how often code was compiled and loaded for each model."""
        pooled, seen = PooledModels(24 << 20, 256 << 10, movable_weights=True), []
        for name in names:
            tune = replace(case, name=name, model=str(tmp_path / name))
            spec, before = make_spec(tune, **COMPILED), replace(compilation_counter)
            choice = spec.vllm_config.compilation_config
            choice.mode, choice.compile_sizes = CompilationMode.VLLM_COMPILE, []
            choice.splitting_ops = list(choice._attention_ops)
            pooled.host.add_model(spec)
            pooled.submit(tune)
            counted = ("num_aot_compiles", "num_aot_artifacts_loaded")
            seen.append(tuple(getattr(compilation_counter, key) - getattr(before, key) for key in counted))
        pooled.run()
        found = {name: pooled.results(name) for name in names}
        pooled.close()
        return found, seen

    for seed, name in enumerate(("one", "other"), start=5):
        make_tiny_model("llama", tmp_path / name, seed=seed)
    alone, compiled_alone = run("other")
    assert [(1, 0)] == compiled_alone
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(cache / "another"))
        with variables_read_anew():
            pass
        both, compiled_both = run("one", "other")
    assert [(1, 0), (0, 1)] == compiled_both
    assert alone["other"] == both["other"] != both["one"]


@pytest.mark.slow
def test_others_go_on_while_a_model_is_compiled(tmp_path, cache, case):
    """The build then compiles nothing, nor does that of a fine-tune."""
    from tests.helpers.pooled import PooledModels, make_spec

    names = ("one", "other")
    tunes = {
        name: replace(case, name=name, model=str(make_tiny_model("llama", tmp_path / name, seed=seed)))
        for seed, name in enumerate(names, start=5)
    }
    pooled = PooledModels(24 << 20, 256 << 10, movable_weights=True)
    host, steps = pooled.host, 0
    pooled.add(replace(case, name="stays"))
    specs = {name: make_spec(tune, **COMPILED) for name, tune in tunes.items()}
    codes = {name: code_of(spec) for name, spec in specs.items()}
    assert all(code.is_missing for code in codes.values())
    with ThreadPoolExecutor(1) as side:
        done = side.submit(codes["one"].make_aside)
        while not done.done():
            if not host.models["stays"].core.has_work():
                pooled.submit(replace(case, name="stays"))
            steps += pooled.run_once()
    assert done.result()
    assert steps > 100
    assert not any(code.is_missing for code in codes.values()), "fine-tunes do not share what is compiled"
    before = libraries(cache)
    assert before
    for name in names:
        building = host.build_beside(lambda name=name: host.add_model(specs[name]))
        while not building.done():
            pooled.run_once()
            host.build_on()
        building.result()
        pooled.submit(tunes[name])
    pooled.run()
    assert before == libraries(cache)
    one, other = ({key: result.tokens for key, result in pooled.results(name).items()} for name in names)
    assert {20} == {len(tokens) for tokens in (*one.values(), *other.values())}
    assert one != other
    pooled.close()


def test_a_rank_that_fails_ends_those_that_wait_for_it(tmp_path, cache):
    """At once: they would wait until the limit, and nobody else would compile."""
    from tests.helpers.pooled import make_spec

    case = make_cases(tmp_path, ("llama",), greedy(2, 20), tensor_parallel_size=2)["llama"]
    told = tmp_path / "pid"
    waits, fails = f"echo $$ > {told}; sleep 1000", f"until [ -s {told} ]; do sleep 0.1; done; exit 3"
    fails_alone = f"if [ $1 = 0 ]; then {waits}; else {fails}; fi"
    code = code_of(make_spec(case, **TRACED))
    assert not code.make_aside(("sh", "-c", fails_alone, "sh"))
    assert code.is_missing
    assert not is_running(int(told.read_text()))


@pytest.mark.parametrize(
    "command",
    [
        pytest.param((sys.executable, "-c", "raise SystemExit(3)"), marks=pytest.mark.slow),
        pytest.param((sys.executable, "-c", "import os; os.abort()"), marks=pytest.mark.slow),
        (sys.executable, "-c", "import sys; sys.stdin.close(); raise SystemExit(3)"),
        ("/no/such/program",),
    ],
    ids=["ends", "dies", "reads nothing", "is not there"],
)
def test_a_process_that_fails_costs_nothing_else(cache, case, command):
    """The build compiles by itself, and then it is known that the code is there."""
    from torch._dynamo import convert_frame

    from tests.helpers.pooled import PooledModels, make_spec

    pooled = PooledModels(16 << 20, 256 << 10, movable_weights=True)
    spec = make_spec(case, **TRACED)
    code, before = code_of(spec), len(convert_frame._bytecode_hooks)
    assert not code.make_aside(command)
    assert code.is_missing
    pooled.host.add_model(spec)
    code.note_made()
    assert before + 1 == len(convert_frame._bytecode_hooks), "it is not compiled: the test proves nothing"
    assert not code.is_missing and not code_of(make_spec(case, **TRACED)).is_missing
    assert code.make_aside(command), "it is tried although the code is there"
    pooled.submit(case)
    pooled.run()
    pooled.close()


def test_a_process_that_hangs_is_ended_with_its_children(tmp_path, cache, case):
    """Nobody waits for it longer than the limit."""
    from tests.helpers.pooled import make_spec

    told = tmp_path / "pids"
    hangs = f"sleep 1000 & echo $$ $! > {told}; wait"
    code = code_of(make_spec(case, **TRACED))
    assert not code.make_aside(("sh", "-c", hangs), limit_s=3.0)
    pids = [int(pid) for pid in told.read_text().split()]
    assert 2 == len(pids)
    for pid in pids:
        poll(lambda pid=pid: not is_running(pid))


def test_a_model_that_is_not_compiled_needs_no_process(cache, case):
    """Nothing is missing, and nothing is written."""
    from tests.helpers.pooled import make_spec

    code = code_of(make_spec(case))
    assert not code.is_missing
    assert code.make_aside(("/no/such/program",))
    assert not cache.exists()


def test_a_model_whose_blocks_no_page_holds_is_refused_before_it_is_compiled_aside(cache, case):
    """The process tells how large they are as soon as it knows, and is ended."""
    from tests.helpers.pooled import PooledModels, make_spec

    pooled = PooledModels(16 << 20, 4 << 10, movable_weights=True)
    code, told = code_of(make_spec(case, **COMPILED)), []

    def check(block_bytes: int) -> None:
        told.append(block_bytes)
        pooled.host.allocator.arena.place_of(case.name, block_bytes)

    with pytest.raises(CapacityError, match="more than page_size 4096; raise page_size"):
        code.make_aside(check=check)
    assert code.is_missing and not libraries(cache)
    assert len(told) == 1 and told[0] > 4096
    pooled.close()


@pytest.mark.parametrize("page_kib", [4, 256])
def test_the_size_of_a_block_is_known_before_the_model_is_compiled(cache, case, page_kib):
    """Where it is compiled while it is built, as the first model is; and it is the size that vLLM then plans."""
    from torch._dynamo import convert_frame

    from tests.helpers.pooled import PooledModels, make_spec
    from tokenpool.host.load.model_build import ModelBuild

    told: list[int] = []
    expect = ModelBuild.expect_blocks
    pooled = PooledModels(16 << 20, page_kib << 10, movable_weights=True)
    before = len(convert_frame._bytecode_hooks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelBuild, "expect_blocks", lambda self, size: (told.append(size), expect(self, size)))
        if page_kib == 4:
            with pytest.raises(CapacityError, match="more than page_size"):
                pooled.host.add_model(make_spec(case, **TRACED))
            assert len(convert_frame._bytecode_hooks) == before, "it was compiled"
        else:
            pooled.host.add_model(make_spec(case, **TRACED))
            assert told == [pooled.host.models[case.name].build.view.block_bytes]
    assert len(told) == 1 and told[0] > 0
    pooled.close()
