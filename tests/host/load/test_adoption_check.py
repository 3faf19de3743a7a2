# SPDX-License-Identifier: Apache-2.0
"""A model that reads what its weights have left is found out, by layer; one that does not is left as it was."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.devices.weight_rig import Rig
from tokenpool.host.load.adoption_check import AdoptionCheck
from tokenpool.host.load.model_tensors import movable_tensors
from tokenpool.memory.loader_memory import LoaderMemory

pytestmark = pytest.mark.vllm

SIZE = 8


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(SIZE, SIZE), requires_grad=False)
        self.read: Callable[[], torch.Tensor] = lambda: self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.read())


class Draft(torch.nn.Module):
    """Its head is no part of what vLLM runs before it serves."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Layer(), Layer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)

    def compute_logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


class Attention(torch.nn.Module):
    """Without a KV cache it gives whatever is in memory."""

    def get_attn_backend(self) -> None: ...

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.random.default_rng().random(x.shape, np.float32))


class Mixer(Attention):
    """Without its states it hands on whatever is in memory, which stays the same for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.calls = Layer(), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.norm(x + min(self.calls, 2))


class Model(torch.nn.Module):
    """A compiled class of vLLM, whose call does not go through torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(), Attention(), Layer()])
        self.head = Layer()
        self.do_not_compile = False
        self.seen: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(self.do_not_compile)
        for layer in self.layers:
            x = layer(x)
        return x

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden)


