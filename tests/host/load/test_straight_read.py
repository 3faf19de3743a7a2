# SPDX-License-Identifier: Apache-2.0
"""Bytes of files are read to where a load has copied them, for random loads; other loads are told from them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from tokenpool.host.load.straight_read import CopiesOfFiles, StraightRead

pytestmark = pytest.mark.vllm

DTYPES = (torch.float32, torch.bfloat16, torch.int8)


def _loads() -> st.SearchStrategy[list[tuple[int, int, int, torch.dtype]]]:
    """Rows of three tensors of the file that become one of the model, their columns and their type."""
    rows = st.integers(1, 700)
    return st.lists(st.tuples(rows, rows, st.integers(1, 70), st.sampled_from(DTYPES)), min_size=1, max_size=5)


def _random(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-100, 100, (rows, columns)).to(dtype)


def _write(folder: Path, loads: list[tuple[int, int, int, torch.dtype]], num_files: int) -> list[Path]:
    paths = []
    for number in range(num_files):
        tensors = {}
        for index, (first, second, columns, dtype) in enumerate(loads):
            if index % num_files == number:
                tensors[f"{index}.a"] = _random(first, columns, dtype)
                tensors[f"{index}.b"] = _random(second, columns, dtype)
                tensors[f"{index}.unused"] = _random(3, columns, dtype)
        paths.append(folder / f"{number}.safetensors")
        save_file(tensors, paths[-1])
    return paths


def _load(paths: list[Path], model: list[torch.Tensor]) -> None:
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                index, part = name.split(".")
                target, source = model[int(index)], file.get_tensor(name)
                if part == "a":
                    target.narrow(0, 0, len(source)).copy_(source)
                elif part == "b":
                    target.narrow(0, len(target) - len(source), len(source)).copy_(source)


def _empty(loads: list[tuple[int, int, int, torch.dtype]]) -> list[torch.Tensor]:
    return [torch.zeros(first + second, columns, dtype=dtype) for first, second, columns, dtype in loads]


def _nothing(_: object) -> None:
    pass


def _plan(paths: list[Path], model: list[torch.Tensor]) -> StraightRead | None:
    copies = CopiesOfFiles(model)
    with copies:
        _load(paths, model)
    return copies.plan()


@given(loads=_loads(), num_files=st.integers(1, 3), moved=st.booleans())
def test_reads_what_was_loaded(
    loads: list[tuple[int, int, int, torch.dtype]], num_files: int, moved: bool, tmp_path_factory: Any
) -> None:
    paths = _write(tmp_path_factory.mktemp("files"), loads, num_files)
    model = _empty(loads)
    plan = _plan(paths, model)
    assert plan is not None and plan.is_on_host()
    expected = [tensor.clone() for tensor in model]
    for tensor in model:  # as another buffer that tensors are pointed into
        tensor.data = torch.zeros_like(tensor) if moved else tensor.data.zero_()
    done: list[int] = []
    whole: list[torch.Tensor] = []
    plan.read(done.append, whole.append)
    assert {id(tensor) for tensor in whole} == {id(tensor) for tensor in model} and len(whole) == len(model)
    assert all(torch.equal(a, b) for a, b in zip(model, expected, strict=True))
    assert sum(done) == sum(tensor.nbytes for tensor in model)


LOADS = [(40, 30, 8, torch.float32), (20, 20, 16, torch.bfloat16)]


def _scale(paths: list[Path], model: list[torch.Tensor]) -> None:
    _load(paths, model)
    model[1].mul_(2)


def _convert(paths: list[Path], model: list[torch.Tensor]) -> None:
    with safe_open(paths[0], framework="pt") as file:
        model[0].narrow(0, 0, 40).copy_(file.get_tensor("0.a").to(torch.bfloat16))


def _mostly_changed(paths: list[Path], model: list[torch.Tensor]) -> None:
    with safe_open(paths[0], framework="pt") as file:
        model[0].narrow(0, 0, 8).copy_(file.get_tensor("0.a")[:8].t())


def _twice(paths: list[Path], model: list[torch.Tensor]) -> None:
    _load(paths, model)
    _load(paths, model)


def _part(paths: list[Path], model: list[torch.Tensor]) -> None:
    _load(paths, model)
    model[0][3:5].zero_()


def _list(paths: list[Path], model: list[torch.Tensor]) -> None:
    _load(paths, model)
    torch._foreach_add_(model, 1.0)


@pytest.mark.parametrize("load", [_scale, _convert, _mostly_changed, _twice, _part, _list])
def test_tells_other_loads(load: Callable[[list[Path], list[torch.Tensor]], None], tmp_path: Path) -> None:
    paths, model = _write(tmp_path, LOADS, 1), _empty(LOADS)
    copies = CopiesOfFiles(model)
    with copies:
        load(paths, model)
    assert copies.plan() is None


CHANGES = (lambda t: t, lambda t: t.t(), lambda t: t[:, ::2], lambda t: t[3], lambda t: t[3, 5])


@pytest.mark.parametrize("change", CHANGES)
def test_some_copies_change_type_or_order(change: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path) -> None:
    loads = [(900, 800, 64, torch.bfloat16), (20, 20, 16, torch.bfloat16)]
    paths = _write(tmp_path, loads, 1)
    shape = change(torch.empty(20, 16)).shape
    model = [_empty(loads)[0], torch.zeros(*shape, 2)[..., 1]]
    copies = CopiesOfFiles(model)
    with copies:
        _load(paths, [model[0], torch.zeros(40, 16)])
        with safe_open(paths[0], framework="pt") as file:
            model[1].copy_(change(file.get_tensor("1.b")))
    plan = copies.plan()
    assert plan is not None
    expected = [tensor.clone() for tensor in model]
    for tensor in model:
        tensor.zero_()
    plan.read(_nothing, _nothing)
    assert all(torch.equal(a, b) for a, b in zip(model, expected, strict=True))


def test_a_clone_of_what_a_file_has(tmp_path: Path) -> None:
    paths, model = _write(tmp_path, LOADS, 1), _empty(LOADS)
    for is_changed in (False, True):
        copies = CopiesOfFiles(model)
        with copies, safe_open(paths[0], framework="pt") as file:
            clone = file.get_tensor("0.a").clone()
            if is_changed:
                clone.add_(1)
            model[0].narrow(0, 30, 40).copy_(clone)
        assert (copies.plan() is None) == is_changed


def test_other_threads_are_not_noted(tmp_path: Path) -> None:
    paths, model = _write(tmp_path, LOADS, 1), _empty(LOADS)
    copies = CopiesOfFiles(model)
    with copies:
        thread = threading.Thread(target=model[0].zero_)
        thread.start()
        thread.join()
        _load(paths, model)
    assert copies.plan() is not None


def test_a_write_that_torch_does_not_see(tmp_path: Path) -> None:
    paths, model = _write(tmp_path, LOADS, 1), _empty(LOADS)
    copies = CopiesOfFiles(model)
    with copies:
        _load(paths, model)
        model[0].numpy()[:] = 3.5
    assert copies.plan() is None


def test_a_file_that_is_cut_off_or_gone(tmp_path: Path) -> None:
    paths, model = _write(tmp_path, LOADS, 2), _empty(LOADS)
    plan = _plan(paths, model)
    assert plan is not None
    whole = paths[1].read_bytes()
    other = tmp_path / "other"
    other.write_bytes(whole[:-500])
    other.rename(paths[1])
    with pytest.raises(OSError, match="shorter than it was"):
        plan.read(_nothing, _nothing)
    paths[1].unlink()
    with pytest.raises(FileNotFoundError):
        plan.read(_nothing, _nothing)
