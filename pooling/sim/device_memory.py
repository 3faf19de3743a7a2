# SPDX-License-Identifier: Apache-2.0
"""Memory of a simulated device, where weights and KV of its models draw on the same bytes, and of its machine.

What leaves is chosen by `policy.eviction`, as in the engine host.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from tokenpool.config import DEFAULT_PAGE_SIZE
from tokenpool.memory.page_counts import pages_for
from tokenpool.policy.eviction import Candidate, EvictionKind, choose_evictions
from tokenpool.policy.turns import Residency
from tokenpool.sim.seat import Seat

if TYPE_CHECKING:
    from tokenpool.sim.device_spec import DeviceSpec

Need = Callable[[Seat, str | None], float]
"""See `ReuseEstimator.need`; takes a seat and the busy model that can be spared."""


class Node:
    """What the devices of one machine share: host memory, the disk behind it, and the way to the devices.

    Weights are in its host memory once, for all of its devices; the least recently used leave
    first.
    """

    def __init__(self, spec: DeviceSpec) -> None:
        self._link_bytes_per_s, self._disk_bytes_per_s = spec.node_link_bytes_per_s, spec.disk_bytes_per_s
        self._link_free_s = self._disk_free_s = 0.0
        self._left_bytes = spec.node_bytes
        self._held: OrderedDict[str, float] = OrderedDict()
        self._has_been_full = False
        self.disk_bytes = 0.0
        """Read from disk in all."""

    def fetch(self, model: str, nbytes: float, now_s: float) -> float:
        """When the weights are in host memory. Those that find room are there from the start."""
        if model in self._held:
            self._held.move_to_end(model)
            return now_s
        while self._left_bytes < nbytes and self._held:
            self._has_been_full = True
            _, freed = self._held.popitem(last=False)
            self._left_bytes += freed
        self._held[model] = nbytes
        self._left_bytes -= nbytes
        if not self._has_been_full:
            return now_s
        self.disk_bytes += nbytes
        self._disk_free_s = max(now_s, self._disk_free_s) + nbytes / self._disk_bytes_per_s
        return self._disk_free_s

    def wait_s(self, now_s: float) -> float:
        """Seconds that a copy of weights asked for now waits for others."""
        return max(0.0, self._link_free_s - now_s)

    def copied_s(self, nbytes: float, now_s: float, end_s: float) -> float:
        """When a copy of weights to a device ends that would end at `end_s` on a link of its own.

        What was asked for before goes first, so the sum of all copies is never faster than the node.
        """
        self._link_free_s = max(now_s, self._link_free_s) + nbytes / self._link_bytes_per_s
        return max(end_s, self._link_free_s)

    def overtake(self, nbytes: float, now_s: float) -> None:
        """A copy of KV passes before the weights that wait."""
        self._link_free_s = max(now_s, self._link_free_s) + nbytes / self._link_bytes_per_s


class DeviceMemory:
    """Bytes and copies of one device. Copies to it run one after the other; weights never leave by a copy."""

    def __init__(self, spec: DeviceSpec, seats: Mapping[str, Seat], node: Node | None = None) -> None:
        """`node` is what the device shares with others; None = it is alone."""
        self.spec, self._node = spec, node or Node(spec)
        self.free_bytes = float(spec.memory_bytes)
        self.link_free_s = 0.0
        """When the last copy to the device ends."""
        self.weights_in_bytes = self.kv_in_bytes = self.kv_out_bytes = 0.0
        """Totals that were copied."""
        self.evictions = 0
        self._link_bytes_per_s = spec.link_bytes_per_s
        self._max_resident = spec.max_resident
        self._seats = seats
        self._loading: list[Seat] = []
        self._out_free_s = self._now_s = 0.0

    def ready_in_s(self, seat: Seat, now_s: float) -> float:
        """Seconds until the model could step if it were brought in now."""
        residency = seat.residency
        if residency is Residency.ON_DEVICE:
            return seat.kv_out_bytes / self._link_bytes_per_s if seat.kv_out_bytes else 0.0
        if residency is Residency.COPYING:
            return max(0.0, seat.ready_at_s - now_s)
        nbytes = seat.costs.weight_bytes + seat.kv_out_bytes
        wait_s = max(self.link_free_s - now_s, self._node.wait_s(now_s))  # a host knows from the copies before
        return max(0.0, wait_s) + self.spec.switch_s + nbytes / self._link_bytes_per_s

    def out_s(self, nbytes: float) -> float:
        """Seconds of a copy to the host."""
        return nbytes / (self.spec.out_bytes_per_s or self._link_bytes_per_s)

    @property
    def is_loading(self) -> bool:
        """Whether weights are on their way."""
        return bool(self._loading)

    def settle(self, now_s: float) -> None:
        """Take over copies that have ended by now."""
        self._now_s = now_s
        if not self._loading:
            return
        for seat in list(self._loading):
            if seat.ready_at_s <= now_s:
                seat.residency = Residency.ON_DEVICE
                self._loading.remove(seat)

    def load(self, seat: Seat, now_s: float, need: Need, *, keep: frozenset[str]) -> float:
        """Bring in what the model lacks; returns when it is there, or when to try again because a copy is in the way.

        Raises MemoryError if it cannot fit at all.
        """
        ready_s = self.try_load(seat, now_s, need, keep=keep)
        if ready_s is None and self._loading:
            return self.link_free_s
        if ready_s is None:
            raise MemoryError(f"{seat.name} does not fit on the device: give it more memory or leave the model out")
        return ready_s

    def try_load(
        self, seat: Seat, now_s: float, need: Need, *, keep: frozenset[str], spare: str | None = None
    ) -> float | None:
        """As `load`; None, and nothing is changed, if others that may leave are too few."""
        kv_bytes = seat.kv_out_bytes
        if seat.residency is Residency.COPYING and not kv_bytes:
            return seat.ready_at_s
        weights = seat.costs.weight_bytes if seat.residency is Residency.IN_HOST else 0
        if weights and not self._make_place(need, keep, spare):
            return None
        more_bytes = self.spec.resident_bytes if weights else 0.0
        if not self.make_room(weights + more_bytes + kv_bytes, need, keep=keep, spare=spare):
            return None
        # Room that is being emptied by a copy to the host can be filled when that has ended.
        start_s = max(now_s, self._out_free_s)
        nbytes = weights + kv_bytes
        copy_s = nbytes / self._link_bytes_per_s
        if weights:
            start_s = max(start_s, self._node.fetch(seat.name, weights, now_s), self.link_free_s)
            done_s = start_s + self.spec.switch_s + copy_s
            seat.ready_at_s = self.link_free_s = self._node.copied_s(nbytes, now_s, done_s)
        else:
            self._overtake(copy_s, now_s)
            self._node.overtake(nbytes, now_s)
            seat.ready_at_s = max(seat.ready_at_s, start_s + copy_s)  # its weights may be on their way
            self.link_free_s = max(self.link_free_s, seat.ready_at_s)
        self.free_bytes -= nbytes + more_bytes
        seat.join()
        self.weights_in_bytes += weights
        self.kv_in_bytes += kv_bytes
        if weights:
            seat.residency = Residency.COPYING
            self._loading.append(seat)
        return seat.ready_at_s

    def _overtake(self, copy_s: float, now_s: float) -> None:
        """KV goes first: weights are copied in pieces, and those on their way come later by as much."""
        if self.link_free_s > now_s:
            self.link_free_s += copy_s
            for other in self._loading:
                other.ready_at_s += copy_s

    def kv_in(self, nbytes: float, now_s: float) -> float:
        """KV comes in whose room is taken already; returns the seconds of the copy."""
        copy_s = nbytes / self._link_bytes_per_s
        self._overtake(copy_s, now_s)
        self._node.overtake(nbytes, now_s)
        self.link_free_s = max(self.link_free_s, now_s + copy_s)
        self.kv_in_bytes += nbytes
        return copy_s

    def grow(self, seat: Seat, nbytes: float) -> None:
        """The model's KV on the device grows, or shrinks."""
        seat.kv_bytes += nbytes
        self.free_bytes -= nbytes

    def clear_kv(self, seat: Seat) -> None:
        """No request is left: whatever rounding left of its KV is gone."""
        self.free_bytes += seat.kv_bytes
        seat.kv_bytes = seat.kv_out_bytes = 0.0

    def kv_out(self, seat: Seat) -> None:
        """All KV of the model goes to the host."""
        nbytes = seat.kv_bytes
        self.free_bytes += nbytes
        self.kv_out_bytes += nbytes
        seat.kv_out_bytes += nbytes
        seat.kv_bytes = 0.0
        self._out_free_s = max(self._out_free_s, self._now_s) + self.out_s(nbytes)

    def forget(self, seat: Seat) -> None:
        """The model is unloaded; it must have no request. Weights on their way go when they have come."""
        if seat.residency is Residency.ON_DEVICE:
            self._evict(seat)
        if seat.is_built:
            seat.is_built = False
            self.free_bytes += self.spec.engine_bytes

    def build(self, seat: Seat) -> None:
        """The model has an engine here from now on; its memory is taken even if nothing is free at the moment."""
        if not seat.is_built:
            seat.is_built = True
            self.free_bytes -= self.spec.engine_bytes

    def held_bytes(self, seat: Seat) -> float:
        """What the model takes while it is resident, beside KV."""
        return seat.costs.weight_bytes + self.spec.resident_bytes

    def make_room(self, nbytes: float, need: Need, *, keep: frozenset[str], spare: str | None = None) -> bool:
        """Evict until `nbytes` are free; False, and nothing left, if all that may leave is too little."""
        missing = nbytes - self.free_bytes
        if missing <= 0:
            return True
        chosen = choose_evictions(self._candidates(need, keep, spare), pages_for(missing, DEFAULT_PAGE_SIZE))
        if chosen is None:
            return False
        for candidate in chosen:
            seat = self._seats[candidate.owner]
            if candidate.kind is EvictionKind.WEIGHTS:
                self._evict(seat)
            else:
                self.kv_out(seat)
        return self.free_bytes >= nbytes

    def _make_place(self, need: Need, keep: frozenset[str], spare: str | None) -> bool:
        """Keep to the number of resident models."""
        if self._max_resident is None:
            return True
        held = [s for s in self._seats.values() if s.residency in (Residency.ON_DEVICE, Residency.COPYING)]
        if len(held) < self._max_resident:
            return True
        victims = [s for s in held if s.name not in keep and s.residency is Residency.ON_DEVICE]
        if not victims:
            return False
        self._evict(min(victims, key=lambda s: (need(s, None), s.name != spare, s.last_used_s, s.index)))
        return True

    def _evict(self, seat: Seat) -> None:
        self.free_bytes += self.held_bytes(seat)
        seat.residency = Residency.IN_HOST
        self.evictions += 1
        if self.spec.weights_go_out:
            gone_s = self.spec.switch_s + self.out_s(seat.costs.weight_bytes)
            self._out_free_s = max(self._out_free_s, self._now_s) + gone_s

    def _candidates(self, need: Need, keep: frozenset[str], spare: str | None) -> list[Candidate]:
        found = []
        for name, seat in self._seats.items():
            if name in keep:
                continue
            p = need(seat, spare)
            if seat.residency is Residency.ON_DEVICE:
                pages = int(self.held_bytes(seat) // DEFAULT_PAGE_SIZE)
                cost_s = seat.costs.weight_bytes / self._link_bytes_per_s
                found.append(Candidate(EvictionKind.WEIGHTS, name, pages, cost_s, p))
            pages = int(seat.kv_bytes // DEFAULT_PAGE_SIZE)
            if pages:
                cost_s = 2 * seat.kv_bytes / self._link_bytes_per_s
                found.append(Candidate(EvictionKind.PAUSED_KV, name, pages, cost_s, p))
        return found
