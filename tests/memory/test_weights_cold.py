# SPDX-License-Identifier: Apache-2.0
"""Host copies that are given up and read again: only when the checkpoint gives the same bytes, and all of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.helpers.devices.weight_rig import LIMIT_S, PAGE, Checkpoint, Rig, big_tensors, bytes_of, random_tensors
from tokenpool.errors import CapacityError, SwitchError
from tokenpool.memory.copy_engine import CopyJob
from tokenpool.memory.host_ledger import HostUse
from tokenpool.memory.states import WeightState

pytestmark = pytest.mark.cpu

COLD, FETCHING, WARM = WeightState.ON_DISK, WeightState.READING, WeightState.IN_HOST
LOADING, RESIDENT = WeightState.COPYING, WeightState.ON_DEVICE


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.store.close()
    rig.assert_empty()


def parts(count: int = 6, pages: int = 1) -> list[torch.Tensor]:
    """Several storages of that many pages, all different."""
    return [torch.full((pages * PAGE // 4,), i + 0.5) for i in range(count)]


def fetch(rig: Rig, owner: str) -> None:
    assert rig.store.load_host(owner).wait(LIMIT_S)
    rig.store.finish(owner)


@pytest.mark.parametrize("when", ["at adoption", "on the side", "at the first drop"])
def test_a_cold_model_comes_back_from_its_checkpoint(rig, when):
    """Whenever the proof was made, a dropped host copy costs no host memory and comes back byte for byte."""
    tensors = parts()
    values, checkpoint = bytes_of(tensors), Checkpoint(tensors)
    rig.store.adopt("a", tensors, checkpoint.reload, verify_reload=when == "at adoption")
    assert values == bytes_of(tensors)
    rig.store.evict("a")
    if when == "on the side":
        assert rig.store.prove_reload("a").wait(LIMIT_S)
        rig.check()
        rig.store.finish("a")
    assert (None if when == "at the first drop" else True) is rig.store.snapshot()["a"].droppable
    rig.store.drop_host("a")
    rig.check()
    assert (COLD, 0) == (rig.store.state("a"), rig.host.total(HostUse.WEIGHTS))
    fetch(rig, "a")
    rig.check()
    assert WARM is rig.store.state("a")
    rig.load("a")
    assert values == bytes_of(tensors)
    rig.store.evict("a")
    rig.store.drop_host("a")
    assert 2 == checkpoint.reads, "one proof and one load: a proven model is dropped without another read"


def test_storages_that_are_in_no_checkpoint_stay_in_host_memory(rig):
    """Such as tables of rotary embeddings: they are kept, accounted, and back after the load."""
    tensors = parts(6)
    values, checkpoint = bytes_of(tensors), Checkpoint(tensors, skip={2})
    rig.store.adopt("a", tensors, checkpoint.reload)
    rig.store.evict("a")
    rig.store.drop_host("a")
    rig.check()
    assert tensors[2].nbytes == rig.host.held("a", HostUse.WEIGHTS)
    fetch(rig, "a")
    rig.load("a")
    assert values == bytes_of(tensors)


def test_a_byte_that_reload_leaves_out_is_never_right_by_chance(rig):
    """Half a storage is not enough, even if what is left out looks like what memory may hold anyway."""
    tensors = [torch.zeros(PAGE, dtype=torch.uint8) for _ in range(6)]

    def half(advance, on_final) -> None:
        for index, tensor in enumerate(tensors):
            tensor.data[: PAGE // 2 if index == 3 else PAGE] = 0

    rig.store.adopt("a", tensors, half, verify_reload=True)
    rig.store.evict("a")
    rig.store.drop_host("a")
    assert PAGE == rig.host.held("a", HostUse.WEIGHTS)
    fetch(rig, "a")
    rig.load("a")
    assert not any(t.any() for t in tensors)


@pytest.mark.parametrize("when", ["at adoption", "at the first drop"])
def test_weights_made_after_loading_stay_in_host_memory(rig, when):
    """When most bytes are not the checkpoint's, the model is not droppable, and works on."""
    tensors = parts()
    checkpoint = Checkpoint(tensors)
    for tensor in tensors:
        tensor.mul_(2)
    values = bytes_of(tensors)
    rig.store.adopt("a", tensors, checkpoint.reload, verify_reload=when == "at adoption")
    assert values == bytes_of(tensors)
    rig.store.evict("a")
    for _ in range(2):
        with pytest.raises(SwitchError, match="must stay in host memory, .* are made after loading") as caught:
            rig.store.drop_host("a")
        assert "drop" == caught.value.phase
    assert 1 == checkpoint.reads
    assert (WARM, False) == (rig.store.state("a"), rig.store.snapshot()["a"].droppable)
    rig.check()
    rig.load("a")
    assert values == bytes_of(tensors)