class Runner:
    """Has of vLLM's first model runner what the check uses."""

    is_pooling_model = False
    max_num_tokens = 16

    def __init__(self, model: Model, draft: Draft | None = None) -> None:
        self.model, self.draft = model, draft
        self.drafter = SimpleNamespace(hidden_size=SIZE)
        self.options: dict[str, Any] = {}

    def _dummy_run(
        self, num_tokens: int, skip_eplb: bool = False, is_profile: bool = False, randomize_inputs: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.options = {"skip_eplb": skip_eplb, "is_profile": is_profile, "randomize_inputs": randomize_inputs}
        x = torch.randn(num_tokens, SIZE)
        hidden = self.model(x)
        if self.draft is not None:
            self.draft(hidden)
        return hidden, hidden[-1:]

    def _dummy_pooler_run(self, hidden: torch.Tensor) -> None:
        self.model.head(hidden)


class SecondRunner(Runner):
    """Takes what it does not know, as vLLM's second one does."""

    def _dummy_run(
        self, num_tokens: int, *args: Any, skip_attn: bool = False, is_profile: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert skip_attn and is_profile
        hidden = self.model(torch.randn(num_tokens, SIZE))
        return hidden, hidden[-1:]


def raw_reader(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Reads where the tensor is now, for ever, as a handle of C++ does; keeps nothing alive."""
    address, nbytes, shape = tensor.data_ptr(), tensor.nbytes, tensor.shape
    return lambda: torch.frombuffer(bytearray(ctypes.string_at(address, nbytes)), dtype=torch.float32).view(shape)


def hidden_alias(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A second tensor over the storage, where nobody looks: it keeps the old memory alive."""
    opaque = type("Opaque", (), {"__module__": "vllm.config.test"})()
    opaque.tensor = tensor.data.view(tensor.shape)
    return lambda: opaque.tensor


def move(runner: Runner, *models: torch.nn.Module) -> str | None:
    """Adopt as ModelBuild does; what the check finds."""
    rig = Rig()
    check = AdoptionCheck(runner, models)
    check.before()
    tensors = movable_tensors(*models)
    loaded = LoaderMemory(tensors)
    rig.store.adopt("m", tensors, give_up=loaded.poison)
    found = check.first_difference()
    loaded.free()
    assert check.seconds > 0
    rig.store.close()
    return found


@pytest.mark.parametrize("kind", [Runner, SecondRunner])
def test_a_model_that_follows_its_weights_passes(kind):
    """Although attention gives something else each time; nothing is compiled meanwhile, and it may be afterwards."""
    model = Model()
    runner = kind(model)
    assert move(runner, model) is None
    assert [True, True] == model.seen
    assert not model.do_not_compile
    assert not any(module._forward_hooks for module in model.modules())
    if kind is Runner:
        assert {"skip_eplb": True, "is_profile": True, "randomize_inputs": True} == runner.options


@pytest.mark.parametrize("keep", [raw_reader, hidden_alias])
@pytest.mark.parametrize(
    ("choose", "path"),
    [
        (lambda model: model.layers[0], "model layers.0"),
        (lambda model: model.layers[2], "model layers.2"),
        (lambda model: model.head, "model head"),
    ],
)
def test_a_layer_that_kept_a_pointer_is_named(keep, choose, path):
    """The first that gives something else: in the body, behind an attention layer, and in the head."""
    model = Model()
    layer = choose(model)
    layer.read = keep(layer.weight)
    assert path == move(Runner(model), model)


class Backend(Model):
    """As vLLM's backend for models of transformers: attention is no module of it, and is not called but forwarded."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(), Layer()])
        self.attention = {0: FewValues()}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(self.do_not_compile)
        return self.layers[1](self.attention[0].forward(self.layers[0](x)))


class FewValues(Attention):
    """What is in memory is one thing at first and another then, which looks like weights that were left."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.full_like(x, min(self.calls, 2))


class Whole(torch.nn.Module):
    """A module around a backend, given the same and giving what attention makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Backend()
        self.do_not_compile = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_attention_that_is_no_module_is_known_to_vllm():
    """It is given as one of vLLM's layers; without that, what it left in memory would be taken for a fault."""
    model = Whole()
    runner = Runner(model)
    check = AdoptionCheck(runner, [model], model.inner.attention.values())
    check.before()
    assert check.first_difference() is None
    assert "forward" not in vars(model.inner.attention[0])
    blind = Whole()
    check = AdoptionCheck(Runner(blind), [blind])
    check.before()
    assert check.first_difference() is not None


def test_heads_of_pooling_models_and_drafts_are_compared():
    """They are run and named too."""
    model = Model()
    model.head.read = raw_reader(model.head.weight)
    pooling = Runner(model)
    pooling.is_pooling_model = True
    assert "model head" == move(pooling, model)
    for name in ("body", "head"):
        model, draft = Model(), Draft()
        layer = getattr(draft, name)
        layer.read = raw_reader(layer.weight)
        assert f"draft model {name}" == move(Runner(model, draft), model, draft)


def test_what_does_not_repeat_itself_is_no_fault():
    """A kernel that adds in any order gives other bits each time: it cannot be compared, and nothing is refused."""
    model = Model()
    model.layers[0].read = lambda: torch.from_numpy(np.random.default_rng().random((SIZE, SIZE), np.float32))
    assert move(Runner(model), model) is None


def test_what_was_given_other_inputs_is_no_fault():
    """A layer inside of one that keeps a state, where that is memory which nobody has written."""
    model = Model()
    model.layers[1] = mixer = Mixer()
    assert move(Runner(model), model) is None
    assert 3 == mixer.calls


def test_random_numbers_go_on_as_if_nothing_had_been(monkeypatch):
    """Of torch, NumPy and Python, also when a run fails; hooks and flags are taken back."""
    model = Model()
    runner = Runner(model)
    check = AdoptionCheck(runner, [model])

    def draw() -> tuple[float, float, float]:
        return torch.rand(1).item(), np.random.random(), random.random()

    def seed() -> None:
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)

    seed()
    expected = [draw(), draw(), draw()]
    seed()
    got = [draw()]
    check.before()
    got.append(draw())
    monkeypatch.setattr(runner, "_dummy_pooler_run", lambda hidden: SimpleNamespace().missing)
    runner.is_pooling_model = True
    with pytest.raises(AttributeError):
        check.before()
    got.append(draw())
    assert expected == got
    assert not model.do_not_compile
    assert not any(module._forward_hooks for module in model.modules())
