# SPDX-License-Identifier: Apache-2.0
"""What of a model moves: parameters, buffers and their aliases, but nothing that changes at run time and no KV."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tokenpool.host.load.model_tensors import fixed_bytes, fixed_tensors, movable_tensors, reachable_tensors

pytestmark = pytest.mark.cpu


class Config:
    """Leads to the whole process, as an engine's config does."""

    __module__ = "vllm.config.test"

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class Slotted:
    __slots__ = ("inside", "unset")

    def __init__(self, inside: torch.Tensor) -> None:
        self.inside = inside


def parameter(size: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(size), requires_grad=False)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = parameter(100)
        self.bias = None
        self.register_buffer("table", torch.zeros(10), persistent=False)
        self.register_buffer("_k_scale", torch.tensor(1.0))
        self.kv_cache = torch.zeros(10_000)


def ids(tensors: list[torch.Tensor]) -> list[int]:
    return [id(tensor) for tensor in tensors]


def test_parameters_and_buffers_move_in_the_order_of_the_modules():
    """Each once, tied ones too; scales that may change stay."""
    model = torch.nn.ModuleList([Layer(), Layer()])
    model[1].tied = model[0].weight
    expected = [model[0].weight, model[0].table, model[1].weight, model[1].table]
    assert ids(expected) == ids(movable_tensors(model))
    assert ids(expected) == ids(movable_tensors(model, model[1]))
    assert {"ModuleList.0._k_scale": 4, "ModuleList.1._k_scale": 4} == fixed_tensors(model)


def test_what_views_a_movable_storage_moves_with_it():
    """A slice in a list, a transposed view in a closure: they would else keep the old memory alive."""
    model = Layer()
    model.parts = [model.weight[:50], {"half": model.weight[50:]}]
    turned = model.weight.view(10, 10).t()
    model.compute = lambda x: x @ turned
    expected = [model.weight, model.table, model.parts[0], model.parts[1]["half"], turned]
    assert sorted(ids(expected)) == sorted(ids(movable_tensors(model)))
    assert 4 == fixed_bytes(model)


def test_a_storage_with_a_changing_tensor_stays_whole():
    """A scale that is a view of a parameter keeps that parameter on the device."""
    model = Layer()
    model._k_scale = model.weight.data[:1]
    assert ids([model.table]) == ids(movable_tensors(model))
    assert 400 == fixed_bytes(model)


def closure_over(hidden: torch.Tensor) -> Any:
    return lambda x: x + hidden


class Adder:
    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden

    def add(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.hidden


HIDING_PLACES = {
    "a tuple": lambda hidden: (hidden, hidden[:1]),
    "a dictionary": lambda hidden: {"key": [{hidden}]},
    "slots": Slotted,
    "a closure": closure_over,
    "a default": lambda hidden: lambda x, y=hidden: x + y,
    "a keyword default": lambda hidden: lambda x, *, y=hidden: x + y,
    "a method's object": lambda hidden: Adder(hidden).add,
    "a method of the tensor": lambda hidden: hidden.add,
    "a partial function": lambda hidden: functools.partial(torch.add, hidden),
    "an attribute of a parameter": lambda hidden: setattr(extra := parameter(0), "scale", hidden) or extra,
}


@pytest.mark.parametrize("place", HIDING_PLACES)
def test_fixed_tensors_are_found_wherever_python_keeps_them(place):
    """Each storage counts once."""
    model = Layer()
    model.hiding = HIDING_PLACES[place](torch.zeros(64))
    assert 4 + 64 * 4 == fixed_bytes(model)


def test_configs_and_kv_caches_are_not_searched():
    """They lead to other models and to the arena."""
    model = Layer()
    model.config = Config(other=torch.zeros(1000))
    assert 4 == fixed_bytes(model)
    assert not [path for path, _ in reachable_tensors(model) if "kv_cache" in path or "config" in path]


def test_loops_and_tensors_without_bytes_do_no_harm():
    """A module that knows its parent, an empty tensor and a meta tensor."""
    model = Layer()
    model.myself = [model]
    model.empty, model.meta = torch.empty(0), torch.empty(5, device="meta")
    model.skipped = torch.nn.Parameter(torch.empty(5, device="meta"), requires_grad=False)
    assert ids([model.weight, model.table]) == ids(movable_tensors(model))
    assert 4 == fixed_bytes(model)