def test_a_checkpoint_that_cannot_be_read_is_no_failure_of_the_model(rig):
    """The proof ends with no: the error is told when somebody asks for the drop."""

    def broken(advance, on_final) -> None:
        raise FileNotFoundError("model.safetensors")

    tensors = parts()
    values = bytes_of(tensors)
    rig.store.adopt("a", tensors, broken, verify_reload=True)
    assert values == bytes_of(tensors)
    rig.store.evict("a")
    with pytest.raises(SwitchError, match="FileNotFoundError: model.safetensors"):
        rig.store.drop_host("a")
    rig.load("a")
    assert values == bytes_of(tensors)


def test_without_reload_a_host_copy_is_never_dropped(rig):
    """A model that nobody can read again stays in host memory."""
    rig.store.adopt("a", parts())
    rig.store.evict("a")
    with pytest.raises(SwitchError, match="no way to read them again"):
        rig.store.drop_host("a")
    assert WARM is rig.store.state("a")


def test_a_changed_checkpoint_is_noticed(rig):
    """A model does not come back with other weights than it went with."""
    tensors = parts()
    values, checkpoint = bytes_of(tensors), Checkpoint(tensors)
    rig.store.adopt("a", tensors, checkpoint.reload)
    rig.store.evict("a")
    rig.store.drop_host("a")
    checkpoint.saved[4][17] += 1
    assert rig.store.load_host("a").wait(LIMIT_S)
    with pytest.raises(SwitchError, match="fetch failed: .*not the one that the model was added with") as caught:
        rig.store.finish("a")
    assert "fetch" == caught.value.phase
    assert (COLD, 0) == (rig.store.state("a"), rig.host.total(HostUse.WEIGHTS))
    rig.check()
    checkpoint.saved[4][17] -= 1
    fetch(rig, "a")
    rig.load("a")
    assert values == bytes_of(tensors)


def test_reading_can_be_stopped_and_begun_again(rig):
    """drop_host while the checkpoint is read ends at the next tensor; the model is cold, its tensors are in place."""
    tensors = parts()
    values, checkpoint = bytes_of(tensors), Checkpoint(tensors)
    rig.store.adopt("a", tensors, checkpoint.reload, verify_reload=True)
    rig.store.evict("a")
    rig.store.drop_host("a")
    reached, go_on = threading.Event(), threading.Event()

    def before(index: int) -> None:
        if index == 3:
            reached.set()
            assert go_on.wait(LIMIT_S)

    checkpoint.before = before
    job = rig.store.load_host("a")
    assert reached.wait(LIMIT_S)
    rig.store.check()
    assert 3 * tensors[0].nbytes == rig.store.snapshot()["a"].job_bytes
    assert FETCHING is rig.store.state("a")
    threading.Timer(0.01, go_on.set).start()
    rig.store.drop_host("a")
    assert job.cancelled
    assert COLD is rig.store.state("a")
    rig.check()
    checkpoint.before = lambda index: None
    fetch(rig, "a")
    rig.load("a")
    assert values == bytes_of(tensors)


@pytest.mark.parametrize("move", ["drop_host", "remove"])
def test_a_model_leaves_whose_read_waits_for_another_that_hangs(rig, move):
    """A disk that gives no answer holds up the models that lie on it, and no call for any other one."""
    checkpoints = {}
    for name in ("a", "b"):
        tensors = parts()
        checkpoints[name] = Checkpoint(tensors)
        rig.store.adopt(name, tensors, checkpoints[name].reload, verify_reload=True)
        rig.store.evict(name)
        rig.store.drop_host(name)
    reached, go_on = threading.Event(), threading.Event()

    def hang(index: int) -> None:
        reached.set()
        assert go_on.wait(LIMIT_S)

    checkpoints["a"].before = hang
    rig.store.load_host("a")
    waiting = rig.store.load_host("b")
    assert reached.wait(LIMIT_S)
    threading.Timer(LIMIT_S / 4, go_on.set).start()  # without which a failure of this test would never end
    getattr(rig.store, move)("b")
    hung = not go_on.is_set()
    go_on.set()
    assert hung, "it waited for the other model"
    assert waiting.cancelled
    assert rig.store.job("a").wait(LIMIT_S)
    rig.store.finish("a")
    rig.check()


