# SPDX-License-Identifier: Apache-2.0
"""Runs the scenario of one seed on a real host and holds it to the laws.

Each accepted request ends with the right tokens, or with an error that something injected explains. Nobody waits once
the faults have stopped. All books agree at any time, and nothing is left when all models are gone.
"""

from __future__ import annotations

import time
import traceback
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import EngineCoreRequestType, FinishReason

from tests.dst import engines, oracle
from tests.dst.lending import Lending
from tests.dst.scenario import ModelPlan, RequestPlan, Scenario
from tests.dst.world import Violation, World
from tokenpool.errors import EngineLostError, HostError, PoolError
from tokenpool.host.engine.grammar_wait import pending_grammar
from tokenpool.host.engine_host import EngineHost

MOST_TURNS = 20_000
"""Loops after the last event within which everything must have ended."""
_CHECK_PERIOD = 16
_MOST_TRIES = 8
_UTILITY_CALL = 7


@dataclass(slots=True)
class Stream:
    """A request and what its client has got."""

    plan: RequestPlan
    tokens: list[int] = field(default_factory=list)
    expected: list[int] | None = None
    arrival_s: float = 0.0
    aborted: bool = False
    reason: FinishReason | None = None
    why: str = ""
    """What the host said of its failure."""

    @property
    def is_done(self) -> bool:
        return self.reason is not None or self.aborted


@dataclass(frozen=True, slots=True)
class Report:
    """What became of one seed."""

    seed: int
    violation: str | None
    tokens_checked: int
    tokens_computed: int
    tokens: int
    switches: int
    requests: int
    errors: int
    refused_models: int
    hosts_lost: int
    budgets: int
    """Changes of the budget that the host made."""
    parked: int
    sleeps: int
    floors_raised: int
    fingerprint: int
    seconds: float


