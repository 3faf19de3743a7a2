# SPDX-License-Identifier: Apache-2.0
"""What is kept of a model never leaves, whoever wants the room, and nobody is promised room that it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from tests.helpers.cases import greedy, make_cases
from tests.helpers.plain import Case
from tokenpool.errors import CapacityError
from tokenpool.memory.states import WeightState

pytestmark = pytest.mark.vllm

KINDS = ("qwen3", "gemma3", "mixtral")
"""Weights of 0.8, 1.5 and 1.9 MiB."""
PAGE = 256 << 10


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return make_cases(tmp_path_factory.mktemp("models"), KINDS, greedy(1, 20), max_model_len=256)


@contextmanager
def pool_of(
    cases: Mapping[str, Case], keep: Mapping[str, str | None], *, pages: int = 64, host_mib: float = 16
) -> Iterator[Any]:
    from tests.helpers.pooled import PooledModels, make_spec

    pooled = PooledModels(pages * PAGE, PAGE, movable_weights=True, host_memory=int(host_mib * (1 << 20)))
    try:
        for name, case in cases.items():
            pooled.host.add_model(replace(make_spec(case), keep=keep.get(name)))
        yield pooled
        pooled.check()
    finally:
        pooled.close()


@pytest.mark.parametrize("keep", [None, "host", "device"])
def test_what_is_kept_stays_while_others_take_turns(cases, keep) -> None:
    """On the device, or in host memory; what is not kept goes to the disk, and comes back for its turn."""
    seen: dict[str, set[WeightState]] = {name: set() for name in cases}
    with pool_of(cases, {"qwen3": keep}, pages=22, host_mib=4) as pooled:
        weights = pooled.host.weights

        def look(step: int = 0) -> None:
            for name, states in seen.items():
                states.add(weights.state(name))

        for name, case in list(cases.items()) * 3:
            request = replace(case.requests[0], request_id=f"{name}-{len(pooled.results(name))}")
            pooled.submit(replace(case, requests=[request]))
            pooled.run(each_step=look)
        assert {20} == {len(result.tokens) for name in cases for result in pooled.results(name).values()}
        if keep != "device":
            pooled.host.residency.room.leave(pooled.host.models["qwen3"])
            look()
        pooled.host.residency.room.host.give_back(1 << 30)
        look()
    left = {WeightState.ON_DISK, WeightState.READING}
    assert all(seen[name] & left for name in ("gemma3", "mixtral"))
    if keep is None:
        assert seen["qwen3"] & left
    elif keep == "host":
        assert not seen["qwen3"] & left and WeightState.IN_HOST in seen["qwen3"]
    else:
        assert {WeightState.ON_DEVICE} == seen["qwen3"]


@pytest.mark.parametrize("keep", ["host", "device"])
def test_a_model_that_could_never_be_read_beside_what_is_kept_is_refused(cases, keep) -> None:
    """Each fits into host memory alone, and so they take turns if nothing is kept."""
    two = {name: cases[name] for name in ("mixtral", "qwen3")}
    with pool_of(two, {}, host_mib=2.5):
        pass
    with (
        pytest.raises(CapacityError, match="could not be read into host memory beside"),
        pool_of(two, {"qwen3": keep}, host_mib=2.5),
    ):
        pass


def test_nobody_is_promised_pages_of_what_is_kept_on_the_device(cases) -> None:
    """A request of full length must fit beside it, also after a part of the device is lent."""
    with pool_of(cases, {}) as pooled:
        host = pooled.host
        room, pages = host.residency.room, host.weights.pages_of("gemma3")
        slabs, least = room.most_slabs_for("mixtral"), host.budget.state().device_memory_least
        host.weights.keep("gemma3", "host")
        assert slabs == room.most_slabs_for("mixtral")
        host.weights.keep("gemma3", "device")
        assert slabs - pages == room.most_slabs_for("mixtral")
        assert least + pages * PAGE == host.budget.state().device_memory_least
