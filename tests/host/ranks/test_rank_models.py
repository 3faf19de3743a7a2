# SPDX-License-Identifier: Apache-2.0
"""A rank that follows finds the places of a new model in what rank 0 does meanwhile, and notices when they differ."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tokenpool.errors import ModelRefusedError
from tokenpool.memory.devices.cpu import CpuDevice
from tokenpool.memory.devices.mirrored import Mirror, MirroredDevice

pytestmark = pytest.mark.vllm

PAGE = 64 << 10


@pytest.fixture
def told() -> Any:
    """Models that follow, the device whose calls they are told of, and the build of one."""
    from tokenpool.host.ranks.rank_models import RankModels, _FollowedBuild

    messages: list[tuple[Any, ...]] = []
    models = object.__new__(RankModels)
    models.mirror, models.next_message = Mirror(CpuDevice()), lambda: messages.pop(0)
    device = MirroredDevice(CpuDevice(), lambda name, args: messages.append(("device", 0, name, args)))
    return SimpleNamespace(messages=messages, device=device, build=_FollowedBuild("llama", models, True))


def test_weights_go_where_rank_0_has_them(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenpool.host.ranks import rank_models

    model = torch.nn.Linear(16, 16, bias=False)
    before = model.weight.detach().clone()
    monkeypatch.setattr(rank_models, "models_of", lambda _: [model])
    nbytes = rank_models.WeightLayout(rank_models.movable_tensors(model)).nbytes
    base = told.device.reserve(PAGE)
    buffer = told.device.host_buffer(nbytes)
    told.device.map_zeroed(base, PAGE)
    told.device.tensor(base, before.nbytes)
    told.build.adopt_weights(None)
    assert told.messages == []
    told.device.copy_in(base, buffer)
    told.build._models.mirror.do(*told.messages.pop()[2:])
    told.build._models.mirror.precede_compute()
    assert torch.equal(before, model.weight)


def test_weights_of_another_size_refuse_the_model(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: their places would be others from there on, and nothing would tell."""
    from tokenpool.host.ranks import rank_models

    monkeypatch.setattr(rank_models, "models_of", lambda _: [torch.nn.Linear(16, 16, bias=False)])
    told.device.host_buffer(4096)
    with pytest.raises(ModelRefusedError, match="weights of 4096 bytes on rank 0 and"):
        told.build.adopt_weights(None)


def test_a_rank_gives_up_when_rank_0_has_failed(told: Any) -> None:
    """Whatever it waits for."""
    told.messages.append(("failed", 3))
    with pytest.raises(RuntimeError, match="rank 0 failed"):
        told.build._models.follow_until("tensor")
