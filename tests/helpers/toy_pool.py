# SPDX-License-Identifier: Apache-2.0
"""A small deterministic pool in simulated time: one device, more models than fit, any `TurnPolicy` in charge.

It models what a policy decides about and nothing else: steps that cost a base plus a share per request and per
prompt token, weights that take seconds to come in and push others out, copies that run beside steps. KV always fits.
`python -m tests.helpers.toy_compare` prints how the policies fare on it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tokenpool.config import SLO
from tokenpool.policy.slo import Attainments, RequestRecord, attainments
from tokenpool.policy.turns import Decision, ModelView, Phase, PoolView, Residency, TurnPolicy

INF = math.inf


class ToyModel(NamedTuple):
    """One model; the defaults are those of a 7B model on a large GPU, rounded."""

    name: str
    load_s: float = 0.3
    step_s: float = 0.007
    step_per_request_s: float = 0.0001
    prefill_s: float = 0.008
    prefill_per_token_s: float = 20e-6
    ttft_s: float = 10.0
    tpot_s: float = 0.1
    priority: int = 0


@dataclass(slots=True)
class ToyRequest:
    """One request and when its tokens came."""

    model: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    token_times_s: list[float] = field(default_factory=list)
    to_prefill_tokens: int = 0


class Slice(NamedTuple):
    """One step of the trace."""

    start_s: float
    model: str
    phase: Phase


@dataclass(slots=True)
class ToyRun:
    """What came of a run."""

    requests: list[ToyRequest]
    end_s: float = 0.0
    busy_s: float = 0.0
    switch_s: float = 0.0
    """Time in which the device waited for weights."""
    copies: int = 0
    turns: int = 0
    longest_wait_turns: int = 0
    """Most turns of others that a model with work saw pass between two of its own steps."""
    longest_wait_s: float = 0.0
    trace: list[Slice] = field(default_factory=list)

    @property
    def switch_share(self) -> float:
        """Share of the time with work in which the device waited for weights."""
        total = self.switch_s + self.busy_s
        return self.switch_s / total if total else 0.0


class _State:
    def __init__(self, model: ToyModel, index: int) -> None:
        self.model, self.index = model, index
        self.waiting: list[ToyRequest] = []
        self.running: list[ToyRequest] = []
        self.resident = False
        self.last_used_s = -1.0
        self.wait_turns = 0
        self.wait_since_s = 0.0
        self.fields: tuple = ()

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def due_s(self, request: ToyRequest) -> float:
        return request.arrival_s + self.model.ttft_s + len(request.token_times_s) * self.model.tpot_s

    def refresh(self) -> None:
        """Recompute all that changes only with the queues."""
        m, waiting, running = self.model, self.waiting, self.running
        tokens = sum(r.to_prefill_tokens for r in waiting)
        has_slo = m.ttft_s < INF
        self.fields = (
            len(running),
            len(waiting),
            tokens,
            waiting[0].arrival_s if waiting else INF,
            self.due_s(waiting[0]) if waiting and has_slo else INF,
            min(map(self.due_s, running)) if running and has_slo else INF,
            m.ttft_s,
            m.tpot_s,
        )

    def step_seconds(self) -> float:
        return self.model.step_s + self.model.step_per_request_s * max(1, len(self.running))

    def prefill_seconds(self) -> float:
        m = self.model
        return m.prefill_s + m.prefill_per_token_s * self.fields[2] if self.waiting else 0.0


class ToyPool:
    """`slots` models fit on the device; one copy of weights runs at a time."""

    def __init__(
        self,
        models: Sequence[ToyModel],
        policy: TurnPolicy,
        *,
        slots: int,
        max_running: int = 64,
        step_tokens: int = 2048,
        keep_trace: bool = False,
    ) -> None:
        self.states = {model.name: _State(model, i) for i, model in enumerate(models)}
        self.policy = policy
        self.slots, self.max_running, self.step_tokens = slots, max_running, step_tokens
        self.keep_trace = keep_trace
        self.now_s = 0.0
        self.current: str | None = None
        self.turn_started_s = 0.0
        self.loading: str | None = None
        self.loaded_at_s = 0.0

    def run(self, requests: Sequence[ToyRequest], *, until_s: float = INF) -> ToyRun:
        """Serve all requests, or stop at `until_s`; the requests are changed in place."""
        run = ToyRun(list(requests))
        arrivals = sorted(run.requests, key=lambda r: r.arrival_s)
        next_arrival = 0
        while self.now_s < until_s:
            while next_arrival < len(arrivals) and arrivals[next_arrival].arrival_s <= self.now_s:
                self._arrive(arrivals[next_arrival])
                next_arrival += 1
            self._finish_copy()
            views = self._views()
            if not views:
                if next_arrival == len(arrivals):
                    break
                self.now_s = arrivals[next_arrival].arrival_s
                continue
            can_prefetch = self.loading is None and self._victim_for(None) is not None
            pool = PoolView(self.now_s, self.current, views, self.turn_started_s, can_prefetch)
            self._apply(self.policy.decide(pool), run)
        run.end_s = self.now_s
        return run

    def _arrive(self, request: ToyRequest) -> None:
        state = self.states[request.model]
        if not state.has_work():
            state.wait_turns, state.wait_since_s = 0, self.now_s
        request.to_prefill_tokens = request.prompt_tokens
        state.waiting.append(request)
        state.refresh()

    def _views(self) -> list[ModelView]:
        views = []
        for name, state in self.states.items():
            if not state.has_work():
                continue
            busy_s = max(0.0, self.loaded_at_s - self.now_s) if self.loading else 0.0
            if state.resident:
                residency, ready_in_s = Residency.RESIDENT, 0.0
            elif name == self.loading:
                residency, ready_in_s = Residency.LOADING, busy_s
            else:
                residency, ready_in_s = Residency.WARM, busy_s + state.model.load_s
            views.append(
                ModelView(
                    name,
                    state.index,
                    state.model.priority,
                    *state.fields,
                    residency,
                    False,
                    ready_in_s,
                    state.step_seconds(),
                    state.prefill_seconds(),
                )
            )
        return views

    # -- weights -------------------------------------------------------------------------------------

    def _finish_copy(self) -> None:
        if self.loading is not None and self.loaded_at_s <= self.now_s:
            self.states[self.loading].resident = True
            self.loading = None

    def _victim_for(self, running: str | None, evict: str | None = None) -> _State | bool | None:
        """True if a slot is free, else the resident model that leaves: idle ones, then `evict`, then the latest due."""
        resident = [state for state in self.states.values() if state.resident]
        if len(resident) + (self.loading is not None) < self.slots:
            return True
        keep = self.current if running is None else running
        victims = [state for state in resident if state.model.name != keep]
        if not victims:
            return None

        def key(state: _State) -> tuple:
            due_s = min(state.fields[4], state.fields[5]) if state.has_work() else INF
            # Of the busy ones the last to run has waited least; of the idle ones the first is the least likely to.
            used_s = -state.last_used_s if state.has_work() else state.last_used_s
            return (state.has_work(), state.model.name != evict, -due_s, used_s, state.index)

        return min(victims, key=key)

    def _start_copy(self, name: str, running: str, evict: str | None) -> bool:
        victim = self._victim_for(running, evict)
        if victim is None:
            return False
        if victim is not True:
            victim.resident = False
        self.loading, self.loaded_at_s = name, self.now_s + self.states[name].model.load_s
        return True

    def _bring_in(self, name: str, evict: str | None, run: ToyRun) -> None:
        start_s = self.now_s
        if self.loading is not None:
            self.now_s = max(self.now_s, self.loaded_at_s)
            self._finish_copy()
        if not self.states[name].resident:
            run.copies += 1
            assert self._start_copy(name, name, evict), "the only slot is held by the model itself"
            self.now_s = self.loaded_at_s
            self._finish_copy()
        run.switch_s += self.now_s - start_s

    # -- steps ---------------------------------------------------------------------------------------

    def _apply(self, decision: Decision, run: ToyRun) -> None:
        name = decision.run
        state = self.states[name]
        assert state.has_work(), f"{name} has no work"
        if not state.resident:
            self._bring_in(name, decision.evict, run)
        if name != self.current:
            self._begin_turn(name, run)
        run.longest_wait_s = max(run.longest_wait_s, self.now_s - state.wait_since_s)
        prefetch = decision.prefetch
        if prefetch and self.loading is None and not self.states[prefetch].resident:
            run.copies += self._start_copy(prefetch, name, decision.evict)
        if self.keep_trace:
            run.trace.append(Slice(self.now_s, name, decision.phase))
        start_s = self.now_s
        self._step(state, decision.phase)
        state.last_used_s = state.wait_since_s = self.now_s
        state.refresh()
        run.busy_s += self.now_s - start_s

    def _begin_turn(self, name: str, run: ToyRun) -> None:
        self.current, self.turn_started_s = name, self.now_s
        run.turns += 1
        for state in self.states.values():
            if state.model.name == name:
                state.wait_turns = 0
            elif state.has_work():
                state.wait_turns += 1
                run.longest_wait_turns = max(run.longest_wait_turns, state.wait_turns)

    def _step(self, state: _State, phase: Phase) -> None:
        m = state.model
        decoding = [] if phase is Phase.PREFILL and state.waiting else list(state.running)
        admits = not (phase is Phase.DECODE and state.running)
        first: list[ToyRequest] = []
        budget = self.step_tokens - len(decoding)
        prompt_tokens = 0
        while admits and state.waiting and budget > 0 and len(state.running) < self.max_running:
            request = state.waiting[0]
            chunk = min(budget, request.to_prefill_tokens)
            request.to_prefill_tokens -= chunk
            budget -= chunk
            prompt_tokens += chunk
            if request.to_prefill_tokens:
                break
            first.append(state.waiting.pop(0))
            state.running.append(request)
        base_s = m.step_s + m.step_per_request_s * len(decoding) if decoding else m.prefill_s
        self.now_s += base_s + m.prefill_per_token_s * prompt_tokens
        for request in decoding + first:
            request.token_times_s.append(self.now_s)
            if len(request.token_times_s) == request.output_tokens:
                state.running.remove(request)


def poisson_requests(
    models: Sequence[ToyModel],
    rate_per_s: float,
    duration_s: float,
    *,
    seed: int,
    prompt_tokens: int = 690,
    output_tokens: int = 295,
    skew: float = 0.0,
) -> list[ToyRequest]:
    """Seeded arrivals with exponential gaps; `rate_per_s` is the mean per model, `skew` > 0 a Zipf exponent."""
    rng = random.Random(seed)
    weights = [1 / (rank + 1) ** skew for rank in range(len(models))]
    scale = len(models) / sum(weights)
    requests = []
    for model, weight in zip(models, weights, strict=True):
        now_s = rng.expovariate(rate_per_s * weight * scale)
        while now_s < duration_s:
            prompt = max(1, round(rng.expovariate(1 / prompt_tokens)))
            output = max(16, round(rng.expovariate(1 / output_tokens)))
            requests.append(ToyRequest(model.name, now_s, min(prompt, 8192), min(output, 4 * output_tokens)))
            now_s += rng.expovariate(rate_per_s * weight * scale)
    requests.sort(key=lambda r: (r.arrival_s, r.model))
    return requests


def attainments_of(run: ToyRun, models: Sequence[ToyModel]) -> Attainments:
    """The three shares of a run; requests without all their tokens count as failed at its end."""
    slos = {m.name: SLO(m.ttft_s, m.tpot_s) if m.ttft_s < INF else None for m in models}
    return attainments(
        RequestRecord(
            request.arrival_s,
            slos[request.model],
            request.token_times_s,
            None if len(request.token_times_s) == request.output_tokens else run.end_s,
        )
        for request in run.requests
    )