class Simulation:
    """One run of one scenario."""

    def __init__(self, scenario: Scenario, folder: Path) -> None:
        self.scenario = scenario
        self.world = World(scenario.seed, folder, lateness_s=scenario.lateness_s, head_size=scenario.head_size)
        faults = self.world.faults
        faults.poisoned = dict(scenario.poisoned)
        faults.crash_at = {name: list(steps) for name, steps in scenario.crash_at.items()}
        faults.memory_error_at = dict(scenario.memory_error_at)
        faults.has_to_leave = self._has_to_leave
        self.streams: dict[str, Stream] = {}
        self.plans: dict[str, ModelPlan] = {}
        """Models that are there."""
        self.removing: set[str] = set()
        self.refused = self.hosts_lost = self.switches = self.floors_raised = 0
        self.host: EngineHost | None = None
        self.lending = Lending(self)
        self._raised: str | None = None
        self._queue: list[tuple[float, str, tuple[Any, ...]]] = []

    def run(self) -> None:
        """Play the scenario; raises Violation."""
        with self.world.clock.installed():
            self._run()

    def _run(self) -> None:
        scenario, clock = self.scenario, self.world.clock
        self._start_first_host()
        start_s = clock.now_s
        events = list(scenario.events)
        for request in scenario.requests:
            events.append((request.at_s, "request", (request,)))
            if request.abort_at_s is not None:
                events.append((request.abort_at_s, "abort", (request.request_id,)))
        self._queue = sorted(((start_s + at_s, what, args) for at_s, what, args in events), key=lambda e: e[0])
        loops = since_last = 0
        while self._turn():
            loops += 1
            since_last = 0 if self._queue else since_last + 1
            if since_last > MOST_TURNS:
                raise Violation(f"{self._waiting()} still wait {MOST_TURNS} turns after the last event")
            if loops % _CHECK_PERIOD == 0:
                self._check()
        self._finish()

    # -- one turn ------------------------------------------------------------------------------------

    def _turn(self) -> bool:
        """One pass of the host's loop and of the world around it; False when nothing is left to do."""
        world, clock = self.world, self.world.clock
        while self._queue and self._queue[0][0] <= clock.now_s:
            _, what, args = self._queue.pop(0)
            getattr(self.lending if what in self.lending.EVENTS else self, f"_on_{what}")(*args)
        world.happen()
        lost_before = world.faults.lost
        try:
            stepped = self.host.run_once()
        except EngineLostError as error:
            world.log("host lost", str(error))
            self._collect()
            self._restart()
            return True
        if world.faults.lost > lost_before:
            raise Violation("an engine ran out of memory and its host goes on")
        self._collect()
        raised, self._raised = self._raised, self.host._relief.raised
        self.floors_raised += self._raised not in (None, raised)
        self.lending.check(stepped)
        self._remove_idle()
        if stepped:
            clock.sleep(self.scenario.step_s)
            return True
        if self.host._inputs or self.host._calls:
            return True
        return self._nap()

    def _nap(self) -> bool:
        clock = self.world.clock
        next_s = min(self.world.next_s(), self._queue[0][0] if self._queue else float("inf"))
        nap_s = self.host.nap_s()
        if nap_s is not None:
            clock.now_s = min(clock.now_s + nap_s, max(next_s, clock.now_s))
            return True
        if next_s == float("inf"):
            if self._waiting():
                raise Violation(f"the host sleeps for ever while {self._waiting()} wait")
            return False
        clock.now_s = max(clock.now_s, next_s)
        return True

    def _has_to_leave(self, name: str) -> bool:
        """While its steps are drained, a model that leaves is still the current one; at the end of a turn it is not."""
        is_draining = self.host.models[name].core.scheduler._pause_state is PauseState.PAUSED_ALL
        return is_draining and self.host._current is self.host.models[name]

    def _waiting(self) -> list[str]:
        return [s.plan.request_id for s in self.streams.values() if not s.is_done]

    def _collect(self) -> None:
        for hosted in list(self.host.models.values()):
            queue = hosted.core.output_queue
            while not queue.empty():
                for output in queue.get_nowait()[1].outputs:
                    self._take(self.streams[output.request_id], output)

    def _take(self, stream: Stream, output: Any) -> None:
        if stream.is_done and not stream.aborted:
            raise Violation(f"{output.request_id} says more after its end")
        stream.tokens += output.new_token_ids
        plan = stream.plan
        if stream.expected is None:
            stream.expected = oracle.stream(self.world.facts[plan.model], plan.prompt, plan.max_tokens)
        if stream.tokens != stream.expected[: len(stream.tokens)]:
            raise Violation(f"{plan.request_id} has wrong tokens: {stream.tokens} for {stream.expected}")
        self.world.log(output.request_id, tuple(output.new_token_ids), str(output.finish_reason))
        if output.finish_reason is not None:
            stream.reason = output.finish_reason
            self._judge(stream)

    def _judge(self, stream: Stream) -> None:
        """Whether the end of a request is one that it may have."""
        plan, faults = stream.plan, self.world.faults
        if stream.reason is FinishReason.LENGTH and len(stream.tokens) == plan.max_tokens:
            return
        if stream.reason is FinishReason.ABORT and stream.aborted:
            return
        copies_failed = sum(count for kind, count in faults.fired.items() if kind != "crash") >= 8
        if stream.reason is FinishReason.ERROR and (plan.request_id in faults.crashed or copies_failed):
            return
        raise Violation(f"{plan.request_id} ended with {stream.reason} after {len(stream.tokens)} tokens")

    def _check(self) -> None:
        try:
            self.host.check()
        except AssertionError as error:
            raise Violation(f"the books disagree: {error}") from error

    # -- events --------------------------------------------------------------------------------------

    def _on_request(self, plan: RequestPlan) -> None:
        if plan.model not in self.plans or plan.model in self.removing:
            return  # refused by the frontend
        stream = self.streams[plan.request_id] = Stream(plan, arrival_s=time.time())
        self._send(stream)

    def _send(self, stream: Stream) -> None:
        """Hand a request in, as an engine's receiver does: one that goes on waits for its grammar first."""
        core = self.host.models[stream.plan.model].core
        message = engines.make_request(stream.plan, stream.arrival_s, list(stream.tokens))
        request = core.make_request(message)

        def hand_in() -> None:
            core.restore(request[0], message)
            core.input_queue.put((EngineCoreRequestType.ADD, request))

        def hand_in_late(_: Future[Any]) -> None:
            hosted = self.host.models.get(stream.plan.model) if self.host is not None else None
            if hosted is not None and hosted.core is core and not stream.aborted:
                hand_in()

        if stream.tokens and (grammar := pending_grammar(request[0])) is not None:
            grammar.add_done_callback(hand_in_late)
        else:
            hand_in()

    def _on_abort(self, request_id: str) -> None:
        stream = self.streams.get(request_id)
        if stream is None or stream.is_done:
            return
        stream.aborted = True
        if stream.plan.model not in self.host.models:  # it waits for a host that is parked
            return
        core = self.host.models[stream.plan.model].core
        core.aborts_queue.put_nowait([request_id])
        core.input_queue.put((EngineCoreRequestType.ABORT, [request_id]))

    def _on_drop_client(self, client: int) -> None:
        for stream in self.streams.values():
            if stream.plan.client == client and not stream.is_done:
                stream.aborted = True
        for hosted in self.host.models.values():
            self.host.call(lambda core=hosted.core: core.drop_client(client))
        self.host._calls.run()  # the frontend that takes its place sends nothing before that

    def _on_add(self, plan: ModelPlan) -> None:
        self.host.call(lambda: self._try_add(plan))

    def _on_remove(self, name: str) -> None:
        if name not in self.plans:
            return
        self.removing.add(name)
        for stream in self.streams.values():
            if stream.plan.model == name:
                self._on_abort(stream.plan.request_id)

    def _remove_idle(self) -> None:
        for name in list(self.removing):
            removed = self.host.call(lambda name=name: self.host.remove_model(name))
            self.host._calls.run()
            with suppress(HostError):  # requests that are still there
                removed.result()
                self.removing.discard(name)
                del self.plans[name]

    def _on_pause(self, name: str) -> None:
        self._utility(name, "pause_scheduler", "keep", False)

    def _on_resume(self, name: str) -> None:
        self._utility(name, "resume_scheduler")

    def _utility(self, name: str, method: str, *args: Any) -> None:
        if name in self.plans:
            message = (EngineCoreRequestType.UTILITY, (0, _UTILITY_CALL, method, args))
            self.host.models[name].core.input_queue.put(message)

    def _on_step_clock(self, seconds: float) -> None:
        self.world.clock.wall_offset_s += seconds

    def _on_fault(self, kind: str, rate: float) -> None:
        self.world.faults.rates[kind] = rate

    # -- hosts ---------------------------------------------------------------------------------------

    def _start_first_host(self) -> None:
        """With as few pages as there may be, or nearly."""
        for _ in range(_MOST_TRIES):
            self._start_host(self.scenario.models)
            if not self.refused:
                return
            self.host.close()
            self.world.copy_engines.clear()
            self.plans, self.refused = {}, 0
            self.scenario.spare_pages += 1
        self._start_host(self.scenario.models)

    def _start_host(self, plans: list[ModelPlan]) -> None:
        self.host = engines.make_host(self.world, self.scenario, self.lending.budget)
        for plan in self.lending.loadable(plans):
            self._try_add(plan)

    def _try_add(self, plan: ModelPlan) -> None:
        rates, self.world.faults.rates = self.world.faults.rates, {}
        try:
            engines.add_model(self.host, self.world, plan, self.scenario)
        except PoolError as error:
            self.refused += 1
            self.world.log("refused", plan.name, str(error))
        else:
            self.plans[plan.name] = plan
        finally:
            self.world.faults.rates = rates

    def _restart(self) -> None:
        """The host process has ended: another one has the same models, and the requests are sent again."""
        self.hosts_lost += 1
        self.switches += self.host.switches
        plans, old = [p for n, p in self.plans.items() if n not in self.removing], self.host
        self.plans, self.removing, self.host = {}, set(), None
        old.arena.close()
        self.world.copy_engines.clear()
        self.world.grammars.cancel()
        self.world.device._queue.clear()
        self._start_host(plans)
        self.send_again()
        self.lending.host_is_back()

    def send_again(self) -> None:
        """Send what a host did not finish to its successor, as far as that has loaded the models."""
        for stream in self.streams.values():
            if stream.is_done or self.lending.waits(stream.plan.model):
                continue
            if stream.plan.model not in self.plans:  # the frontend ends what waits for a model that does not come back
                stream.aborted = True
                continue
            self._send(stream)

    def _finish(self) -> None:
        """Remove all models; nothing may be left."""
        self._check()
        host = self.host
        self.switches += host.switches
        for name in list(host.models):
            host.remove_model(name)
        self._check()
        if left := {k: v for k, v in host.host_ledger.snapshot().items() if v}:
            raise Violation(f"host memory is held when all models are gone: {left}")
        if host.ledger.num_free + host.ledger.total("null") != host.ledger.num_pages:
            raise Violation(f"pages are held when all models are gone: {host.ledger.snapshot()}")
        host.close()


