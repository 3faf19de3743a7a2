# SPDX-License-Identifier: Apache-2.0
"""Movable weights: each model's tensors live in one fixed address range whose pages come and go.

    ON_DISK ──load_host──► READING ──finish──► IN_HOST ──map──► COPYING ──copy, finish──► ON_DEVICE
       ▲                      │                 │  ▲               │                         │
       └───────drop_host──────┴─────────────────┘  └─────evict─────┴──────────evict──────────┘

The host copy is permanent and the only truth: weights do not change, so eviction unmaps pages and copies nothing.
The range stays reserved as long as the engine lives, so no tensor is touched after adoption, except while a
checkpoint is read again, when nothing computes with them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress

import torch

from tokenpool.errors import CapacityError, SwitchError
from tokenpool.memory.copies.copy_meta import CopyMeta
from tokenpool.memory.copies.host_copy import HostCopy, PrivateCopy
from tokenpool.memory.copy_engine import CopyEngine, CopyJob
from tokenpool.memory.devices.counted import CountedDevice
from tokenpool.memory.devices.device import Device
from tokenpool.memory.fixed_bytes import FixedBytes
from tokenpool.memory.host_ledger import HostLedger, HostUse
from tokenpool.memory.ledger import PageLedger
from tokenpool.memory.model_weights import ModelWeights, WeightsView, check_whole
from tokenpool.memory.states import WeightState, check_transition
from tokenpool.memory.weight_layout import WeightLayout
from tokenpool.memory.weight_range import WeightRange
from tokenpool.memory.weight_reload import Advance, Reload, ReloadProof

logger = logging.getLogger(__name__)


class WeightStore:
    """All movable weights of one device; called on the host loop's thread only.

    Copies to the device run on the side thread of `copier`, reads of checkpoints on that of `fetcher`, so that no
    switch waits for a disk; what a job did counts once `finish` is called for its owner.
    With `poison` (for tests) evicted bytes are compared with the host copy, then filled with 0xFF.
    """

    def __init__(
        self,
        device: Device,
        ledger: PageLedger,
        host: HostLedger,
        *,
        poison: bool = False,
        chunk_bytes: int | None = None,
        copier: CopyEngine | None = None,
        fetcher: CopyEngine | None = None,
    ) -> None:
        self.device = CountedDevice(device)
        """Counts the bytes of all switches: `bytes_to_device`, and `bytes_to_host`, which stays 0."""
        self.ledger = ledger
        self.fixed = FixedBytes(ledger)
        """What stays on the device beside the ranges; `remove` takes an owner out of it too."""
        self.host = host
        self.poison = poison
        self.chunk_bytes = chunk_bytes or device.chunk_bytes
        """Bytes copied between two looks at whether a job was cancelled."""
        self.copier = copier or CopyEngine()
        self.fetcher = fetcher or CopyEngine(name="weights-fetch")
        self.make_room: Callable[[int], None] = lambda pages: None
        """Called before `adopt` takes pages; frees as many or raises CapacityError."""
        self._models: dict[str, ModelWeights] = {}  # least recently used first

    def __contains__(self, owner: str) -> bool:
        return owner in self._models

    # -- coming and going ----------------------------------------------------------------------------

    def adopt(
        self,
        owner: str,
        tensors: Iterable[torch.Tensor],
        reload: Reload | None = None,
        *,
        verify_reload: bool = False,
        advance: Advance = lambda nbytes: None,
        give_up: Callable[[], None] | None = None,
        copy: HostCopy | None = None,
        known: CopyMeta | None = None,
    ) -> ModelWeights:
        """Move `tensors` into a range of their own; they are ON_DEVICE afterwards, at addresses that stay.

        `reload` reads the checkpoint again, see `Reload`; without it the host copy is never dropped. With
        `verify_reload` it is tried at once, on this thread: that reads the checkpoint once more and takes no memory.
        `advance` is called again and again meanwhile; others may use the store then.

        With `give_up` the weights are never on the device twice: it is called before pages are taken for the range,
        when the host has a copy and no tensor views the memory that the loader filled.

        `copy` is what the host copy is to lie in, claimed; one that is whole is taken as it is, whatever the tensors
        hold, or UnfitCopyError is raised. `known` is what a trial has shown at some time before.

        Raises CapacityError when device pages or host memory do not suffice, ValueError for tensors that cannot
        be moved. On any failure nothing is held; the tensors are where they were, or nowhere after `give_up`.
        """
        assert owner not in self._models, f"{owner!r} has weights in the store already"
        copy = copy or PrivateCopy(self.device)
        with ExitStack() as undo:
            undo.callback(copy.release)
            layout = WeightLayout(tensors)
            if not copy.is_whole:
                copy.prepare(layout.nbytes)
            self.host.take(owner, HostUse.WEIGHTS, layout.nbytes)
            undo.callback(self._give_host_memory, owner)
            place = WeightRange(owner, layout, self.device, self.ledger, poison=self.poison)
            undo.callback(place.release)
            if copy.is_whole:
                known = check_whole(owner, copy, layout)
            else:
                copy.allocate(layout.nbytes, self.host.make_room)
                layout.copy_to(copy.tensor, advance)
            host = copy.tensor
            entry = ModelWeights(owner, layout, place, reload, host, copy, WeightState.ON_DEVICE)
            if (proof := entry.first_proof(known, advance, verify=verify_reload)) is not None:
                with suppress(CapacityError):  # no room for what stays of a model on disk: then it is not there for now
                    self._accept(entry, proof)
            if give_up is None:
                undo.callback(layout.restore, layout.save())
            place.point_tensors_here()
            if give_up is not None:
                give_up()
            self._make_room_for(place)
            place.map()
            place.copy_in(host, self.chunk_bytes, advance)
            self._models[owner] = entry
            undo.pop_all()
        return entry

    def keep(self, owner: str, what: str | None) -> None:
        """Note what nobody is to take of `owner`, as in WeightsView; who makes room sees to it."""
        self._models[owner].keep = what

    def publish(self, owner: str, outputs: str = "") -> None:
        """Let other processes have the host copy, if it can be; `outputs` as in CopyMeta."""
        entry = self._in_state(owner, WeightState.ON_DEVICE)
        entry.outputs = outputs
        entry.copy.publish(entry.meta())

    def meta(self, owner: str) -> bytes | None:
        """What is known of reading the checkpoint again, as CopyMeta; None if nobody has tried."""
        entry = self._models[owner]
        return entry.meta() if entry.proof is not None else None

    def _make_room_for(self, place: WeightRange) -> None:
        try:
            self.make_room(place.num_pages)
        except CapacityError as error:
            size = f"{place.num_pages} pages of {self.ledger.page_size} bytes"
            raise CapacityError(
                f"the weights of model {place.owner!r} take {size} on the device: {error}",
                needed_pages=error.needed_pages,
                free_pages=error.free_pages,
            ) from error

    def remove(self, owner: str) -> None:
        """Give everything of `owner` back, in whatever state; its tensors must not be used any more."""
        entry = self._models[owner]
        self._drop_job(entry)
        entry.range.release()
        entry.drop_copy()
        self._give_host_memory(owner)
        self.fixed.remove(owner)
        del self._models[owner]

    def close(self) -> None:
        """Remove all owners and end the side thread."""
        for owner in list(self._models):
            self.remove(owner)
        self.copier.close()
        self.fetcher.close()

    # -- host to device ------------------------------------------------------------------------------

    def map(self, owner: str) -> None:
        """Put free pages under `owner`'s range: IN_HOST → COPYING; a trial of its reload is given up for it.

        Raises CapacityError if too few pages are free and SwitchError if the device refuses; then it stays IN_HOST.
        """
        entry = self._in_state(owner, WeightState.IN_HOST)
        self._drop_job(entry)
        entry.range.map()
        self._become(entry, WeightState.COPYING)

    def copy(self, owner: str) -> CopyJob:
        """Start to copy the weights into the mapped range, on the side thread; `finish` when the job is done."""
        entry = self._in_state(owner, WeightState.COPYING)
        host = entry.host
        assert entry.job is None and host is not None, f"{owner!r} is being copied already"

        def work(job: CopyJob) -> None:
            entry.range.copy_in(host, self.chunk_bytes, job.advance)

        entry.job = self.copier.submit(f"load {owner}", entry.nbytes, work)
        return entry.job

    def finish(self, owner: str) -> None:
        """Take over what a job that is done has achieved: COPYING → ON_DEVICE, READING → IN_HOST.

        Raises SwitchError if it failed or was cancelled: COPYING stays, for `evict` or another `copy`; READING
        becomes ON_DISK again.
        """
        entry = self._models[owner]
        job, entry.job = entry.job, None
        assert job is not None and job.done(), f"{owner!r} has no job that is done"
        if entry.state is WeightState.READING:
            self._finish_fetch(entry, job)
        elif entry.state is WeightState.IN_HOST:
            self._finish_trial(entry, job)
        elif job.succeeded:
            entry.loads += 1
            self._become(entry, WeightState.ON_DEVICE)
        else:
            raise SwitchError(owner, "copy", job.problem) from job.error

    def evict(self, owner: str) -> None:
        """Take the pages away: ON_DEVICE or COPYING → IN_HOST; a copy in flight is cancelled, within one chunk.

        Nothing is copied. Raises SwitchError with `poison` if the bytes on the device are not those of the host
        copy any more, that is if a tensor was adopted that changes; the weights stay resident then.
        """
        entry = self._in_state(owner, WeightState.ON_DEVICE, WeightState.COPYING)
        self._drop_job(entry)
        if self.poison and entry.state is WeightState.ON_DEVICE:
            self.verify(owner)
        entry.range.unmap()
        self._become(entry, WeightState.IN_HOST)

    def verify(self, owner: str) -> None:
        """Raise SwitchError unless the resident bytes are those of the host copy; reads all of them, for tests."""
        entry = self._in_state(owner, WeightState.ON_DEVICE)
        assert entry.host is not None
        entry.range.check_bytes(entry.host)

    # -- host copy and checkpoint --------------------------------------------------------------------

    def prove_reload(self, owner: str) -> CopyJob:
        """Try `reload` on the side thread while `owner` is IN_HOST; needs its bytes in host memory once more.

        `finish` takes the result over; `map` gives the trial up. Raises CapacityError.
        """
        entry = self._in_state(owner, WeightState.IN_HOST)
        assert entry.reload is not None and entry.job is None, f"{owner!r} cannot be tried now"
        self._take_for_trial(entry)
        entry.job = self.fetcher.submit(f"try {owner}", entry.nbytes, entry.trial(self.device))
        return entry.job

    def drop_host(self, owner: str) -> None:
        """Give the host copy up: IN_HOST → ON_DISK, or stop reading it: READING → ON_DISK.

        The first time, unless it was tried before, reads the checkpoint once on this thread, to prove that it gives
        the same bytes. Raises SwitchError if it does not, or cannot be read: such a model stays IN_HOST. Raises
        CapacityError if the trial finds no room.
        """
        entry = self._in_state(owner, WeightState.IN_HOST, WeightState.READING)
        self._drop_job(entry)
        if entry.state is WeightState.ON_DISK:
            return
        if entry.reload is not None and entry.proof is None:
            self._take_for_trial(entry)
            job = self.fetcher.job(f"try {owner}", entry.nbytes, entry.trial(self.device))
            job.run()
            self._finish_trial(entry, job)
        if entry.proof is None or not entry.proof.droppable:
            reason = "there is no way to read them again" if entry.proof is None else entry.proof.problem
            raise SwitchError(owner, "drop", f"the weights must stay in host memory, {reason}")
        entry.drop_copy()
        self.host.give(owner, HostUse.WEIGHTS, entry.nbytes)
        self._become(entry, WeightState.ON_DISK)

    def load_host(self, owner: str) -> CopyJob:
        """Start to read the checkpoint into a new host copy, on the side thread: ON_DISK → READING.

        `finish` when the job is done. Raises CapacityError when host memory does not suffice.
        """
        entry = self._in_state(owner, WeightState.ON_DISK)
        entry.copy = entry.copy.again()
        entry.copy.prepare(entry.nbytes)
        try:
            self.host.take(owner, HostUse.WEIGHTS, entry.nbytes)
        except CapacityError:
            entry.copy.release()
            raise
        self._become(entry, WeightState.READING)
        entry.job = self.fetcher.submit(f"fetch {owner}", entry.nbytes, entry.fetch(self.device))
        return entry.job

    # -- state ---------------------------------------------------------------------------------------

    def touch(self, owner: str) -> None:
        """Mark `owner` as the most recently used."""
        self._models[owner] = self._models.pop(owner)

    @property
    def owners(self) -> list[str]:
        """All owners, least recently used first."""
        return list(self._models)

    def state(self, owner: str) -> WeightState:
        """Where `owner`'s weights are."""
        return self._models[owner].state

    def job(self, owner: str) -> CopyJob | None:
        """The job of `owner` that is in flight, or done and not finished yet."""
        return self._models[owner].job

    def pages_of(self, owner: str) -> int:
        """Pages that `owner`'s range needs when it is resident."""
        return self._models[owner].range.num_pages

    def bytes_of(self, owner: str) -> int:
        """Bytes that `owner`'s host copy has, or would have."""
        return self._models[owner].nbytes

    def snapshot(self) -> dict[str, WeightsView]:
        """Plain values for state, metrics and tests; least recently used owner first."""
        return {owner: entry.view() for owner, entry in self._models.items()}

    def check(self) -> None:
        """Raise AssertionError unless books, ledgers and tensors agree."""
        self.fixed.check()
        for owner, entry in self._models.items():
            entry.check(self.host.held(owner, HostUse.WEIGHTS))

    # -- inside --------------------------------------------------------------------------------------

    def _take_for_trial(self, entry: ModelWeights) -> None:
        # Without the ledger's make_room: a trial is worth nothing that somebody else would have to give up for it.
        if self.host.free_bytes < entry.nbytes:
            raise CapacityError(
                f"to try whether the weights of {entry.owner!r} can be read again takes {entry.nbytes} bytes of host "
                f"memory, {self.host.free_bytes} are free: raise host_memory"
            )
        self.host.take(entry.owner, HostUse.WEIGHTS, entry.nbytes)

    def _finish_trial(self, entry: ModelWeights, job: CopyJob) -> None:
        self.host.give(entry.owner, HostUse.WEIGHTS, entry.nbytes)
        if not job.succeeded:
            raise SwitchError(entry.owner, "prove", job.problem) from job.error
        self._accept(entry, job.result)

    def _accept(self, entry: ModelWeights, proof: ReloadProof) -> None:
        self.host.take(entry.owner, HostUse.WEIGHTS, proof.kept_bytes)
        entry.proof = proof
        if not proof.droppable:
            logger.info("weights stay in host memory model=%s reason=%s", entry.owner, proof.problem)

    def _finish_fetch(self, entry: ModelWeights, job: CopyJob) -> None:
        if job.succeeded:
            entry.host = job.result.tensor
            self._become(entry, WeightState.IN_HOST)
            return
        entry.copy.release()
        self.host.give(entry.owner, HostUse.WEIGHTS, entry.nbytes)
        self._become(entry, WeightState.ON_DISK)
        raise SwitchError(entry.owner, "fetch", job.problem) from job.error

    def stop_job(self, owner: str, limit_s: float) -> bool:
        """Cancel the job of `owner` that is in flight, if any; returns whether its thread has let go in time."""
        if (job := self._models[owner].job) is None:
            return True
        job.cancel()
        return job.wait(limit_s)

    def _drop_job(self, entry: ModelWeights) -> None:
        """Cancel the job of `entry`, if there is one, wait for its thread to let go, and undo what it had begun."""
        job, entry.job = entry.job, None
        if job is None:
            return
        job.cancel()
        job.wait()
        if entry.state is not WeightState.COPYING:  # of a fetch or of a trial: the buffer goes
            self.host.give(entry.owner, HostUse.WEIGHTS, entry.nbytes)
        if entry.state is WeightState.READING:
            entry.copy.release()
            self._become(entry, WeightState.ON_DISK)

    def _give_host_memory(self, owner: str) -> None:
        self.host.give(owner, HostUse.WEIGHTS, self.host.held(owner, HostUse.WEIGHTS))

    def _in_state(self, owner: str, *states: WeightState) -> ModelWeights:
        entry = self._models[owner]
        if entry.state not in states:
            raise AssertionError(f"weights of {owner!r} are {entry.state}, not {' or '.join(states)}")
        return entry

    def _become(self, entry: ModelWeights, state: WeightState) -> None:
        check_transition(entry.state, state)
        entry.state = state
