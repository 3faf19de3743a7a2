# SPDX-License-Identifier: Apache-2.0
"""Shares host memory among copies of weights, KV of paused requests and cached KV when it does not hold them all.

Cached KV goes first, then host copies that can be read from disk again: of models without work, last of busy ones. A
copy that was read for requests that wait is kept until their model has had a turn, and then for some multiple of the
time that reading takes; so copies that do not fit together are read one after the other, and none is read for nothing.
A model that was put to sleep meanwhile keeps no other one waiting for that turn.
What cannot be enough is left alone: nothing is given up before it is known to help.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from tokenpool.errors import CapacityError
from tokenpool.host.hosted_model import HostedModel
from tokenpool.host.kv.kv_swap import KVSwapper
from tokenpool.host.switch_counters import SwitchCounters
from tokenpool.memory.host_ledger import HostLedger, HostUse
from tokenpool.memory.model_weights import WeightsView
from tokenpool.memory.states import WeightState
from tokenpool.memory.weights import WeightStore
from tokenpool.policy.cost_model import CopyKind, CopyModel

logger = logging.getLogger(__name__)

_TURNS_PER_READ = 3.0
"""How long a busy model keeps the copy that was read for it, in times of what reading it took: 3 = it runs at least
three quarters of the time although another waits for the room."""

_LEAST_HOLD_S, _MOST_DOUBLINGS = 0.05, 16


class HostRoom:
    """Decides whose host copies go; called on the host loop's thread only."""

    def __init__(
        self,
        models: Mapping[str, HostedModel],
        weights: WeightStore,
        swapper: KVSwapper,
        host: HostLedger,
        copies: CopyModel,
        counters: SwitchCounters,
        evict: Callable[[str], None],
    ) -> None:
        self.staying: frozenset[str] = frozenset()
        """Whose copies stay: the models that are being brought in or are about to run."""
        self._models = models
        self._weights = weights
        self._swapper = swapper
        self._host = host
        self._copies = copies
        self._counters = counters
        self._evict = evict
        """Takes a model's weights off the device."""
        self._on_disk_since: dict[str, float] = {}  # models with work whose weights are on disk only
        self._kept_until: dict[str, float] = {}  # busy models whose copy was read; inf until they have had a turn
        self._num_given_up: Counter[str] = Counter()  # how often in a row a busy model's KV was given up
        host.make_room = self._make_room

    # -- reading from disk ---------------------------------------------------------------------------

    def next_fetches(self, on_disk: Iterable[str]) -> Iterable[str]:
        """Of the models `on_disk` with work, those that can be read now, with the room made; longest wait first.

        One that finds no room keeps those behind it from taking it.
        """
        now_s = time.monotonic()
        names = set(on_disk)
        self._on_disk_since = {name: since for name, since in self._on_disk_since.items() if name in names}
        for name in sorted(names):
            self._on_disk_since.setdefault(name, now_s)
        for name in sorted(self._on_disk_since, key=lambda name: self._on_disk_since[name]):
            if not self._make_room_for(name, now_s):
                return
            yield name

    def fetched(self, name: str) -> None:
        """The weights of the model have been read from disk."""
        self._kept_until[name] = math.inf

    def entered(self, name: str) -> None:
        """The model has a turn.

        One whose KV was given up keeps what it has for twice as long each time: at last that is long enough for what
        is lost each time.
        """
        given_up = self._num_given_up[name]
        if given_up and not self._is_busy(name):
            given_up = self._num_given_up[name] = 0
        if self._kept_until.get(name) == math.inf:
            hold_s = max(self._patience_s(name), _LEAST_HOLD_S if given_up else 0.0)
            self._kept_until[name] = time.monotonic() + hold_s * 2 ** min(given_up, _MOST_DOUBLINGS)

    def may_give_up_kv(self, name: str) -> bool:
        """Whether KV of the model's requests may go for good now: not while it makes up for the last time."""
        return not self._num_given_up[name] or self._kept_until.get(name, 0.0) <= time.monotonic()

    def gave_up_kv(self, name: str) -> None:
        """The model's requests were preempted, for want of memory for their KV."""
        self._counters.kv_given_up += 1
        self._num_given_up[name] += 1
        self._kept_until[name] = math.inf

    def forget(self, name: str) -> None:
        """The model is gone."""
        self._num_given_up.pop(name, None)
        self._on_disk_since.pop(name, None)
        self._kept_until.pop(name, None)

    def _patience_s(self, name: str) -> float:
        if name not in self._weights:  # they stay
            return 0.0
        return _TURNS_PER_READ * self._copies.predict(CopyKind.FROM_DISK, self._weights.bytes_of(name))

    def _make_room_for(self, name: str, now_s: float) -> bool:
        """Make room for the copy of a model on disk; busy ones must go if it has waited long enough.

        Where KV of paused requests is in the way of weights without which it is of no use, it is computed again.
        """
        waited = now_s - self._on_disk_since[name] >= self._patience_s(name)
        missing = self._weights.bytes_of(name) - self._host.free_bytes
        if missing <= 0 or self._give_up(missing, busy_resident=waited):
            return True
        on_disk = [name, *(other for other in self._on_disk_since if other != name and self.may_give_up_kv(other))]
        paused = {other: self._host.held(other, HostUse.PAUSED_KV) for other in on_disk}
        if self._bytes_of(self._droppable(busy_resident=waited)) + sum(paused.values()) < missing:
            return False
        for other in (other for other, nbytes in paused.items() if nbytes):
            logger.warning("KV is given up, host memory is full and weights must be read model=%s", other)
            self._models[other].core.preempt_all()
            self.gave_up_kv(other)
            missing = self._weights.bytes_of(name) - self._host.free_bytes
            if missing <= 0 or self._give_up(missing, busy_resident=waited):
                return True
        return False

    # -- giving up -----------------------------------------------------------------------------------

    def _make_room(self, nbytes: int) -> None:
        """The ledger's: KV that must leave the device, or a model that is added, needs `nbytes` more."""
        self._give_up(nbytes, busy_resident=False)

    def give_back(self, nbytes: int) -> None:
        """Others on the node want host memory: what models without work have goes, as far as it helps."""
        goal = self._host.free_bytes + nbytes
        self._swapper.tier.drop_cached(nbytes)
        for name, size in self._droppable(busy_resident=False):
            missing = goal - self._host.free_bytes
            if missing > 0 and not self._is_busy(name):
                self._give_up(min(missing, size), busy_resident=False)

    def _give_up(self, nbytes: int, *, busy_resident: bool) -> bool:
        """Free `nbytes` of host memory, or nothing at all; returns whether they are free."""
        droppable = self._droppable(busy_resident)
        if self._bytes_of(droppable) < nbytes:
            return False
        goal = self._host.free_bytes + nbytes
        self._swapper.tier.drop_cached(nbytes)
        for name, _ in droppable:
            if self._host.free_bytes >= goal:
                break
            if self._weights.state(name) is WeightState.ON_DEVICE:
                self._models[name].core.drain_batches()
                self._evict(name)
            self._weights.drop_host(name)
        return self._host.free_bytes >= goal

    def _bytes_of(self, droppable: list[tuple[str, int]]) -> int:
        """What giving up these copies and all cached KV would free."""
        return self._swapper.tier.droppable_bytes + sum(nbytes for _, nbytes in droppable)

    def _droppable(self, busy_resident: bool) -> list[tuple[str, int]]:
        """Models whose copies may go, and their bytes: idle ones, those off the device first, then busy ones."""
        now_s, found = time.monotonic(), []
        for age, (name, view) in enumerate(self._weights.snapshot().items()):  # least recently used first
            resident = view.state is WeightState.ON_DEVICE
            if (
                name in self.staying
                or name not in self._models  # it is being added
                or view.keep
                or not view.droppable
                or not (resident or view.state is WeightState.IN_HOST)
            ):
                continue
            busy = self._is_busy(name)
            if busy and (self._is_kept(name, now_s) or (resident and not busy_resident)):
                continue
            found.append((busy, resident, age, name, view.nbytes))
        return [(name, nbytes) for _, _, _, name, nbytes in sorted(found)]

    def _is_kept(self, name: str, now_s: float) -> bool:
        """Whether a busy model keeps its copy for its turn: not while it sleeps, and others wait for the room."""
        return self._kept_until.get(name, 0.0) > now_s and self._models[name].asleep is None

    def _is_busy(self, name: str) -> bool:
        hosted = self._models.get(name)
        return hosted is None or bool(hosted.core.scheduler.requests)  # None: it is being added


def check_host_memory(weights: Mapping[str, WeightsView], budget_bytes: int, copies: CopyModel) -> None:
    """Raise CapacityError unless the copy of each model fits while all others are given up as far as they can be.

    Warns when they fit one after the other only.
    """
    stays = {name: view.keep is not None or not view.droppable for name, view in weights.items()}
    least = {name: view.kept_bytes + view.nbytes * stays[name] for name, view in weights.items()}
    for name, view in weights.items():
        needed = sum(least.values()) - least[name] + view.kept_bytes + view.nbytes
        if needed > budget_bytes:
            raise CapacityError(
                f"model {name!r} could not be read into host memory beside what the others must keep there: that takes "
                f"{needed} bytes, host_memory is {budget_bytes}: raise it"
            )
    total = sum(view.nbytes + view.kept_bytes for view in weights.values())
    if total > budget_bytes:
        slowest = max(copies.predict(CopyKind.FROM_DISK, view.nbytes) for view in weights.values())
        logger.warning(
            "host memory holds %d of %d bytes of weights: some are read from disk again, about %.1f s at most",
            budget_bytes, total, slowest,
        )  # fmt: skip
