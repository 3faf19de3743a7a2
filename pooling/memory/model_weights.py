# SPDX-License-Identifier: Apache-2.0
"""The books of one model's weights: where they are, what holds them, which copy is under way."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass

import torch

from tokenpool.errors import UnfitCopyError
from tokenpool.memory.copies.copy_meta import CopyMeta, ProofMeta, layout_digest, pack_meta, read_meta
from tokenpool.memory.copies.host_copy import HostCopy, PrivateCopy
from tokenpool.memory.copy_engine import CopyJob, Work
from tokenpool.memory.devices.counted import CountedDevice
from tokenpool.memory.states import WeightState
from tokenpool.memory.weight_layout import WeightLayout
from tokenpool.memory.weight_range import WeightRange
from tokenpool.memory.weight_reload import (
    Advance,
    Checksum,
    OnFinal,
    Reload,
    ReloadProof,
    checksum_of,
    try_reload,
)

_LOOK_S = 0.02
"""Between two looks whether another process has filled a copy."""


@dataclass(frozen=True, slots=True)
class WeightsView:
    """One model's weights at one moment, as plain values."""

    state: WeightState
    nbytes: int
    pages: int
    """Pages the range needs, mapped or not."""
    droppable: bool | None
    """Whether the host copy can be given up; None = not tried yet."""
    kept_bytes: int
    """What stays in host memory when the copy is given up."""
    job_bytes: int
    """Progress of the job in flight; 0 without one."""
    loads: int
    keep: str | None = None
    """What is never taken: the weights on the `device`, or their copy in memory of the `host`; None = both may be."""


