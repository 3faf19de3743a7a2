# SPDX-License-Identifier: Apache-2.0
"""One simulated device: models that take turns on it, their memory, and the link that brings weights and KV in.

It does what the engine host does, with arithmetic in place of engines: ask the turn policy, bring the chosen model in,
run steps of it. As long as the policy's answer holds, all steps up to the next thing that can change it are one leap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tokenpool.policy.capacity import Role
from tokenpool.policy.eviction import ReuseEstimator
from tokenpool.policy.turns import Decision, Phase, PoolView, Residency, TurnPolicy
from tokenpool.sim.device_memory import DeviceMemory, Need, Node
from tokenpool.sim.device_spec import DeviceSpec
from tokenpool.sim.prefixes import PrefixCache
from tokenpool.sim.seat import Seat
from tokenpool.sim.timeline import Timeline

_INF = math.inf
_EPS = 1e-9


class _Leap(NamedTuple):
    """Steps of one model in a row that are all alike."""

    seat: Seat
    start_s: float
    step_s: float
    steps: int
    admitted: tuple[Timeline, ...]
    """Requests prefilled in it; then it is one step."""
    decodes: bool


class SimDevice:
    """One device. `schedule` asks for a call of `wake` at a time; `hand_over` takes the requests of a prefill device.

    `make_seat` takes a model and its number here. The order of calls is that of the simulated time. `index` tells
    devices apart.
    """

    def __init__(
        self,
        index: int,
        spec: DeviceSpec,
        policy: TurnPolicy,
        make_seat: Callable[[str, int], Seat],
        schedule: Callable[[float, SimDevice, int], None],
        done: Callable[[Timeline], None],
        hand_over: Callable[[Timeline, float, float], None] | None = None,
        node: Node | None = None,
    ) -> None:
        self.index, self.spec, self.policy, self._node = index, spec, policy, node
        self.seats: dict[str, Seat] = {}
        """By model, of those that were ever asked for here."""
        self.active: list[Seat] = []
        """Seats with work, in order of index."""
        self.memory = DeviceMemory(spec, self.seats, node)
        self.prefixes = PrefixCache(spec.prefix_bytes, is_on_device=spec.prefix_on_device)
        self.reuse = ReuseEstimator()
        self.busy_s = self.waited_s = 0.0
        """Seconds in steps, and seconds in which a chosen model was waited for."""
        self.last_prefill_s = -_INF
        """When the last step ended that prefilled a request."""
        self.switches = self.decisions = self.steps = 0
        self._make_seat, self._schedule, self._done, self._hand_over = make_seat, schedule, done, hand_over
        self._version = 0
        self._leap: _Leap | None = None
        self._pending: tuple[Seat, Phase] | None = None
        self._current: Seat | None = None
        self._turn_started_s = 0.0

    # -- from outside --------------------------------------------------------------------------------

    def seat(self, model: str) -> Seat:
        """The model's place here, made on first use."""
        seat = self.seats.get(model)
        if seat is None:
            seat = self.seats[model] = self._make_seat(model, len(self.seats))
        return seat

    def arrive(self, request: Timeline, now_s: float, *, has_kv: bool = True) -> None:
        """A request comes in; one that has tokens already brings its KV, which lies in host memory, if `has_kv`."""
        seat = self.seat(request.spec.model)
        self.memory.build(seat)
        if not seat.has_work:
            self.active.append(seat)
            self.active.sort(key=lambda s: s.index)
        if request.num_delivered and has_kv:
            seat.resume(request)
        else:
            seat.waiting.append(request)
            seat.count_waiting()
        self.reuse.observe_arrival(seat.name, now_s)
        self._interrupt(now_s)

    @property
    def num_requests(self) -> int:
        """Requests that are here."""
        return sum([seat.num_requests for seat in self.active])

    def accounted_s(self, now_s: float) -> float:
        """Up to when all tokens are counted that came from here: those of a leap count when it ends."""
        return now_s if self._leap is None else min(now_s, self._leap.start_s)

    @property
    def waited_for(self) -> Seat | None:
        """The model whose weights or KV come in before the device can step."""
        return self._pending[0] if self._pending is not None else None

    def preload(self, model: str) -> None:
        """Have the weights here from the start."""
        seat = self.seat(model)
        self.memory.build(seat)
        held_bytes = self.memory.held_bytes(seat)
        if held_bytes > self.memory.free_bytes:
            raise MemoryError(f"{model} does not fit on the device beside what is there")
        seat.residency = Residency.ON_DEVICE
        self.memory.free_bytes -= held_bytes

    def fail(self) -> list[Timeline]:
        """It is gone, with its steps that run and all KV; returns the requests that were here, oldest first."""
        self._version += 1
        self._leap = self._pending = self._current = None
        lost = [r for s in self.active for r in (*s.admitted, *s.running, *s.paused, *s.waiting)]
        self.seats.clear()
        self.active.clear()
        self.memory = DeviceMemory(self.spec, self.seats, self._node)
        self.prefixes.clear()
        return sorted(lost, key=lambda request: request.arrival_s)

    def give_up(self, before_s: float) -> None:
        """Fail the waiting requests without a token that arrived before `before_s`."""
        for seat in [seat for seat in self.active if seat.oldest_s < before_s]:
            late = [r for r in seat.waiting if r.arrival_s < before_s and not r.num_delivered]
            for request in late:
                seat.waiting.remove(request)
                request.failed = True
                self._done(request)
            seat.count_waiting()
            if not seat.has_work:
                self.active.remove(seat)

    def wake(self, now_s: float, version: int) -> None:
        """A time that was asked for has come."""
        if version != self._version:
            if version == 0:  # a copy has ended: the policy may want the next one
                self._interrupt(now_s)
            return
        if self._leap is not None:
            self._land(self._leap)
        if self._pending is not None:
            (seat, phase), self._pending = self._pending, None
            self.memory.settle(now_s)
            if seat.has_work and seat.residency is Residency.ON_DEVICE and not seat.kv_out_bytes:
                self._step(seat, phase, now_s, 0.0)
                return
        self._next(now_s)

    # -- turns ---------------------------------------------------------------------------------------

    def _interrupt(self, now_s: float) -> None:
        """Something changed: decide anew at the next step boundary."""
        leap = self._leap
        if leap is None:
            if self._pending is None:
                self._next(now_s)
        elif leap.steps > 1:
            steps = max(1, math.ceil((now_s - leap.start_s) / leap.step_s - _EPS))
            if steps < leap.steps:
                self._leap = leap._replace(steps=steps)
                self._wake_at(leap.start_s + steps * leap.step_s)

    def _wake_at(self, time_s: float) -> None:
        self._version += 1
        self._schedule(time_s, self, self._version)

    def _next(self, now_s: float) -> None:
        """Decide what runs from now on."""
        self.memory.settle(now_s)
        if not self.active:
            return
        if len(self.active) == 1:
            seat, phase, hold_s = self.active[0], Phase.MIXED, _INF
            prefetch = None
        else:
            decision = self._ask(now_s)
            seat, phase, hold_s = self.seats[decision.run], decision.phase, decision.hold_s
            # What is prefetched waits for the KV of what runs, not the other way round.
            prefetch = decision.prefetch if self.memory.link_free_s <= now_s else None
        is_new = seat is not self._current
        change_s = self.spec.change_s if is_new and self._current is not None else 0.0
        if is_new:
            self._leave_turn(seat)
        ready_s = self._bring_in(seat, now_s)
        if prefetch is not None:
            self._prefetch(self.seats[prefetch], seat, decision.evict, now_s)
        if is_new:
            self._turn_started_s = ready_s
        if ready_s > now_s:
            self.waited_s += ready_s + change_s - now_s
            self._pending = seat, phase
            self._wake_at(ready_s + change_s)
        else:
            self.waited_s += change_s
            self._step(seat, phase, now_s, hold_s, change_s)

    def _ask(self, now_s: float) -> Decision:
        self.decisions += 1
        can_prefetch = self.spec.can_prefetch and self.memory.link_free_s <= now_s
        ready_in_s = self.memory.ready_in_s
        views = [seat.view(ready_in_s(seat, now_s), now_s) for seat in self.active]
        current = self._current.name if self._current else None
        return self.policy.decide(PoolView(now_s, current, views, self._turn_started_s, can_prefetch))

    def _leave_turn(self, seat: Seat) -> None:
        before, self._current = self._current, seat
        if before is not None:
            self.switches += 1
            if self.spec.kv_follows_turn:
                self.memory.kv_out(before)
            elif self.spec.kv_lost:
                self.memory.clear_kv(before)
                before.preempt_all()

    def _bring_in(self, seat: Seat, now_s: float) -> float:
        """Start what is missing for a step; returns when it will be there."""
        if seat.residency is Residency.ON_DEVICE and not seat.kv_out_bytes:
            return now_s
        keep = frozenset((seat.name,))
        try:
            return self.memory.load(seat, now_s, self._need(now_s), keep=keep)
        except MemoryError:
            if not seat.num_decoding:
                raise
            # Its KV filled the device and went out for others, of whom a rest stays: it is computed anew.
            self.memory.clear_kv(seat)
            seat.drop_kv()
            return self.memory.load(seat, now_s, self._need(now_s), keep=keep)

    def _prefetch(self, seat: Seat, run: Seat, evict: str | None, now_s: float) -> None:
        if seat.residency is not Residency.IN_HOST or not self.spec.can_prefetch:
            return
        keep = frozenset((seat.name, run.name))
        ready_s = self.memory.try_load(seat, now_s, self._need(now_s), keep=keep, spare=evict)
        if ready_s is not None:
            self._schedule(ready_s, self, 0)

    def _need(self, now_s: float) -> Need:
        return lambda seat, spare: self.reuse.need(
            seat.name, now_s, has_work=seat.has_work, is_spare=seat.name == spare
        )

    # -- steps ---------------------------------------------------------------------------------------

    def _step(self, seat: Seat, phase: Phase, now_s: float, hold_s: float, change_s: float = 0.0) -> None:
        """Begin a step of `seat` in `change_s`, or as many decode steps in a row as nothing can change."""
        costs, running = seat.costs, seat.running
        admitted: tuple[Timeline, ...] = ()
        copied_s = 0.0
        if seat.waiting and not (phase is Phase.DECODE and running):
            admitted = self._admit(seat, now_s)
        if not admitted and not running:
            if self.memory.is_loading:  # what comes in may leave again
                self._pending = seat, phase
                self._wake_at(self.memory.link_free_s)
            else:  # the oldest request can never be served here
                self._fail_oldest(seat, now_s)
            return
        decodes = bool(running) and not (admitted and phase is Phase.PREFILL)
        step_s = costs.step(len(running), seat.context_tokens) if decodes else 0.0
        steps = 1
        if admitted:
            tokens = sum([request.context_len - request.num_cached for request in admitted])
            squares = sum([request.context_len**2 - request.num_cached**2 for request in admitted])
            copied_s = self._bring_prefixes(seat, admitted, now_s)
            prefill_s = costs.prefill(tokens, squares)
            step_s += prefill_s - costs.prefill_s if decodes else prefill_s
            # A prompt beyond the tokens of a step comes in several, each with its constant.
            step_s += costs.prefill_s * ((tokens - 1) // self.spec.max_batched_tokens)
        else:
            steps = min([request.num_left for request in running])
            if hold_s < _INF:
                steps = max(1, min(steps, int(hold_s / step_s)))
            steps = self._make_kv_room(seat, steps, now_s)
            # KV grows: what a step takes at the middle of the leap is what it takes on average.
            step_s = costs.step(len(running), seat.context_tokens + len(running) * (steps - 1) / 2)
        start_s = now_s + change_s + copied_s
        self._leap = _Leap(seat, start_s, step_s, steps, admitted, decodes)
        self._wake_at(start_s + steps * step_s)

    def _bring_prefixes(self, seat: Seat, admitted: Sequence[Timeline], now_s: float) -> float:
        """Seconds that the step waits for KV of prompts which comes from host memory."""
        found = sum([request.num_cached for request in admitted])
        self.prefixes.hit_tokens += found
        self.prefixes.asked_tokens += sum([request.spec.input_len for request in admitted])
        if not found or self.prefixes.is_on_device:
            return 0.0
        return self.memory.kv_in(found * seat.costs.kv_bytes_per_token, now_s)

    def _admit(self, seat: Seat, now_s: float) -> tuple[Timeline, ...]:
        """Take requests from the queue into the next step, as tokens, places and memory allow."""
        spec = self.spec
        admitted: list[Timeline] = []
        budget = spec.max_batched_tokens - len(seat.running)
        places = min(spec.max_prefills, spec.max_running - len(seat.running))
        per_token = seat.costs.kv_bytes_per_token
        for request in seat.waiting:
            spec_of = request.spec
            request.num_cached = self.prefixes.find(spec_of.model, spec_of.blocks, spec_of.input_len)
            tokens = request.context_len - request.num_cached
            if len(admitted) >= places or (admitted and tokens > budget):
                break
            nbytes = (request.context_len + 1) * per_token
            keep = frozenset((seat.name,))
            if not self.memory.make_room(nbytes, self._need(now_s), keep=keep):
                break
            self.memory.grow(seat, nbytes)
            budget -= tokens
            admitted.append(request)
        for _ in admitted:
            seat.waiting.popleft()
        if admitted:
            seat.count_waiting()
            seat.admitted = admitted
        return tuple(admitted)

    def _make_kv_room(self, seat: Seat, steps: int, now_s: float) -> int:
        """How many steps fit into memory, at most `steps`; the newest requests are preempted where not one does."""
        while True:
            per_step = len(seat.running) * seat.costs.kv_bytes_per_token
            if steps * per_step <= self.memory.free_bytes:
                return steps
            wanted = min(steps, 64) * per_step
            if self.memory.make_room(wanted, self._need(now_s), keep=frozenset((seat.name,))):
                return min(steps, int(self.memory.free_bytes // per_step))
            fits = int(self.memory.free_bytes // per_step)
            if fits or len(seat.running) == 1:
                return max(1, min(steps, fits))
            victim = seat.running[-1]
            self.memory.grow(seat, -victim.context_len * seat.costs.kv_bytes_per_token)
            seat.preempt(victim)

    def _land(self, leap: _Leap) -> None:
        """The steps of a leap are done: tokens go out."""
        self._leap = None
        seat, steps, admitted = leap.seat, leap.steps, leap.admitted
        seat.admitted = []
        self.steps += steps
        self.busy_s += steps * leap.step_s
        running = seat.running
        if leap.decodes:
            for request in running:
                request.deliver(leap.start_s, leap.step_s, steps)
            self.memory.grow(seat, len(running) * steps * seat.costs.kv_bytes_per_token)
        for request in admitted:
            request.deliver(leap.start_s, leap.step_s, 1)
            what = request.spec
            if what.blocks:
                self.prefixes.keep(what.model, what.blocks, what.input_len, seat.costs.kv_bytes_per_token)
        now_s = leap.start_s + steps * leap.step_s
        seat.last_used_s = now_s
        if admitted:
            self.last_prefill_s = now_s
        hand_over = self._hand_over if self.spec.role is Role.PREFILL else None
        for request in admitted:
            if hand_over is not None and request.num_left:
                nbytes = request.context_len * seat.costs.kv_bytes_per_token
                self.memory.grow(seat, -nbytes)
                hand_over(request, now_s, self.memory.out_s(nbytes))
            else:
                running.append(request)
        ended = [request for request in running if not request.num_left]
        if not (ended or admitted):
            seat.count_steps(steps)
            return
        for request in ended:
            self.memory.grow(seat, -request.context_len * seat.costs.kv_bytes_per_token)
            self._done(request)
        seat.count_running(ended=ended)
        if not seat.has_work:
            self.memory.clear_kv(seat)
            self.active.remove(seat)

    def _fail_oldest(self, seat: Seat, now_s: float) -> None:
        request = seat.waiting.popleft()
        seat.count_waiting()
        request.failed = True
        self._done(request)
        if not seat.has_work:
            self.active.remove(seat)
        self._next(now_s)
