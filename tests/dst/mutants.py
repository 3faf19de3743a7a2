# SPDX-License-Identifier: Apache-2.0
"""Faults that the host once had, put back for a run: whoever changes the simulator sees whether it still finds them.

Each is what stood in the code of its time, as far as the code of today allows, and is undone at the end of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tokenpool.errors import EngineLostError, HostError
from tokenpool.host import engine_host, hosted_model, loop_calls, pressure
from tokenpool.host.engine import quarantine
from tokenpool.host.engine.hosted_core import HostedEngineCore
from tokenpool.host.host_room import HostRoom
from tokenpool.memory.ledger import PageLedger
from tokenpool.memory.states import WeightState


@contextmanager
def _replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    before = [(owner, name, owner.__dict__[name]) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def hunger_is_guessed() -> Any:
    """A step that ran nothing counts as hunger for memory, whatever its requests wait for; nobody wakes the loop."""

    def after_step(self: Any, model: str, core: Any, executed: bool) -> None:
        if executed:
            self._seen_version.pop(model, None)
        elif core.scheduler.has_unfinished_requests():
            self._seen_version[model] = self._allocator.version
            waiting = core.scheduler.waiting
            if waiting and model not in self._starved:
                self._starved[model] = waiting.peek_request().request_id

    make_request = HostedEngineCore.make_request

    def make_quietly(self: Any, request: Any) -> Any:
        notify, self._notify = self._notify, lambda: None
        try:
            made, wave = make_request(self, request)
        finally:
            self._notify = notify
        grammar = made.structured_output_request and made.structured_output_request._grammar
        if hasattr(grammar, "_done_callbacks"):
            grammar._done_callbacks.clear()
        return made, wave

    return _replaced(
        (pressure.PressureRelief, "after_step", after_step),
        (engine_host, "is_blocked", lambda core: False),
        (hosted_model.HostedModel, "rest", lambda self, executed: None),
        (HostedEngineCore, "make_request", make_quietly),
    )


def raised_floor_outlives_its_request() -> Any:
    """A raised floor is looked at only after a step of its own model that the turn policy asked for."""
    note = pressure.PressureRelief.after_step
    review = pressure.PressureRelief.review

    def after_step(self: Any, model: str, core: Any, executed: bool) -> None:
        note(self, model, core, executed)
        if self._raised in (None, model):
            review(self)

    return _replaced(
        (pressure.PressureRelief, "after_step", after_step),
        (pressure.PressureRelief, "review", lambda self: None),
    )


def copies_throw_each_other_out() -> Any:
    """Every cold model is read at each look, at the expense of any copy but the present model's."""

    def next_fetches(self: Any, cold: Any) -> Any:
        for name in cold:
            missing = self._weights.bytes_of(name) - self._host.free_bytes
            if missing > 0:
                self._swapper.tier.drop_cached(missing)
            if self._weights.bytes_of(name) <= self._host.free_bytes or _dropped(self, name):
                yield name

    def _dropped(self: Any, name: str) -> bool:
        current = _current[-1] if _current else None
        for owner, view in self._weights.snapshot().items():
            if self._weights.bytes_of(name) <= self._host.free_bytes:
                return True
            if owner in (name, current, *self.staying) or not view.droppable:
                continue
            if view.state is WeightState.ON_DEVICE and not self._is_busy(owner):
                self._evict(owner)
            if self._weights.state(owner) is WeightState.IN_HOST:
                self._weights.drop_host(owner)
        return self._weights.bytes_of(name) <= self._host.free_bytes

    _current: list[str] = []
    return _replaced(
        (HostRoom, "next_fetches", next_fetches),
        (HostRoom, "entered", lambda self, name: _current.append(name)),
        (HostRoom, "fetched", lambda self, name: None),
    )


def fatal_error_is_charged_to_another() -> Any:
    """An engine that cannot go on says so with the error that a failed switch has."""

    class _Lost(EngineLostError, HostError):
        pass

    return _replaced((quarantine, "EngineLostError", _Lost), (loop_calls, "EngineLostError", _Lost))


def lent_pages_are_counted_on() -> Any:
    """What is lent counts among the pages that a model could have if all others left."""
    return _replaced((PageLedger, "num_usable", property(lambda self: self.num_pages)))


def sleepers_are_stepped() -> Any:
    """A model that sleeps has turns when it has requests."""

    def may_step(self: Any, now_s: float) -> bool:
        return bool(max(self.retry_at_s, self.rest_until_s) <= now_s)

    return _replaced((hosted_model.HostedModel, "may_step", may_step))


def sleepers_keep_their_copies() -> Any:
    """A copy that was read for a model that sleeps by then stays until that has had a turn."""

    def _is_kept(self: Any, name: str, now_s: float) -> bool:
        return bool(self._kept_until.get(name, 0.0) > now_s)

    return _replaced((HostRoom, "_is_kept", _is_kept))


MUTANTS: Mapping[str, Callable[[], Any]] = {
    mutant.__name__: mutant
    for mutant in (
        hunger_is_guessed,
        raised_floor_outlives_its_request,
        copies_throw_each_other_out,
        fatal_error_is_charged_to_another,
        lent_pages_are_counted_on,
        sleepers_are_stepped,
        sleepers_keep_their_copies,
    )
}
