# SPDX-License-Identifier: Apache-2.0
"""Whatever a model does, each utility call of an operator gets one answer, or a refusal that says what to do."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.engine import EngineCoreRequestType, UtilityOutput

from tests.host.test_lending import NAMES, TOKENS, Life
from tokenpool.errors import SwitchError
from tokenpool.wire.utility_calls import reason_of

pytestmark = pytest.mark.vllm

CALLS: dict[str, tuple[Any, ...]] = {
    "reset_prefix_cache": (False, False),
    "reset_mm_cache": (),
    "reset_encoder_cache": (),
    "resume_scheduler": (),
    "is_scheduler_paused": (),
    "get_weight_version": (),
    "set_weight_version": ("v2",),
    "collective_rpc": ("synchronize_device", None, (), {}),
}


class Operator:
    """Calls the engines of a host, and keeps what they answer."""

    def __init__(self, life: Life) -> None:
        self.life = life
        self.answers: dict[int, UtilityOutput] = {}
        self.num_calls = 0
        life.sim._collect = self._collect  # type: ignore[method-assign]

    def _collect(self) -> None:
        for hosted in self.life.host.models.values():
            queue = hosted.core.output_queue
            while not queue.empty():
                _, outputs = queue.get_nowait()
                if (answer := outputs.utility_output) is not None:
                    assert answer.call_id not in self.answers, "a call is answered twice"
                    self.answers[answer.call_id] = answer
                for output in outputs.outputs:
                    self.life.sim._take(self.life.sim.streams[output.request_id], output)

    def call(self, name: str, method: str, *args: Any) -> int:
        self.num_calls += 1
        message = (EngineCoreRequestType.UTILITY, (0, self.num_calls, method, args or CALLS.get(method, ())))
        self.life.host.models[name].core.input_queue.put(message)
        return self.num_calls

    def answer(self, call: int) -> UtilityOutput:
        """The answer to a call, which comes whether or not there are requests to wait for."""
        for _ in range(2000):
            if call in self.answers:
                return self.answers[call]
            self.turn()
        raise AssertionError(f"call {call} is not answered")

    def turn(self) -> None:
        """One pass of the host's loop, which would sleep for ever where nothing may step."""
        sim = self.life.sim
        sim.world.happen()
        stepped = sim.host.run_once()
        self._collect()
        sim.lending.check(stepped)
        sim.world.clock.sleep(sim.scenario.step_s)

    def ask(self, name: str, method: str, *args: Any) -> Any:
        """What a method gives, or why it is refused."""
        answer = self.answer(self.call(name, method, *args))
        if answer.failure_message is None:
            return answer.result.result  # type: ignore[union-attr]
        assert reason_of(answer.failure_message), answer.failure_message
        return reason_of(answer.failure_message)


@pytest.fixture
def begin(folder: Path) -> Iterator[Callable[..., Operator]]:
    with ExitStack() as stack:

        def begin(**options: Any) -> Operator:
            life = Life(folder, **options)
            stack.enter_context(life.sim.world.clock.installed())
            return Operator(life)

        yield begin


def _parked(life: Life) -> Callable[[], Any]:
    life.sim.lending._on_budget(0.0, None)
    life.host._calls.run()
    assert life.host.budget.is_parked
    return lambda: life.sim.lending._on_budget(1.0, None)


def _asleep(life: Life) -> Callable[[], Any]:
    assert life.host.sleepers.sleep("m0", 1)
    return lambda: life.host.sleepers.wake("m0")


@pytest.mark.parametrize(("still", "fix"), [(_asleep, "POST /wake_up"), (_parked, "grow it first")])
@pytest.mark.parametrize("is_early", [True, False])
def test_calls_to_a_model_that_stays_away_are_refused(
    begin: Callable[..., Operator], still: Callable[[Life], Callable[[], Any]], fix: str, is_early: bool
) -> None:
    """Whether they came before it went or after; what needs no weights is answered, what a request needs waits."""
    operator = begin()
    life = operator.life
    life.both_run()
    if is_early:
        core = life.host.models["m0"].core
        away, core.is_away = core.is_away, lambda: True
        calls = {method: operator.call("m0", method) for method in CALLS}
        adapter = operator.call("m0", "pin_lora", 1)
        life.host._drain_inputs()
        core.is_away = away
        go_on = still(life)
    else:
        go_on = still(life)
        calls = {method: operator.call("m0", method) for method in CALLS}
        adapter = operator.call("m0", "pin_lora", 1)
    refused = {method: reason_of(operator.answer(call).failure_message or "") for method, call in calls.items()}
    waited = {"reset_prefix_cache", "reset_encoder_cache", "collective_rpc"}
    assert waited == {method for method, reason in refused.items() if reason}
    assert all(fix in refused[method] for method in waited)
    assert adapter not in operator.answers
    go_on()
    assert operator.answer(adapter)
    assert {"m0": False, "m1": False} == {name: operator.ask(name, "reset_prefix_cache") for name in NAMES}
    life.finish()