@dataclass(slots=True)
class ModelWeights:
    """The books of one model's weights; the loop's thread reads and writes them."""

    owner: str
    layout: WeightLayout
    range: WeightRange
    reload: Reload | None
    host: torch.Tensor | None
    """The host copy, flat uint8; None while ON_DISK and READING."""
    copy: HostCopy
    """What that lies in, or lay in before."""
    state: WeightState = WeightState.IN_HOST
    proof: ReloadProof | None = None
    """What a trial of `reload` has shown; None = not tried yet."""
    job: CopyJob | None = None
    """The job of `copy`, `load_host` or `prove_reload` that is in flight, or done and not finished."""
    loads: int = 0
    """How often the weights became resident, adoption not counted."""
    outputs: str = ""
    """What the self-test of this model said; see CopyMeta."""
    keep: str | None = None
    """See WeightsView."""

    @property
    def nbytes(self) -> int:
        """Bytes of the host copy; the range is this, rounded up to pages."""
        return self.layout.nbytes

    def meta(self) -> bytes:
        """What other processes are told of the host copy."""
        proof = ProofMeta.of(self.proof) if self.proof is not None else None
        return pack_meta(CopyMeta(layout_digest(self.layout), self.outputs, proof))

    def fits(self, copy: HostCopy) -> bool:
        """Whether a whole copy, which another process has filled, is the one that this model had before."""
        said = read_meta(copy.meta)
        if said is None or said.proof is None or self.proof is None or not said.fits(self.layout):
            return False
        return said.proof.checksum == self.proof.checksum and copy.tensor.numel() == self.nbytes

    def first_proof(self, known: CopyMeta | None, advance: Advance, *, verify: bool) -> ReloadProof | None:
        """What is known of reading the checkpoint again when the weights are adopted; with `verify` it is tried.

        That reads it to where the tensors are, which have their bytes again afterwards. None = it is not known yet.
        """
        assert self.host is not None
        if known is not None and (proof := self._believe(known, advance)) is not None:
            return proof
        layout, host, reload = self.layout, self.host, self.reload
        if not verify or reload is None or self.copy.is_whole:
            return None
        try:
            return try_reload(layout, host, layout.bytes_of, lambda: reload(advance, lambda tensor: None), advance)
        finally:
            layout.fill_from(host, advance)  # for others who look at the loader's memory, or a failure

    def _believe(self, known: CopyMeta, advance: Advance) -> ReloadProof | None:
        """What a trial has shown before of these bytes; None if they are others. That of a whole copy is its own."""
        assert self.host is not None
        if known.proof is None or not known.fits(self.layout):
            return None
        with suppress(ValueError):
            proof = known.proof.proof(self.host)
            is_own = self.copy.is_whole or not proof.droppable
            if is_own or proof.checksum == checksum_of(self.layout, self.host, advance):
                return proof
        return None

    def drop_copy(self) -> None:
        """Need the host copy, or what was to become one, no more."""
        self.host = None
        self.copy.release()

    def _read_into(self, buffer: torch.Tensor, advance: Advance, on_final: OnFinal = lambda tensor: None) -> None:
        assert self.reload is not None
        self.layout.point_into(buffer)
        try:
            self.reload(advance, on_final)
        finally:
            self.range.point_tensors_here()

    def trial(self, device: CountedDevice) -> Work:
        """What reads the checkpoint into another buffer; returns the proof."""

        def work(job: CopyJob) -> ReloadProof:
            layout, host = self.layout, self.host
            assert host is not None
            buffer = device.host_buffer(self.nbytes)

            def read() -> None:
                self._read_into(buffer, job.advance)

            return try_reload(layout, host, lambda span: layout.slice_of(span, buffer), read, job.advance)

        return work

    def fetch(self, device: CountedDevice) -> Work:
        """What gets the host copy anew: from another process, or else from the checkpoint; returns it."""

        def work(job: CopyJob) -> HostCopy:
            while not self.copy.claim():
                time.sleep(_LOOK_S)
                job.advance(0)
            if self.copy.is_whole and not self.fits(self.copy):
                self.copy.release()
                self.copy = PrivateCopy(device)
            if not self.copy.is_whole:
                self._fill(self.copy, job.advance)
            return self.copy

        return work

    def _fill(self, copy: HostCopy, advance: Advance) -> None:
        assert self.proof is not None
        copy.prepare(self.nbytes)
        copy.allocate(self.nbytes, lambda nbytes: None)
        kept = self.proof.kept
        checksum = Checksum(self.layout, copy.tensor, not_early=kept)
        self._read_into(copy.tensor, advance, checksum.note_final)
        for offset, part in kept.items():
            copy.tensor[offset : offset + part.numel()].copy_(part)
        if checksum.value(advance) != self.proof.checksum:
            raise ValueError("the checkpoint is not the one that the model was added with: remove and add it")
        copy.publish(self.meta())

    def view(self) -> WeightsView:
        """Plain values for state, metrics and tests."""
        return WeightsView(
            state=self.state,
            nbytes=self.nbytes,
            pages=self.range.num_pages,
            droppable=self.proof.droppable if self.proof else None,
            kept_bytes=self.proof.kept_bytes if self.proof else 0,
            job_bytes=self.job.progress if self.job else 0,
            loads=self.loads,
            keep=self.keep,
        )

    def check(self, held_bytes: int) -> None:
        """Raise AssertionError unless pages, host copy and `held_bytes` of the host ledger fit the state."""
        mapped = self.state in (WeightState.COPYING, WeightState.ON_DEVICE)
        assert bool(self.range.pages) == (mapped and self.nbytes > 0), f"{self.owner!r} is {self.state}, wrong pages"
        has_copy = self.state not in (WeightState.ON_DISK, WeightState.READING)
        assert (self.host is not None) == has_copy, f"{self.owner!r} is {self.state}, wrong host copy"
        trial = self.state is WeightState.IN_HOST and self.job is not None
        copies = int(self.state is not WeightState.ON_DISK) + int(trial)
        expected = copies * self.nbytes + (self.proof.kept_bytes if self.proof else 0)
        assert held_bytes == expected, f"{self.owner!r} is {self.state}, holds {held_bytes} bytes on the host"
        if not trial and self.state is not WeightState.READING:  # else the tensors are being read into
            self.range.check()


def check_whole(owner: str, copy: HostCopy, layout: WeightLayout) -> CopyMeta:
    """What was said of a copy that is there already; raises UnfitCopyError if it is not that of such tensors."""
    said = read_meta(copy.meta)
    if said is None or not said.fits(layout) or copy.tensor.numel() != layout.nbytes:
        raise UnfitCopyError(owner, "its tensors lie otherwise")
    return said