@pytest.mark.parametrize("move", ["map", "drop_host", "remove"])
def test_a_trial_under_way_is_given_up_for_a_real_move(rig, move):
    """Serving does not wait for it, and the tensors are back in their range."""
    tensors = parts()
    values, checkpoint = bytes_of(tensors), Checkpoint(tensors)
    rig.store.adopt("a", tensors, checkpoint.reload)
    rig.store.evict("a")
    reached, go_on = threading.Event(), threading.Event()

    def before(index: int) -> None:
        reached.set()
        assert go_on.wait(LIMIT_S)

    checkpoint.before = before
    job = rig.store.prove_reload("a")
    assert reached.wait(LIMIT_S)
    rig.check()
    threading.Timer(0.01, go_on.set).start()
    getattr(rig.store, move)("a")
    assert job.cancelled
    rig.check()
    if move == "map":
        assert rig.store.copy("a").wait(LIMIT_S)
        rig.store.finish("a")
        assert values == bytes_of(tensors)
    elif move == "drop_host":
        assert (COLD, 2) == (rig.store.state("a"), checkpoint.reads)


def test_a_trial_takes_no_memory_from_others():
    """Without room for a second copy it is refused, and nobody is asked to give way."""
    tensors = parts()
    rig = Rig(host_bytes=9 * PAGE)
    rig.host.make_room = lambda nbytes: pytest.fail("somebody had to give way")
    rig.store.adopt("a", tensors, Checkpoint(tensors).reload)
    rig.store.evict("a")
    for move in (rig.store.prove_reload, rig.store.drop_host):
        with pytest.raises(CapacityError, match="raise host_memory"):
            move("a")
    assert (WARM, None) == (rig.store.state("a"), rig.store.snapshot()["a"].droppable)
    rig.check()
    rig.store.close()
    rig.assert_empty()


def test_a_proof_at_adoption_needs_no_memory():
    """The tensors where the loader put them are the scratch: a model may fill the whole budget."""
    tensors = parts()
    values = bytes_of(tensors)
    rig = Rig(host_bytes=6 * PAGE)
    rig.store.adopt("a", tensors, Checkpoint(tensors).reload, verify_reload=True)
    assert (True, values) == (rig.store.snapshot()["a"].droppable, bytes_of(tensors))
    rig.store.close()
    rig.assert_empty()


def test_without_room_for_what_it_keeps_a_model_is_adopted_unproven():
    """The budget holds the host copy but not the storages that a cold model keeps beside it."""
    tensors = parts()
    rig = Rig(host_bytes=6 * PAGE)
    rig.store.adopt("a", tensors, Checkpoint(tensors, skip={1}).reload, verify_reload=True)
    rig.check()
    assert (RESIDENT, None) == (rig.store.state("a"), rig.store.snapshot()["a"].droppable)
    rig.store.close()
    rig.assert_empty()


def test_a_proof_leaves_the_loaders_memory_as_it_was(rig):
    """Code that nobody knows of may still look there: it sees the weights, not what the trial has read."""
    tensors = parts()
    hidden, checkpoint = [tensor.data for tensor in tensors], Checkpoint(tensors)
    checkpoint.saved[2] += 1
    values = bytes_of(hidden)
    rig.store.adopt("a", tensors, checkpoint.reload, verify_reload=True)
    assert hidden[2].data_ptr() != tensors[2].data_ptr()
    assert values == bytes_of(hidden) == bytes_of(tensors)


def test_an_adoption_that_fails_after_its_proof_puts_the_bytes_back(rig):
    """The proof scribbles over the loader's tensors; they are whole again after a failure."""
    tensors = parts()
    values, checkpoint = bytes_of(tensors), Checkpoint(tensors, skip={1})
    rig.device.allowed = {"copy_in": 3}
    with pytest.raises(OSError, match="copy_in failed"):
        rig.store.adopt("a", tensors, checkpoint.reload, verify_reload=True)
    assert 1 == checkpoint.reads
    assert values == bytes_of(tensors)
    rig.assert_empty()


def test_reading_without_room_stays_on_disk():
    """CapacityError, and another try when there is room."""
    rig = Rig(host_bytes=14 * PAGE)
    tensors = parts()
    rig.store.adopt("a", tensors, Checkpoint(tensors).reload, verify_reload=True)
    rig.store.evict("a")
    rig.store.drop_host("a")
    rig.host.take("kv", HostUse.CACHED_KV, 12 * PAGE)
    with pytest.raises(CapacityError):
        rig.store.load_host("a")
    assert COLD is rig.store.state("a")
    rig.check()
    rig.host.make_room = lambda nbytes: rig.host.give("kv", HostUse.CACHED_KV, 12 * PAGE)
    fetch(rig, "a")
    rig.store.close()
    rig.assert_empty()


@pytest.mark.parametrize("state", list(WeightState))
def test_removal_gives_everything_back_from_any_state(rig, state):
    """Pages, host memory and the range; a job in flight ends first."""
    tensors = parts()
    checkpoint = Checkpoint(tensors, skip={1})
    rig.store.adopt("a", tensors, checkpoint.reload, verify_reload=True)
    if state is not RESIDENT:
        rig.store.evict("a")
    if state is LOADING:
        rig.store.map("a")
        rig.store.copy("a")
    if state in (COLD, FETCHING):
        rig.store.drop_host("a")
    if state is FETCHING:
        rig.store.load_host("a")
    assert state is rig.store.state("a")
    rig.store.remove("a")
    rig.assert_empty()
    assert [] == rig.store.owners