@pytest.mark.parametrize("movable", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", CALLS)
def test_calls_are_answered_while_requests_run_and_afterwards(
    begin: Callable[..., Operator], method: str, movable: bool
) -> None:
    """By each model, wherever its weights are."""
    operator = begin(movable=movable)
    operator.life.both_run()
    for name in NAMES:
        assert operator.answer(operator.call(name, method)).failure_message is None
    operator.life.step(lambda: not operator.life.sim._waiting())
    for name in NAMES:
        assert operator.answer(operator.call(name, method)).failure_message is None
    operator.life.finish()


@pytest.mark.parametrize("mode", ["keep", "wait"])
def test_a_pause_is_answered_when_it_has_come(begin: Callable[..., Operator], mode: str) -> None:
    """At once, or when what runs has ended; the prefix cache can be reset then, and with resume all goes on."""
    operator = begin()
    life = operator.life
    life.both_run()
    assert operator.answer(operator.call("m0", "pause_scheduler", mode, False)).failure_message is None
    assert operator.ask("m0", "is_scheduler_paused") is True
    assert (life.num_tokens("m0") == TOKENS) is (mode == "wait")
    assert operator.ask("m0", "reset_prefix_cache") is (mode == "wait")
    assert operator.ask("m0", "reset_prefix_cache", True, False) is True
    assert operator.ask("m0", "resume_scheduler") is None
    life.finish()


def test_only_harmless_methods_of_a_worker_are_called(begin: Callable[..., Operator]) -> None:
    """The others could move weights or KV beside the pool's books; what is no name of a method is none of them."""
    operator = begin()
    operator.life.both_run()
    assert operator.ask("m0", "collective_rpc", "synchronize_device", None, (), {}) == [None]
    for method in ("load_model", "sleep", "shutdown", "reset_weights", "update_weights", "__init__", "nothing", 7, []):
        assert "--worker-extension-cls" in operator.ask("m0", "collective_rpc", method, None, (), {})
    operator.life.finish()


def test_calls_to_a_model_that_cannot_come_are_refused_with_its_requests(begin: Callable[..., Operator]) -> None:
    """After as many failures as its requests fail after, with the reason."""
    operator = begin()
    life = operator.life
    life.both_run()
    core = life.host.models["m0"].core
    away, core.is_away = core.is_away, lambda: True
    calls = [operator.call("m0", "reset_prefix_cache"), operator.call("m0", "pin_lora", 1)]
    life.host._drain_inputs()
    core.is_away = away
    hosted = life.host.models["m0"]
    life.sim.world.faults.crashed |= {"m0-r"}  # its request may fail
    while not hosted.put_off(SwitchError("m0", "copy", "no such page")):
        assert not operator.answers
    for call in calls:
        assert "no such page" in reason_of(operator.answer(call).failure_message or "")


def test_a_model_that_is_removed_answers_what_waits_for_it(begin: Callable[..., Operator]) -> None:
    """Before its connection ends."""
    operator = begin()
    life = operator.life
    life.step(lambda: not life.sim._waiting())
    core = life.host.models["m0"].core
    core.is_away = lambda: True
    call = operator.call("m0", "reset_prefix_cache")
    life.host._drain_inputs()
    queue = core.output_queue
    life.host.remove_model("m0")
    outputs = [outputs.utility_output for _, outputs in queue.queue if outputs.utility_output is not None]
    assert [call] == [output.call_id for output in outputs]
    assert "is being removed" in reason_of(outputs[0].failure_message)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))])
def test_random_lives_leave_no_call_without_an_answer(begin: Callable[..., Operator], seed: int) -> None:
    """Models pause, sleep and are parked in any order between steps; each call has one answer at the end."""
    operator, draw = begin(), random.Random(seed)
    life = operator.life
    life.both_run()
    lending = life.sim.lending
    for _ in range(60):
        name = draw.choice(NAMES)
        match draw.randrange(7):
            case 0:
                lending._on_sleep(name, draw.choice((0, 1)), "keep")
            case 1:
                lending._on_wake(name)
            case 2:
                lending._on_budget(draw.choice((0.0, 1.0)), None)
            case 3:
                operator.call(name, "pause_scheduler", "keep", draw.random() < 0.5)
            case _:
                operator.call(name, draw.choice([*CALLS]))
        for _ in range(draw.randrange(4)):
            operator.turn()
        life.host.check()
    lending._on_budget(1.0, None)
    for name in NAMES:
        lending._on_wake(name)
        operator.call(name, "resume_scheduler")
    life.finish()
    life.step(lambda: operator.num_calls == len(operator.answers))