def simulate(scenario: Scenario, folder: Path) -> Report:
    """Run a scenario, which is changed; a violation is in the report. What the process dies of is not."""
    start = time.perf_counter()
    simulation, violation = Simulation(scenario, folder), None
    try:
        simulation.run()
    except Violation as error:
        violation = str(error)
    except Exception as error:  # nothing may leave the loop but the loss of an engine
        frames = reversed(traceback.extract_tb(error.__traceback__)[-6:])
        where = " < ".join(f"{frame.name}:{frame.lineno}" for frame in frames)
        violation = f"{type(error).__name__}: {error}: {where}"
    world = simulation.world
    return Report(
        seed=scenario.seed,
        violation=violation,
        tokens_checked=world.tokens_checked,
        tokens_computed=world.tokens_computed,
        tokens=sum(len(s.tokens) for s in simulation.streams.values()),
        switches=simulation.switches,
        requests=len(simulation.streams),
        errors=sum(s.reason is FinishReason.ERROR for s in simulation.streams.values()),
        refused_models=simulation.refused,
        hosts_lost=simulation.hosts_lost,
        budgets=simulation.lending.num_changed,
        parked=simulation.lending.num_parked,
        sleeps=simulation.lending.num_asleep,
        floors_raised=simulation.floors_raised,
        fingerprint=hash(tuple(world.history)),
        seconds=time.perf_counter() - start,
    )
