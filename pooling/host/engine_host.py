# SPDX-License-Identifier: Apache-2.0
"""The engine host: N real vLLM engines in one process, one arena, one loop that decides whose turn it is."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from tokenpool.errors import ConfigError, ModelBusyError, PoolError
from tokenpool.host.engine import encoder_cache
from tokenpool.host.engine.engine_globals import EngineGlobals
from tokenpool.host.engine_builder import EngineBuilder, close_engine
from tokenpool.host.hosted_model import HostedModel
from tokenpool.host.kv.kv_swap import KVSwapper
from tokenpool.host.lending.budget import Budget
from tokenpool.host.lending.sleepers import LET_GO_S, Sleepers
from tokenpool.host.load.build_lane import BuildLane
from tokenpool.host.load.device_choice import spare_host_bytes
from tokenpool.host.load.progress import BuildProgress
from tokenpool.host.loop_calls import LoopCalls
from tokenpool.host.node_share import join_node
from tokenpool.host.pressure import PressureRelief
from tokenpool.host.ranks.rank_devices import open_devices
from tokenpool.host.residency import ResidencyManager
from tokenpool.host.room_maker import RoomMaker
from tokenpool.host.turn_chooser import TurnChooser
from tokenpool.host.waiting import is_blocked
from tokenpool.memory.arena import KVArena
from tokenpool.memory.copy_engine import CopyEngine
from tokenpool.memory.devices.device import Device
from tokenpool.memory.host_ledger import HostLedger
from tokenpool.memory.kv_tier import HostKVTier
from tokenpool.memory.ledger import PageLedger, PageUse
from tokenpool.memory.slab_allocator import SlabAllocator
from tokenpool.memory.weights import WeightStore
from tokenpool.patches import apply_all
from tokenpool.policy.cost_model import CopyModel
from tokenpool.policy.turns import Phase, load_turn_policy
from tokenpool.process.affinity import use_all_cpus
from tokenpool.process.heap import release_engine
from tokenpool.wire.pulse import WAITING, Pulse
from tokenpool.wire.spec import HostConfig, HostedModelSpec
from tokenpool.wire.trace import TraceLog

logger = logging.getLogger(__name__)
_T = TypeVar("_T")
_NAP_S, _LONGEST_NAP_S = 0.001, 0.008
"""How long the loop sleeps while models wait for memory, a copy or a retry: twice as long each time, up to a limit."""


class EngineHost:
    """Owns the arena and the engines. All methods except `call` and `stop` belong to the loop's thread."""

    def __init__(
        self,
        config: HostConfig,
        *,
        device: Device | None = None,
        poison: bool = False,
        executor_class: type[Executor] = UniProcExecutor,
        copy_engine: type[CopyEngine] = CopyEngine,
    ) -> None:
        apply_all()
        self.config = config
        self.ledger = PageLedger(config.device_memory // config.page_size, config.page_size)
        device, self.group = open_devices(config, device, self.ledger.num_pages)
        self.arena = KVArena(device, self.ledger, poison=poison)
        self.allocator = SlabAllocator(self.ledger, self.arena)
        self.models: dict[str, HostedModel] = {}
        self.on_add: Callable[[HostedModel], None] = lambda hosted: None
        """Called with each new model."""
        self.on_idle: Callable[[], None] = lambda: None
        """Called before the loop sleeps and about twice a second otherwise; used for metrics."""
        self.pulse = Pulse()
        self.started_s = time.time()
        self.switches, self.loops, self.overhead_seconds = 0, 0, 0.0
        self.host_ledger = HostLedger(config.host_memory)
        self._wake = threading.Event()
        side = partial(copy_engine, on_start=use_all_cpus, notify=lambda job: self._wake.set())
        books, spare_bytes = (device, self.ledger, self.host_ledger), spare_host_bytes(device, config.host_memory)
        self.weights = WeightStore(*books, poison=poison, copier=side(), fetcher=side(name="weights-fetch"))
        self.swapper = KVSwapper(HostKVTier(self.host_ledger, self.arena.device, spare_bytes=spare_bytes))
        self.trace, copies = TraceLog(), CopyModel()
        room = RoomMaker(self.models, self.allocator, self.weights, self.swapper, self.host_ledger, copies, self.trace)
        self.residency = ResidencyManager(room, self.weights, self.swapper, copies, self.trace)
        policy = load_turn_policy(config.policy, dict(config.policy_options))
        self._turns = TurnChooser(policy, self.residency, self.trace)
        self._globals = EngineGlobals()
        self._relief = PressureRelief(
            self.models, self.allocator, config.kv_floor_pages, room.most_slabs_for, room.keep_promises
        )
        self.node = join_node(config, self.host_ledger, room.host, self.call, device)
        self._lane = BuildLane(self._globals, self.pulse.beat)
        self._builder = EngineBuilder(
            config, self.group, self.allocator, self.weights, self.swapper, self._relief, copies, self._globals,
            self._lane, self._notify, executor_class, self.node,
        )  # fmt: skip
        self.budget = Budget(self.models, self.allocator, self.weights, self._relief, copies, lambda: self._lane.busy)
        self.sleepers = Sleepers(self.models, room, self.weights, self._notify)
        self._inputs: set[str] = set()  # models with new input; set operations are atomic under the GIL
        self._active: dict[str, HostedModel] = {}
        self._current: HostedModel | None = None
        self._previous: HostedModel | None = None  # whose turn ended; its last outputs may still be due
        self._calls = LoopCalls(self.pulse)
        self._next_index, self._naps, self._stopping = 0, 0, False  # naps in a row
        self.budget.begin_with(config.device_budget)

    # -- models --------------------------------------------------------------------------------------

    def add_model(self, spec: HostedModelSpec) -> HostedModel:
        """Load a model and give it turns; raises PoolError and leaves no trace if it cannot be added.

        In a job of `build_beside` the other models keep their turns meanwhile.
        """
        if spec.name in self.models:
            raise ConfigError(f"model {spec.name!r} is in the pool already: give the new one another name")
        self.budget.refuse_parked(spec.name)
        hosted = self._builder.build(spec, self._next_index)
        hosted.core.is_away = lambda: not self.residency.is_ready(hosted)
        hosted.core.obstacle = lambda: hosted.obstacle or self.budget.obstacle
        self.on_add(hosted)
        self._next_index += 1
        self.models[spec.name] = hosted
        self._notify(spec.name)
        logger.info("model added model=%s seconds=%.2f", spec.name, hosted.build_s)
        return hosted

    def remove_model(self, name: str) -> None:
        """Unload a model that has no unfinished requests and give all its pages back."""
        hosted = self.models[name]
        hosted.core._process_input_queue()
        if hosted.core.scheduler.has_unfinished_requests():
            raise ModelBusyError(f"model {name!r} still has requests: drain or abort them first")
        if name in self.weights and not self.weights.stop_job(name, LET_GO_S):
            raise ModelBusyError(f"model {name!r} is being read or copied, and that does not end: try again")
        hosted.core.forget_finished()
        hosted.core.refuse_deferred(f"model {name!r} is being removed", all_of_them=True)
        del self.models[name]
        self._active.pop(name, None)
        self._relief.forget(name)
        self.residency.forget(name)
        self._turns.changed(name)
        self._current = None if self._current is hosted else self._current
        self._previous = None if self._previous is hosted else self._previous
        self._globals.enter(name)  # closing resets some
        close_engine(hosted.core, name)
        if name in self.weights:
            self.weights.remove(name)
        hosted.build.undo()
        self.swapper.forget(name)  # last: slabs that were given up offered their cached blocks to the host tier
        self.ledger.give(name, PageUse.WEIGHTS, hosted.weight_pages)
        self._globals.forget(name)
        del hosted
        release_engine()
        logger.info("model removed model=%s", name)

    # -- the loop ------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve turns until `stop` is called and everything accepted is done; sleeps when there is nothing to do."""
        last_idle_call = 0.0
        while True:
            stepped = self.run_once()
            now = time.monotonic()
            if now - last_idle_call > 0.5 or not (stepped or self._active):
                self.on_idle()
                last_idle_call = now
            if self._lane.busy:
                self.build_on()
                continue
            if stepped or self._inputs or self._calls:
                continue
            if self._stopping and not self._active:
                return
            self.pulse.enter(WAITING)
            self._wake.wait(self.nap_s())
            self._wake.clear()

    def nap_s(self) -> float | None:
        """How long the loop sleeps unless it is woken, after a `run_once` without a step; None = until it is woken."""
        asleep = all(hosted.asleep is not None for hosted in self._active.values())
        if self.budget.is_parked or (asleep and not self.swapper.has_unsaved):
            return None
        self._naps = min(self._naps + 1, 8)
        return min(_NAP_S * 2 ** (self._naps - 1), _LONGEST_NAP_S)

    def run_once(self) -> bool:
        """Drain all inputs, run one engine step of the model whose turn it is; False if none could step.

        Raises EngineLostError when an engine cannot go on: the host must end.
        """
        if self._calls.lost is not None:
            raise self._calls.lost
        stepped = self._run_once()
        self._naps = 0 if stepped else self._naps
        return stepped

    def _run_once(self) -> bool:
        start = time.perf_counter()
        self._calls.run()
        self.pulse.enter("choosing")
        self._drain_inputs()
        if self.residency.busy():
            self._note_failures(self.residency.poll())
        self._relief.review()
        hosted, admit = self._choose() or (None, False)
        if hosted is None or not self._make_ready(hosted):
            self.swapper.copy_ahead()
            return False
        if hosted is not self._current:
            self._switch_to(hosted)
        self._globals.enter(hosted.name)  # another model may have been added or removed since its last step
        hosted.core.run_deferred()
        self.loops += 1
        step_start = time.perf_counter()
        self.overhead_seconds += step_start - start
        try:
            self.pulse.enter("step", hosted.name)
            executed = hosted.core.step_once(admit=admit and hosted.admits)
        except (Exception, SystemExit) as error:  # of a model's code: it ends in quarantine or in EngineLostError
            hosted.quarantine.step_crashed(error)
            self._turns.changed(hosted.name)
            executed = True
        else:
            hosted.quarantine.step_done(executed)
            hosted.rest(executed)
            self._turns.observe_step(hosted, time.perf_counter() - step_start, executed)
        self._after_step(hosted)
        self._relief.after_step(hosted.name, hosted.core, executed)
        if self._previous is not None:
            self._end_turn(self._previous)
        return executed

    def build_on(self) -> None:
        """Let a job of `build_beside` go on for a slice; `run` does so between any two steps."""
        self.pulse.enter("build")
        if self._stopping:
            self._lane.abort()
        self._lane.run_slice(beside=bool(self.models))

    def _after_step(self, hosted: HostedModel) -> None:
        self.swapper.after_step(hosted)
        self.swapper.copy_ahead()
        hosted.core.forget_finished()
        if not hosted.core.has_work():
            self._active.pop(hosted.name, None)
            self.residency.room.changed()

    def _end_turn(self, hosted: HostedModel) -> None:
        """Send what a model's last step gave, which with async scheduling ran on while the next turn began."""
        self._previous = None
        if hosted.core.batch_queue and self._current is not None:
            self._globals.enter(hosted.name)
            hosted.core.drain_batches()
            self._after_step(hosted)
            self._globals.enter(self._current.name)

    def _drain_inputs(self) -> None:
        while self._inputs:
            name = self._inputs.pop()
            if (hosted := self.models.get(name)) is None:
                continue
            core = hosted.core
            core._process_input_queue()
            core.forget_finished()
            self._turns.changed(name)
            self.residency.room.changed()
            if core.has_work() or core.deferred:
                self._active[name] = hosted
                self._relief.wake(name)
                self._naps, hosted.rest_until_s = 0, 0.0
                self.residency.room.reuse.observe_arrival(name, time.time())
            else:
                self._active.pop(name, None)

    def _choose(self) -> tuple[HostedModel, bool] | None:
        """The model to step next and whether it may admit waiting requests; None if none can step."""
        if self.budget.is_parked:
            return None
        now = time.monotonic()
        ready = [h for name, h in self._active.items() if h.may_step(now) and self._relief.may_step(name)]
        ready = [hosted for hosted in ready if not is_blocked(hosted.core)]
        self.residency.fetch(ready)
        ready = [hosted for hosted in ready if self.residency.can_come(hosted)]
        ready = [hosted for hosted in ready if not self._relief.yields(hosted.name)] or ready
        if len(ready) < 2:
            return (ready[0], True) if ready else None
        for hosted in ready:
            if hosted.core.deferred:  # calls of an operator: rare, and no policy knows of them
                return hosted, True
        decision = self._turns.choose(ready, self._current)
        run = self.models[decision.run]
        if decision.prefetch is not None:
            self.residency.prefetch(self.models[decision.prefetch], beside=run, spare=decision.evict)
        return run, decision.phase is not Phase.DECODE

    def _make_ready(self, hosted: HostedModel) -> bool:
        """Bring a model in that is not; False if that failed, to be tried again soon."""
        if self.residency.is_ready(hosted):
            return True
        if self._current is not None and hosted is not self._current:
            self._turns.note_turn(self._current)
        try:
            self.pulse.enter("copy", hosted.name)
            self.residency.bring_in(hosted)
        except PoolError as error:
            self._note_failures([(hosted.name, error)])
            return False
        hosted.failures = 0
        return True

    def _note_failures(self, failed: list[tuple[str, PoolError]]) -> None:
        for name, error in failed:
            if self.models[name].put_off(error):
                self._notify(name)

    def _switch_to(self, hosted: HostedModel) -> None:
        if self._current is not None:
            self.switches += 1
            self._turns.note_turn(self._current)
            self._previous = self._current
        if hosted.build.pool is not None:
            self.allocator.touch(hosted.name)
        self.residency.enter(hosted)
        self._turns.begin_turn()
        self._current = hosted
        hosted.core.counters.turns += 1

    # -- other threads -------------------------------------------------------------------------------

    def call(self, function: Callable[[], _T]) -> Future[_T]:
        """Run `function` on the loop's thread between two steps; usable from any thread."""
        future = self._calls.submit(function)
        self._wake.set()
        return future

    def build_beside(self, job: Callable[[], _T]) -> Future[_T]:
        """Run `job`, which adds models, in slices between the steps of the others; usable from any thread."""
        future = self._lane.submit(lambda: self._calls.guarded(job))
        self._wake.set()
        return future

    @property
    def progress(self) -> BuildProgress:
        """What `add_model` is doing; for other threads to read."""
        return self._builder.progress

    def stop(self) -> None:
        """Let `run` return once all accepted requests are done; usable from any thread or signal handler."""
        self._stopping = True
        self._wake.set()

    def _notify(self, name: str) -> None:
        self._inputs.add(name)
        self._wake.set()

    def note_turn(self) -> None:
        """Note the present turn in the trace as far as it has come."""
        if self._current is not None:
            self._turns.note_turn(self._current)

    # -- state ---------------------------------------------------------------------------------------

    @property
    def current_model(self) -> str | None:
        """The model whose turn it is; None while no model has work."""
        return self._current.name if self._current is not None and self._active else None

    def check(self) -> None:
        """Raise AssertionError unless ledger, arena, allocator and all pools agree."""
        self.allocator.check()
        self.host_ledger.check()
        self.budget.check()
        self.weights.check()
        self.swapper.check()
        for hosted in self.models.values():
            encoder_cache.check(hosted.core)
            if hosted.build.pool is not None:
                hosted.build.pool.check()

    def close(self) -> None:
        """Unload all models, which must be idle, and release the arena."""
        for name in list(self.models):
            self.remove_model(name)
        self.weights.close()
        if self.node is not None:
            self.node.close()
        self.arena.close()
