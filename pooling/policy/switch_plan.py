# SPDX-License-Identifier: Apache-2.0
"""The steps of a switch, in order, with the bytes and seconds of each, before anything moves.

Pure: what is planned here is what `tokenpool.host` carries out and counts. Imports neither vllm nor ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from tokenpool.memory.page_counts import pages_for
from tokenpool.policy.cost_model import CopyKind, CostModel
from tokenpool.policy.eviction import EvictionKind


class SwitchKind(StrEnum):
    """One kind of step; the order is that of a switch."""

    DRAIN = "drain"
    """Wait until the model's steps in flight are done, so that its pages may move."""
    KV_OUT = "kv_out"
    """KV goes to the host, or is dropped if it has 0 bytes to save; its pages come free."""
    WEIGHTS_OUT = "weights_out"
    """Weights are unmapped; no byte is copied."""
    MAP = "map"
    """Pages are mapped for the target."""
    WEIGHTS_IN = "weights_in"
    """Weights are copied from the host."""
    KV_IN = "kv_in"
    """KV of paused requests comes back."""


class Victim(NamedTuple):
    """What gives up pages for the target."""

    model: str
    kind: EvictionKind
    pages: int
    """Pages that come free."""
    kv_bytes: int = 0
    """Bytes of KV to save on the host first; 0 for weights and for KV that is dropped."""
    drain_s: float = 0.0
    """Seconds until the model's steps in flight are done; 0 = none are."""


class SwitchStep(NamedTuple):
    """One step of a plan."""

    kind: SwitchKind
    model: str
    nbytes: int = 0
    """Bytes copied."""
    pages: int = 0
    """Pages that come free (out) or are taken (map)."""
    seconds: float = 0.0
    """Predicted."""


@dataclass(frozen=True, slots=True)
class SwitchPlan:
    """What must happen before `target` can step."""

    target: str
    steps: tuple[SwitchStep, ...]

    @property
    def bytes_by_kind(self) -> dict[SwitchKind, int]:
        """Bytes to copy by kind of step, of the kinds in the plan."""
        totals: dict[SwitchKind, int] = {}
        for step in self.steps:
            totals[step.kind] = totals.get(step.kind, 0) + step.nbytes
        return totals

    @property
    def predicted_s(self) -> float:
        """Seconds of all steps, one after the other."""
        return sum(step.seconds for step in self.steps)

    def visible_s(self, overlap_s: float = 0.0) -> float:
        """Seconds in which the device waits if other models step for `overlap_s` meanwhile; copies hide, nothing else.

        A prefetched switch has the rest of the present turn as its overlap, a blocking one has none.
        """
        copies_s = sum(step.seconds for step in self.steps if step.nbytes)
        return self.predicted_s - min(max(0.0, overlap_s), copies_s)

    @property
    def pages_freed(self) -> int:
        """Pages that victims give up."""
        return sum(step.pages for step in self.steps if step.kind in (SwitchKind.KV_OUT, SwitchKind.WEIGHTS_OUT))


def plan_switch(
    target: str,
    *,
    weights_bytes_missing: int,
    kv_bytes_out_at_host: int,
    victims: Sequence[Victim],
    cost: CostModel,
    page_size: int,
    map_page_s: float = 0.0,
) -> SwitchPlan:
    """The steps that bring `target` in: drains, what leaves, then mapping, weights and KV.

    Pages come free before any is mapped. Weights are copied before KV, which the first step needs last.

    Args:
        target: model to bring in.
        weights_bytes_missing: bytes of its weights that are not on the device yet.
        kv_bytes_out_at_host: bytes of its requests' KV that lie in host memory.
        victims: what gives up pages, in the order in which it shall leave; not the target.
        cost: predicts the copies.
        page_size: bytes per page.
        map_page_s: seconds to map one page.
    """
    steps = [_drain(victim) for victim in _draining(victims)]
    for victim in victims:
        assert victim.model != target, f"{target} cannot make room for itself"
        if victim.kind is EvictionKind.WEIGHTS:
            assert not victim.kv_bytes, f"weights of {victim.model} have no KV to save"
            steps.append(SwitchStep(SwitchKind.WEIGHTS_OUT, victim.model, 0, victim.pages))
        else:
            seconds = cost.predict_copy(CopyKind.TO_HOST, victim.kv_bytes)
            steps.append(SwitchStep(SwitchKind.KV_OUT, victim.model, victim.kv_bytes, victim.pages, seconds))
    pages = pages_for(weights_bytes_missing, page_size) + pages_for(kv_bytes_out_at_host, page_size)
    if pages:
        steps.append(SwitchStep(SwitchKind.MAP, target, 0, pages, pages * map_page_s))
    arrivals = ((SwitchKind.WEIGHTS_IN, weights_bytes_missing), (SwitchKind.KV_IN, kv_bytes_out_at_host))
    for kind, nbytes in arrivals:
        if nbytes:
            steps.append(SwitchStep(kind, target, nbytes, 0, cost.predict_copy(CopyKind.TO_DEVICE, nbytes)))
    return SwitchPlan(target, tuple(steps))


def _draining(victims: Sequence[Victim]) -> list[Victim]:
    """The slowest to drain of each model that has steps in flight."""
    slowest: dict[str, Victim] = {}
    for victim in victims:
        known = slowest.get(victim.model)
        if victim.drain_s > 0 and (known is None or victim.drain_s > known.drain_s):
            slowest[victim.model] = victim
    return list(slowest.values())


def _drain(victim: Victim) -> SwitchStep:
    return SwitchStep(SwitchKind.DRAIN, victim.model, seconds=victim.drain_s)
