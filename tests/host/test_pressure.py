# SPDX-License-Identifier: Apache-2.0
"""A floor is raised for a request that was refused memory, one at a time, and never outlives it."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.interface import PauseState

from tests.helpers.swapping import FakeModel, make_allocator
from tokenpool.host.pressure import PressureRelief

pytestmark = pytest.mark.vllm

BASE, PAGES, BLOCK = 1, 24, 8 << 10
MODELS = ("a", "b", "c")


class _Manager:
    """As much of vLLM's KV manager as a floor is computed from."""

    def __init__(self, pool: Any) -> None:
        self.block_pool = pool
        self.coordinator = SimpleNamespace(single_type_managers=[SimpleNamespace(block_size=16)])


def _hosted(name: str, pool: Any) -> Any:
    scheduler = SimpleNamespace(
        requests={}, _pause_state=PauseState.UNPAUSED, max_model_len=512, kv_cache_manager=_Manager(pool),
        num_spec_tokens=0, num_lookahead_tokens=0,
    )  # fmt: skip
    watch = SimpleNamespace(refused=None)
    return SimpleNamespace(name=name, asleep=None, core=SimpleNamespace(scheduler=scheduler, watch=watch))


class Rig:
    """Three models on a real allocator, and what their schedulers would say."""

    def __init__(self) -> None:
        self.allocator = make_allocator(PAGES)
        self.pools = {name: FakeModel(self.allocator, name, BLOCK, BASE).pool for name in MODELS}
        self.models = {name: _hosted(name, pool) for name, pool in self.pools.items()}
        self.raised: list[str] = []
        self.relief = PressureRelief(
            self.models, self.allocator, BASE, lambda name: PAGES, lambda name: self.raised.append(name)
        )
        self._count = 0

    def request(self, name: str, tokens: int = 200) -> str:
        self._count += 1
        request_id = f"{name}-{self._count}"
        self.models[name].core.scheduler.requests[request_id] = SimpleNamespace(
            num_prompt_tokens=tokens, max_tokens=8, mm_features=[]
        )
        return request_id

    def refuse(self, name: str, request_id: str) -> None:
        """A step of the model ran nothing, because its pool refused the request."""
        core = self.models[name].core
        core.watch.refused = request_id
        self.relief.after_step(name, core, False)
        core.watch.refused = None

    def end(self, name: str, request_id: str) -> None:
        del self.models[name].core.scheduler.requests[request_id]

    def remove(self, name: str) -> None:
        self.models[name].core.scheduler.requests.clear()
        del self.models[name]
        self.relief.forget(name)
        self.allocator.unregister(name)

    def floors(self) -> dict[str, int]:
        return {name: self.allocator._accounts[name].floor for name in self.models}


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_step_that_ran_nothing_without_a_refusal_is_no_hunger(rig):
    """A model whose requests wait for something else is neither starved nor kept from its next step."""
    rig.request("a")
    rig.relief.after_step("a", rig.models["a"].core, False)

    assert rig.relief.may_step("a")
    assert {} == rig.relief.starved


def test_a_refused_model_steps_again_when_the_memory_has_changed(rig):
    """Until then it would be refused again."""
    rig.refuse("a", rig.request("a"))
    assert not rig.relief.may_step("a")
    rig.allocator.version += 1

    assert rig.relief.may_step("a")


def test_the_model_that_starved_first_is_helped_first(rig):
    """Floors are raised one at a time, in the order of the refusals."""
    first, second = rig.request("b"), rig.request("a")
    rig.refuse("b", first)
    rig.refuse("a", second)
    rig.relief.review()
    assert "b" == rig.relief.raised
    rig.end("b", first)
    rig.relief.review()

    assert "a" == rig.relief.raised
    assert ["b", "a"] == rig.raised
    assert BASE == rig.floors()["b"]


@pytest.mark.parametrize("how", ["end", "pause", "remove"])
def test_a_raised_floor_ends_however_its_request_does(rig, how):
    """Abort, disconnect and failure take the request off the scheduler; a pause keeps it, and a removal takes both."""
    request_id, other = rig.request("a"), rig.request("b")
    rig.refuse("a", request_id)
    rig.refuse("b", other)
    rig.relief.review()
    assert rig.floors()["a"] > BASE
    version = rig.allocator.version
    if how == "end":
        rig.end("a", request_id)
    elif how == "pause":
        rig.models["a"].core.scheduler._pause_state = PauseState.PAUSED_ALL
    else:
        rig.remove("a")
    rig.relief.review()

    assert "b" == rig.relief.raised
    assert BASE == rig.floors().get("a", BASE)
    assert rig.allocator.version > version, "nobody would look again"


def test_the_floor_of_a_request_has_room_for_its_drafts(rig):
    """They get blocks past the last token that is asked for, to be verified and for the drafter to write."""
    floors = []
    for drafts in (0, 100):
        scheduler = rig.models["a"].core.scheduler
        scheduler.num_spec_tokens, scheduler.num_lookahead_tokens = drafts // 2, drafts // 2
        request_id = rig.request("a", 400)
        rig.refuse("a", request_id)
        rig.relief.review()
        floors.append(rig.floors()["a"])
        rig.end("a", request_id)
        rig.relief.review()

    assert floors[1] > floors[0]


@pytest.mark.parametrize("seed", range(20))
def test_at_any_time_the_raised_floor_is_that_of_a_request_which_waits(rig, seed):
    """Whatever starves, ends, pauses or goes: at most one floor is raised, for a request that is there."""
    rng = random.Random(seed)
    for _ in range(300):
        name = rng.choice(sorted(rig.models))
        requests = rig.models[name].core.scheduler.requests
        act = rng.random()
        if act < 0.4:
            rig.refuse(name, rng.choice(sorted(requests)) if requests and act < 0.2 else rig.request(name))
        elif act < 0.8 and requests:
            rig.end(name, rng.choice(sorted(requests)))
        elif act < 0.9:
            paused = rig.models[name].core.scheduler._pause_state is PauseState.UNPAUSED
            rig.models[name].core.scheduler._pause_state = PauseState.PAUSED_ALL if paused else PauseState.UNPAUSED
        elif act > 0.995 and len(rig.models) > 1:
            rig.remove(name)
        rig.relief.review()
        raised, starved = rig.relief.raised, rig.relief.starved
        assert {n for n, floor in rig.floors().items() if floor != BASE} <= {raised}
        assert (raised is None) == (not starved)
        for model, request_id in starved.items():
            assert request_id in rig.models[model].core.scheduler.requests
    rig.allocator.check()


def test_refused_models_yield_to_steps_of_others(rig: Rig) -> None:
    """After each refusal in a row to twice as many; not the one whose floor is raised, and none after its end."""
    first, second = rig.request("a"), rig.request("b")
    rig.refuse("a", first)
    rig.relief.review()
    for refusals in range(1, 5):
        rig.refuse("b", second)
        for _ in range(2 ** (refusals - 1)):
            assert (False, True) == (rig.relief.yields("a"), rig.relief.yields("b"))
            rig.relief.after_step("c", rig.models["c"].core, True)
        assert not rig.relief.yields("b")
    rig.refuse("b", second)
    rig.end("a", first)
    rig.relief.review()
    assert "b" == rig.relief.raised
    rig.refuse("a", rig.request("a"))
    assert rig.relief.yields("a")
    rig.relief.after_step("a", rig.models["a"].core, True)
    assert not rig.relief.yields("a"), "it runs again"
