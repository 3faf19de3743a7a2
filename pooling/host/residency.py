# SPDX-License-Identifier: Apache-2.0
"""Which models are on the device: brings one in, takes others out for it, and undoes what fails half-way.

A model is ready when its weights are resident and its KV is in. To make it so, the manager frees pages (cheapest
victims first, see policy/eviction.py), maps and fills the weights on the side thread and, meanwhile, brings the KV
back on this thread. Every step leaves a legal state: whatever fails, the other models are as they were or merely out,
and the target can be tried again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from tokenpool.errors import PoolError, SwitchError
from tokenpool.host.hosted_model import HostedModel
from tokenpool.host.kv.kv_swap import KVSwapper
from tokenpool.host.room_maker import RoomMaker
from tokenpool.memory.states import WeightState
from tokenpool.memory.weights import WeightStore
from tokenpool.policy.cost_model import CopyKind, CopyModel
from tokenpool.policy.switch_plan import SwitchPlan
from tokenpool.policy.turns import Residency
from tokenpool.wire.trace import TraceLog

logger = logging.getLogger(__name__)

_JOB_LIMIT_S = 600.0


class ResidencyManager:
    """Moves models between device, host memory and disk; called on the host loop's thread only."""

    def __init__(
        self, room: RoomMaker, weights: WeightStore, swapper: KVSwapper, copies: CopyModel, trace: TraceLog
    ) -> None:
        self.room = room
        self.counters = room.counters
        self.copies = copies
        """What copies cost on this device."""
        self._weights = weights
        self._swapper = swapper
        self._trace = trace
        self._job_started: dict[str, float] = {}
        self.last_plan: SwitchPlan | None = None
        """What the last switch that was waited for had to do."""
        self._refused: tuple[str, frozenset[str], int] | None = None  # the prefetch that failed last, and when

    # -- what the loop and the policy ask ------------------------------------------------------------

    def is_ready(self, hosted: HostedModel) -> bool:
        """Whether the model can step now."""
        return self._state(hosted.name) is WeightState.ON_DEVICE and not self._swapper.is_out(hosted.name)

    def is_kv_out(self, hosted: HostedModel) -> bool:
        """Whether KV of paused requests lies in host memory."""
        return self._swapper.is_out(hosted.name)

    def residency(self, hosted: HostedModel) -> Residency:
        """Where the weights are, in the policy's words; READING is ON_DISK."""
        state = self._state(hosted.name)
        return Residency.ON_DISK if state is WeightState.READING else Residency(state.value)

    def weight_bytes(self, hosted: HostedModel) -> int:
        """Bytes of the weights that move; 0 for a model whose weights stay."""
        return self._weights.bytes_of(hosted.name) if hosted.name in self._weights else 0

    def ready_in_s(self, hosted: HostedModel) -> float:
        """Predicted seconds until the model could step if it were brought in now; 0 when it is ready."""
        seconds, state = 0.0, self._state(hosted.name)
        if state is not WeightState.ON_DEVICE:
            nbytes = self._weights.bytes_of(hosted.name)
            if not self.can_come(hosted):
                seconds += self.copies.predict(CopyKind.FROM_DISK, nbytes)
            job = self._weights.job(hosted.name) if state is WeightState.COPYING else None
            seconds += self.copies.predict(CopyKind.TO_DEVICE, nbytes - (job.progress if job else 0))
        if self._swapper.is_out(hosted.name):
            seconds += self.copies.predict(CopyKind.TO_DEVICE, self._swapper.bytes_out(hosted))
        return seconds

    def can_prefetch(self) -> bool:
        """Whether the side thread is free for another model's weights; reads from disk are another's business."""
        return not any(self._state(name) is WeightState.COPYING for name in self._job_started)

    def busy(self) -> bool:
        """Whether a copy is under way whose end the loop should look at."""
        return bool(self._job_started) or self._swapper.is_moving

    def enter(self, hosted: HostedModel) -> None:
        """The model takes its turn: it is not evicted for another's growth, and its copies go last."""
        self.room.current = hosted.name
        self.room.host.entered(hosted.name)
        if hosted.name in self._weights:
            self._weights.touch(hosted.name)
        self.room.changed()

    def _state(self, name: str) -> WeightState:
        return self._weights.state(name) if name in self._weights else WeightState.ON_DEVICE

    # -- bringing in ---------------------------------------------------------------------------------

    def can_come(self, hosted: HostedModel) -> bool:
        """Whether `bring_in` may be called: the weights are in host memory or on the device."""
        return self._state(hosted.name) not in (WeightState.ON_DISK, WeightState.READING)

    def bring_in(self, hosted: HostedModel) -> None:
        """Make the model, which can come, ready and wait for it.

        Raises PoolError when a phase fails; the state is legal and the call can be repeated.
        """
        start = time.time()
        self.room.host.staying = frozenset({hosted.name})
        try:
            plan = self._bring_in(hosted)
        finally:
            self.room.host.staying = frozenset()
        end = time.time()
        self.counters.switches += 1
        self.counters.visible_seconds += end - start
        moved = {kind.value: nbytes for kind, nbytes in plan.bytes_by_kind.items() if nbytes}
        self._trace.record("switch", hosted.name, start, end, predicted_s=plan.predicted_s, bytes=moved)
        self.last_plan = plan

    def _bring_in(self, hosted: HostedModel) -> SwitchPlan:
        if self._swapper.is_out(hosted.name):
            self._swapper.settle(hosted.name)  # it may be leaving
        plan = self._start_load(hosted)
        if self._swapper.is_out(hosted.name):
            self._kv_in(hosted)
        if self._state(hosted.name) is WeightState.COPYING:
            job = self._weights.job(hosted.name)
            if job is None or not job.wait(_JOB_LIMIT_S):
                self._job_started.pop(hosted.name, None)
                self.room.evict(hosted.name)
                raise SwitchError(hosted.name, "copy", f"the weights did not arrive in {_JOB_LIMIT_S:.0f} s")
            self._finish_job(hosted.name)
        assert self.is_ready(hosted), f"{hosted.name!r} was brought in and is not ready"
        return plan

    def prefetch(self, hosted: HostedModel, *, beside: HostedModel | None = None, spare: str | None = None) -> bool:
        """Start to bring weights in while `beside` runs, which stays; False when that cannot start now.

        `spare` is the busy model that goes first if idle ones are not enough.
        """
        if not self.can_prefetch() or self._state(hosted.name) is not WeightState.IN_HOST:
            return False
        keep = frozenset({beside.name} if beside else ())
        attempt = (hosted.name, keep, self.room.version)
        if attempt == self._refused:
            return False
        try:
            self.room.host.staying = keep | {hosted.name}
            self._start_load(hosted, keep=keep, spare=spare, wait=False)
        except PoolError as error:
            logger.debug("no prefetch model=%s reason=%s", hosted.name, error)
            self._refused = attempt
            return False
        finally:
            self.room.host.staying = frozenset()
        self.counters.prefetches += 1
        return True

    def fetch(self, waiting: Iterable[HostedModel]) -> None:
        """Start to read the weights of those of `waiting`, which have work, that are on disk, as memory allows."""
        on_disk = [hosted.name for hosted in waiting if self._state(hosted.name) is WeightState.ON_DISK]
        for name in self.room.host.next_fetches(on_disk):
            self._weights.load_host(name)
            self._job_started[name] = time.time()

    def poll(self) -> list[tuple[str, PoolError]]:
        """Take over copies that have ended; returns the models whose copy failed, with the reason."""
        self._swapper.poll()
        failed = []
        for name in list(self._job_started):
            job = self._weights.job(name)
            if job is None or job.done():
                try:
                    self._finish_job(name)
                except PoolError as error:
                    failed.append((name, error))
        return failed

    def _start_load(
        self, hosted: HostedModel, *, keep: frozenset[str] = frozenset(), spare: str | None = None, wait: bool = True
    ) -> SwitchPlan:
        """Get weights into COPYING or beyond, with room for the KV that must come back."""
        name = hosted.name
        if self._swapper.is_out(name):
            # Blocks come back packed by the worst slab's measure and may need one slab more than they had.
            while self._swapper.slabs_needed(hosted) > self.room.most_slabs_for(name) and hosted.core.preempt_newest():
                logger.info("request preempted, its KV does not fit any more model=%s", name)
        plan = self.room.make_room(hosted, keep=keep, spare=spare, wait=wait)
        if self._state(name) is WeightState.IN_HOST:
            self._weights.map(name)
            self._weights.copy(name)
            self._job_started[name] = time.time()
            self.room.changed()
        return plan

    def _finish_job(self, name: str) -> None:
        start = self._job_started.pop(name, time.time())
        job, was_loading = self._weights.job(name), self._weights.state(name) is WeightState.COPYING
        if job is None:  # cancelled meanwhile
            return
        try:
            self._weights.finish(name)
        except SwitchError:
            self.counters.failures += 1
            if was_loading:
                self.room.evict(name)
            raise
        if not was_loading:
            self.room.host.fetched(name)
        kind, label = (CopyKind.TO_DEVICE, "weights_in") if was_loading else (CopyKind.FROM_DISK, "weights_from_disk")
        nbytes = self._weights.bytes_of(name)
        self.copies.observe(kind, nbytes, job.seconds)
        self._trace.record(label, name, start, start + job.seconds, bytes=nbytes)

    def _kv_in(self, hosted: HostedModel) -> None:
        try:
            self._swapper.begin_in(hosted)
        except PoolError:
            self.counters.failures += 1
            raise

    # -- models --------------------------------------------------------------------------------------

    def forget(self, name: str) -> None:
        """The model is being removed: end its copy."""
        self._job_started.pop(name, None)
        if self.room.current == name:
            self.room.current = None
        self.room.reuse.forget(name)
        self.room.host.forget(name)
        self.room.changed()
