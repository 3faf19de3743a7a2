# SPDX-License-Identifier: Apache-2.0
"""The books of one model's weights: where they are, what holds them, which copy is under way."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenpool.memory.copy_engine import CopyJob
from tokenpool.memory.states import WeightState
from tokenpool.memory.weight_layout import WeightLayout
from tokenpool.memory.weight_range import WeightRange
from tokenpool.memory.weight_reload import Reload, ReloadProof


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


@dataclass(slots=True)
class ModelWeights:
    """The books of one model's weights; the loop's thread reads and writes them."""

    owner: str
    layout: WeightLayout
    range: WeightRange
    reload: Reload | None
    host: torch.Tensor | None
    """The host copy, flat uint8; None while ON_DISK and READING."""
    state: WeightState = WeightState.IN_HOST
    proof: ReloadProof | None = None
    """What a trial of `reload` has shown; None = not tried yet."""
    job: CopyJob | None = None
    """The job of `copy`, `load_host` or `prove_reload` that is in flight, or done and not finished."""
    loads: int = 0
    """How often the weights became resident, adoption not counted."""

    @property
    def nbytes(self) -> int:
        """Bytes of the host copy; the range is this, rounded up to pages."""
        return self.layout.nbytes

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
