# SPDX-License-Identifier: Apache-2.0
"""Memory that is lent and models that sleep, on a real host with stub models: what is refused, what comes back."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.dst import oracle
from tests.dst.scenario import PAGE, ModelPlan, RequestPlan, Scenario
from tests.dst.simulation import Simulation
from tokenpool.errors import CapacityError, ConfigError, ModelBusyError, PoolError
from tokenpool.host.kv.kv_swap import KVState
from tokenpool.memory.copy_engine import CopyEngine, CopyJob
from tokenpool.memory.fixed_bytes import FIXED_OWNER
from tokenpool.memory.host_ledger import HostUse
from tokenpool.memory.ledger import LENT_OWNER, PageUse
from tokenpool.memory.states import WeightState
from tokenpool.wire.budget import BudgetOrder, BudgetState

pytestmark = pytest.mark.vllm

LIBC = ctypes.CDLL(None)
NAMES = ("m0", "m1")
TOKENS = 60


def resident(address: int, nbytes: int) -> int:
    """Bytes of a mapped range that have memory behind them."""
    count = -(-nbytes // mmap.PAGESIZE)
    present = (ctypes.c_ubyte * count)()
    assert 0 == LIBC.mincore(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), present)
    return mmap.PAGESIZE * sum(page & 1 for page in present)


class Life:
    """A host with two models, one request of each under way; stepped by hand."""

    def __init__(self, folder: Path, *, movable: bool = True, host_memory_frac: float = 8.0, spare: int = 24) -> None:
        models = [ModelPlan(name, 3, (None,), 8, 96, 4, 48, True, None) for name in NAMES]
        prompts = {name: tuple(range(10 + index, 30 + index)) for index, name in enumerate(NAMES)}
        requests = [RequestPlan(f"{name}-r", name, 0.0, prompts[name], TOKENS, 0, False, None) for name in NAMES]
        scenario = Scenario(7, models, requests, spare, movable, host_memory_frac, "round_robin", False, 64, 0.0, 0.001)
        self.sim = Simulation(scenario, folder)
        self.sim._start_first_host()
        self.host = self.sim.host
        for request in requests:
            self.sim._on_request(request)

    def step(self, until: Callable[[], bool]) -> None:
        for _ in range(5000):
            if until():
                return
            self.sim._turn()
        raise AssertionError("it does not come about")

    def pass_until(self, until: Callable[[], bool]) -> None:
        """Passes of the loop, in which a request of a model that may not run waits on."""
        for _ in range(5000):
            if until():
                return
            self.sim.world.happen()
            self.host.run_once()
            self.sim._collect()
            self.sim.world.clock.sleep(self.sim.scenario.step_s)
        raise AssertionError("it does not come about")

    def send(self, name: str, request_id: str) -> None:
        self.sim._on_request(RequestPlan(request_id, name, 0.0, tuple(range(10, 30)), 10, 0, False, None))

    def num_tokens(self, name: str) -> int:
        return len(self.sim.streams[f"{name}-r"].tokens)

    def both_run(self) -> None:
        self.step(lambda: all(self.num_tokens(name) >= 5 for name in NAMES))

    def finish(self) -> None:
        """All requests end with the right tokens, the books agree, and nothing is left."""
        self.step(lambda: not self.sim._waiting())
        for name in NAMES:
            stream = self.sim.streams[f"{name}-r"]
            assert stream.tokens == oracle.stream(self.sim.world.facts[name], stream.plan.prompt, TOKENS)
        self.sim._finish()

    def set(self, device_memory: int | None = None, host_memory: int | None = None) -> BudgetState:
        state = self.host.budget.set(BudgetOrder(device_memory, host_memory))
        self.host.check()
        return state

    def resident_bytes(self) -> int:
        """What the kernel has behind the addresses of the arena and of all weights."""
        arena, places = self.host.arena, [entry.range for entry in self.host.weights._models.values()]
        spans = [(arena.base, arena._reserved_bytes)] + [(p.address, p.num_pages * PAGE) for p in places]
        return sum(map(resident, *zip(*spans, strict=True)))

    def on_device(self) -> dict[str, dict[str, int]]:
        """use -> owner -> pages, of what can move."""
        held = self.host.ledger.snapshot().held
        uses = {use: {o: n for o, n in held.get(use, {}).items() if o != FIXED_OWNER} for use in ("kv", "weights")}
        return {use: owners for use, owners in uses.items() if owners}


@pytest.fixture
def begin(folder: Path) -> Iterator[Callable[..., Life]]:
    with ExitStack() as stack:

        def begin(**options: Any) -> Life:
            life = Life(folder, **options)
            stack.enter_context(life.sim.world.clock.installed())
            return life

        yield begin


def test_a_budget_shrinks_to_the_least_and_grows_back(begin: Callable[..., Life]) -> None:
    """Both models go on in what is left, one after the other, with the same tokens; less than that is refused."""
    life = begin()
    life.both_run()
    first = life.set()
    least, most = first.device_memory_least, first.device_memory_most
    assert least < first.device_memory == most == life.host.ledger.num_pages * PAGE

    with pytest.raises(CapacityError, match="for one request of full length of each model .* are needed; 0 parks"):
        life.set(least - 1)
    assert life.set() == first
    small = life.set(least)
    assert (least, False) == (small.device_memory, small.is_parked)
    assert sum(n for owners in small.device_held.values() for n in owners.values()) <= least
    assert life.host.ledger.held(LENT_OWNER, PageUse.LENT) * PAGE == most - least
    before = life.num_tokens("m0"), life.num_tokens("m1")
    life.step(lambda: life.num_tokens("m0") > before[0] + 3 and life.num_tokens("m1") > before[1] + 3)
    life.host.check()
    assert most == life.set(most).device_memory
    assert 0 == life.host.ledger.total(PageUse.LENT)
    life.finish()


def test_more_than_addresses_are_reserved_for_is_refused(begin: Callable[..., Life]) -> None:
    """The arena cannot grow beyond what it began with; the line says what to do."""
    life = begin()
    with pytest.raises(CapacityError, match="addresses are reserved for .*start the pool anew"):
        life.set(life.set().device_memory_most + PAGE)
    life.finish()


def test_a_parked_pool_holds_its_requests(begin: Callable[..., Life]) -> None:
    """With 0 nothing is on the device and nothing steps; the loop sleeps until it is woken, and all goes on later."""
    life = begin()
    life.both_run()
    released: list[None] = []
    life.sim.world.device.release_unused = lambda: released.append(None) or 0  # type: ignore[method-assign]
    full = life.set().device_memory
    state = life.set(0)
    assert (True, 0) == (state.is_parked, state.device_memory)
    assert {} == life.on_device() and released
    assert all(life.host.swapper.state(name) is KVState.OUT for name in NAMES)
    assert state.host_held[HostUse.PAUSED_KV].keys() >= set(NAMES)
    tokens = [life.num_tokens(name) for name in NAMES]
    assert not any(life.host.run_once() for _ in range(5))
    assert life.host.nap_s() is None
    life.sim._collect()
    assert tokens == [life.num_tokens(name) for name in NAMES]
    with pytest.raises(CapacityError, match="cannot be loaded: the pool is parked"):
        life.host.budget.refuse_parked("m2")
    life.set(full)
    assert life.host.nap_s() is not None
    life.finish()


def test_kv_that_finds_no_room_in_host_memory_stays(begin: Callable[..., Life]) -> None:
    """The refusal says what holds the device and what is possible; the budget stays, and no request is given up."""
    life = begin()
    life.both_run()
    before = life.set()
    life.host.swapper.tier.drop_cached(1 << 40)
    life.host.host_ledger.make_room = lambda nbytes: None
    life.host.host_ledger.budget_bytes = life.host.host_ledger.budget_bytes - life.host.host_ledger.free_bytes
    with pytest.raises(CapacityError, match="KiB of kv of m.* cannot all leave the device; .* is possible") as refused:
        life.host.budget.set(BudgetOrder(0))
    assert "preempt" not in str(refused.value)
    life.host.host_ledger.budget_bytes = before.host_memory
    assert before.device_memory == life.set().device_memory
    assert 0 == life.host.residency.counters.kv_given_up
    life.finish()


def test_a_refused_budget_keeps_the_books_of_what_went_to_the_host(begin: Callable[..., Life]) -> None:
    """Where more host memory holds the KV of one model and not of both, the pool is not parked, and all is counted."""
    life = begin()
    life.both_run()
    ledger, refused = life.host.host_ledger, 0
    life.host.swapper.tier.drop_cached(1 << 40)
    whole, ledger.make_room = ledger.budget_bytes, lambda nbytes: None
    used = ledger.budget_bytes = ledger.budget_bytes - ledger.free_bytes
    for extra in range(PAGE // 4, 64 * PAGE, PAGE // 4):
        try:
            life.set(0, used + extra)
            break
        except CapacityError:
            refused += 1
            life.host.check()
            assert not life.set().is_parked
    assert refused and life.set().is_parked
    life.set(life.set().device_memory_most, whole)
    life.finish()


def test_weights_that_stay_are_named(begin: Callable[..., Life]) -> None:
    """With fixed weights KV pages can be lent, but the pool cannot be parked, nor can its models leave the device."""
    life = begin(movable=False)
    life.both_run()
    with pytest.raises(CapacityError, match="the weights of m0, m1 .* stay on the device with weights: fixed"):
        life.set(0)
    for level in (1, 2):
        with pytest.raises(ConfigError, match="model 'm0' cannot leave the device"):
            life.host.sleepers.sleep("m0", level)
    assert life.set().device_memory_least < life.set().device_memory_most
    life.set(life.set().device_memory_least)
    tokens = life.num_tokens("m0")
    life.step(lambda: life.num_tokens("m0") > tokens)
    life.set(life.set().device_memory_most)
    life.finish()


def test_host_memory_shrinks_as_far_as_it_is_not_needed(begin: Callable[..., Life]) -> None:
    """Cached KV goes; what must stay is named, and a budget in which a copy would never fit is refused."""
    life = begin()
    life.both_run()
    held = sum(n for owners in life.host.host_ledger.snapshot().values() for n in owners.values())
    assert held == life.set(host_memory=held).host_memory
    with pytest.raises(CapacityError, match="could not be read into host memory"):
        life.set(host_memory=1000)
    assert held == life.set().host_memory
    life.set(host_memory=8 * held)
    life.finish()


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_model_that_sleeps_takes_no_turn_and_goes_on_when_it_wakes(begin: Callable[..., Life], level: int) -> None:
    """Its KV is kept on every level; the other model has the device meanwhile, and sleeping again changes nothing."""
    life = begin()
    life.both_run()
    assert life.host.sleepers.sleep("m0", level)
    life.sim._collect()
    tokens = life.num_tokens("m0")
    assert level == life.set().asleep["m0"]
    if level:
        assert "m0" not in [owner for owners in life.on_device().values() for owner in owners]
        assert life.host.swapper.state("m0") is KVState.OUT
        copy = life.host.host_ledger.held("m0", HostUse.WEIGHTS) >= life.host.weights.bytes_of("m0")
        assert copy is (level == 1)
    assert life.host.sleepers.sleep("m0", level)
    life.step(lambda: life.num_tokens("m1") == TOKENS)
    assert tokens == life.num_tokens("m0")
    life.host.run_once()
    assert life.host.nap_s() is None
    life.host.check()
    life.host.sleepers.wake("m0")
    assert {} == life.set().asleep
    life.finish()


def test_sleep_can_wait_for_running_requests_or_end_them(begin: Callable[..., Life]) -> None:
    """As in vLLM: with `wait` it sleeps when they have ended, with `abort` their clients are told at once."""
    life = begin()
    life.both_run()
    assert not life.host.sleepers.sleep("m0", 1, "wait")
    life.step(lambda: life.num_tokens("m0") == TOKENS)
    assert life.host.sleepers.sleep("m0", 1, "wait")
    life.sim.streams["m1-r"].aborted = True
    assert life.host.sleepers.sleep("m1", 1, "abort")
    life.sim._collect()
    assert "abort" == str(life.sim.streams["m1-r"].reason)
    assert {} == life.on_device()
    for name in NAMES:
        life.host.sleepers.wake(name)
    life.sim._turn()
    life.sim._finish()


def test_a_model_that_cannot_leave_is_awake(begin: Callable[..., Life]) -> None:
    """Without room for its KV the call fails and the model goes on; an unknown one is a KeyError."""
    life = begin()
    life.both_run()
    ledger = life.host.host_ledger
    whole, ledger.make_room = ledger.budget_bytes, lambda nbytes: None
    life.host.swapper.tier.drop_cached(1 << 40)
    ledger.budget_bytes = whole - ledger.free_bytes
    with pytest.raises(PoolError, match="host memory"):
        life.host.sleepers.sleep("m0")
    ledger.budget_bytes = whole
    assert {} == life.set().asleep
    with pytest.raises(KeyError):
        life.host.sleepers.sleep("none")
    life.finish()


def test_what_is_lent_is_back_with_the_kernel(begin: Callable[..., Life]) -> None:
    """Of the addresses of KV and weights only null blocks are resident while the pool is parked."""
    life = begin()
    life.sim.world.device.keeps_bytes = False  # as the device of a real host
    life.both_run()
    full, before = life.set().device_memory, life.resident_bytes()
    life.set(0)
    assert before > life.resident_bytes() <= life.host.ledger.total(PageUse.NULL) * PAGE
    life.set(full)
    life.finish()


@pytest.mark.parametrize("leave", ["remove", "sleep"])
def test_a_model_whose_read_hangs_leaves_later_and_holds_nobody_up(begin: Callable[..., Life], leave: str) -> None:
    """The loop goes on; a removal is told to come again, and is done once the disk has answered."""
    life = begin(host_memory_frac=0.8)
    life.step(lambda: not life.sim._waiting())
    host, weights = life.host, life.host.weights
    cold = next(name for name in NAMES if weights.state(name) is WeightState.ON_DISK)
    life.send(cold, "first")
    life.step(lambda: weights.state(cold) is WeightState.READING)
    host.models[cold].core.abort_all()
    answered = threading.Event()

    def read(job: CopyJob) -> None:
        begun.set()
        answered.wait(60)
        job.advance(0)

    begun, disk = threading.Event(), CopyEngine(name="disk")
    weights._models[cold].job = job = disk.submit("fetch", 1, read)
    assert begun.wait(60)
    threading.Timer(15, answered.set).start()  # without which a failure of this test would never end
    if leave == "remove":
        with pytest.raises(ModelBusyError, match="does not end"):
            host.remove_model(cold)
    else:
        assert host.sleepers.sleep(cold, 2)
    assert not answered.is_set(), "the loop waited for the disk"
    answered.set()
    assert job.wait(60) and job.cancelled
    host.remove_model(cold)
    assert cold not in host.models
    host.check()
    disk.close()


@pytest.mark.parametrize("level", [0, 1])
def test_a_model_that_falls_asleep_before_its_turn_keeps_nobody_waiting(begin: Callable[..., Life], level: int) -> None:
    """Host memory holds one copy, which was read for a model that sleeps by then, with a request that waits."""
    life = begin(host_memory_frac=0.8)
    life.step(lambda: not life.sim._waiting())
    weights = life.host.weights
    cold = next(name for name in NAMES if weights.state(name) is WeightState.ON_DISK)
    other = next(name for name in NAMES if name != cold)
    life.send(cold, "first")
    life.step(lambda: weights.state(cold) is WeightState.READING)
    assert life.host.sleepers.sleep(cold, level)
    life.pass_until(lambda: weights.state(cold) is WeightState.IN_HOST)
    life.send(other, "second")
    life.pass_until(lambda: life.sim.streams["second"].is_done)
    assert WeightState.ON_DISK is weights.state(cold)
    life.host.sleepers.wake(cold)
    life.step(lambda: not life.sim._waiting())
    life.sim._finish()