def test_a_full_device_and_a_full_host_at_once(rig):
    """Two models of 40 pages share 64: each comes in after the other went out, bytes right every time."""
    models = {name: big_tensors(40) for name in "ab"}
    models["b"][0].data += 7
    values = {name: bytes_of(tensors) for name, tensors in models.items()}
    rig.store.adopt("a", models["a"])
    rig.store.evict("a")
    rig.store.adopt("b", models["b"])
    for _ in range(3):
        for name, other in (("a", "b"), ("b", "a")):
            with pytest.raises(CapacityError):
                rig.store.map(name)
            rig.store.evict(other)
            rig.load(name)
            assert values[name] == bytes_of(models[name])
    assert 0 == rig.store.device.bytes_to_host


class Moves(RuleBasedStateMachine):
    """Random moves of three models against what must be true after each."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig(pages=12, host_bytes=1 << 20)
        self.tensors: dict[str, list[torch.Tensor]] = {}
        self.values: dict[str, list[list[int]]] = {}
        self.places: dict[str, list[int]] = {}
        self.disk = threading.Event()
        self.disk.set()
        self.waited = False

    names = st.sampled_from("abc")

    def state(self, name: str) -> WeightState | None:
        return self.rig.store.state(name) if name in self.tensors else None

    @rule()
    def hang(self):
        """The disk gives no answer: reads wait, and nothing else does."""
        if not self.disk.is_set():
            return
        self.disk = disk = threading.Event()

        def wait(job: CopyJob) -> None:
            self.waited |= not disk.wait(LIMIT_S)

        self.rig.store.fetcher.submit("hang", 1, wait)

    @rule()
    def answer(self):
        self.disk.set()

    @rule(name=names, seed=st.integers(0, 10**6), reloadable=st.booleans(), verify=st.booleans())
    def adopt(self, name, seed, reloadable, verify):
        if name in self.tensors:
            return
        tensors = random_tensors(seed, 14)
        values, reload = bytes_of(tensors), Checkpoint(tensors).reload if reloadable else None
        try:
            self.rig.store.adopt(name, tensors, reload, verify_reload=verify)
        except CapacityError:
            assert values == bytes_of(tensors)
            return
        self.tensors[name], self.values[name] = tensors, values
        self.places[name] = [t.data_ptr() for t in tensors]

    @rule(name=names)
    def evict(self, name):
        if self.state(name) in (RESIDENT, LOADING):
            self.rig.store.evict(name)

    @rule(name=names, wait=st.booleans())
    def load(self, name, wait):
        if self.state(name) is WARM:
            try:
                self.rig.store.map(name)
            except CapacityError:
                return
        if self.state(name) is LOADING and self.rig.store.job(name) is None:
            job = self.rig.store.copy(name)
            assert not wait or job.wait(LIMIT_S)

    @rule(name=names)
    def cancel(self, name):
        if name in self.tensors and (job := self.rig.store.job(name)):
            job.cancel()

    @rule(name=names)
    def finish(self, name):
        job = self.rig.store.job(name) if name in self.tensors else None
        if job is None or (self.state(name) is FETCHING and not self.disk.is_set() and not job.done()):
            return
        assert job.wait(LIMIT_S)
        try:
            self.rig.store.finish(name)
        except SwitchError:
            assert job.cancelled

    @rule(name=names)
    def drop(self, name):
        if self.state(name) in (WARM, FETCHING):
            try:
                self.rig.store.drop_host(name)
            except (SwitchError, CapacityError):
                assert WARM is self.state(name)

    @rule(name=names)
    def fetch(self, name):
        if self.state(name) is COLD:
            try:
                self.rig.store.load_host(name)
            except CapacityError:
                assert COLD is self.state(name)

    @rule(name=names)
    def remove(self, name):
        if name in self.tensors:
            self.rig.store.remove(name)
            del self.tensors[name], self.values[name], self.places[name]

    @rule()
    def touch(self):
        for owner in self.rig.store.owners[:1]:
            self.rig.store.touch(owner)

    @invariant()
    def books_agree(self):
        assert not self.waited, "somebody waits for a disk that gives no answer"
        self.rig.check()
        for name, tensors in self.tensors.items():
            if self.state(name) is RESIDENT:
                assert self.values[name] == bytes_of(tensors)
                assert self.places[name] == [t.data_ptr() for t in tensors]
        assert 0 == self.rig.store.device.bytes_to_host

    def teardown(self):
        self.disk.set()
        self.rig.store.close()
        self.rig.assert_empty()


TestMoves = Moves.TestCase
TestMoves.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
