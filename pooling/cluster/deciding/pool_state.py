# SPDX-License-Identifier: Apache-2.0
"""What is so in a pool: what is wanted, what hosts have, who serves; and how others see that. Plain Python."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

from tokenpool.cluster.deciding.decision_log import Decision, DecisionLog
from tokenpool.cluster.deciding.lives import Lives
from tokenpool.cluster.deciding.scaling import Scaling
from tokenpool.cluster.peers import Peers
from tokenpool.cluster.placement import Situation
from tokenpool.cluster.seats import Bars, Seat, Seats
from tokenpool.cluster.values import ClusterView, Deployment, HostCount, HostReport, ModelView, Peer, SeatState
from tokenpool.cluster.wishes import Wishes
from tokenpool.errors import PoolError
from tokenpool.policy.capacity import Role

TAKEN = (SeatState.LOADING, SeatState.SERVING)
"""States of a seat that a model is to have, or was to have."""


class PoolState:
    """Changed by `Reconciler` alone."""

    def __init__(
        self,
        *,
        now_s: float,
        snapshot: Mapping[str, Any] | None = None,
        models: Iterable[Deployment] = (),
        servers: Iterable[Peer] = (),
        server_timeout_s: float = 10.0,
        identity: str = "controller",
        max_loaded: int | None = None,
        weight_of: Callable[[str], float] = lambda tenant: 1.0,
        scaling: Scaling | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """See Reconciler."""
        known = snapshot or {}
        self.identity = identity
        self.epoch = int(known.get("epoch", 0)) + 1
        self.models = Wishes(models, int(known.get("revision", 0)))
        awake = None if snapshot is None else known.get("awake", None if known else ())
        self.lives = Lives(max_loaded, weight_of, first_rest=(self.epoch << 32) + 1, known_awake=awake)
        """Which of the models are to have seats."""
        self.lives.keep(self.models, now_s)
        self.peers = Peers(timeout_s=server_timeout_s, now_s=now_s, known=servers)
        self.is_ending = False
        """Whether servers are to end."""
        self.log = DecisionLog()
        self.hosts: dict[str, HostReport] = {}
        self.seats = Seats()
        """By (model, host)."""
        self.roles = {host: Role(role) for host, role in known.get("roles", {}).items()}
        """Of hosts that were given one, also of such that are lost: they come back with it."""
        self.draining = set(known.get("draining", ()))
        """Hosts that the operator wants empty, also of such that are lost."""
        self.scaling = scaling
        """How many hosts there are to be; None = always the same number."""
        self.version = 0
        """Grows with every change that frontends need to know."""
        self._errors: dict[str, PoolError] = {}
        self._silent: frozenset[str] = frozenset()
        self._bars = Bars()
        self._wall_clock = wall_clock
        self._seq = int(known.get("seq", 0))

    @property
    def revision(self) -> int:
        """Of what is wanted."""
        return self.models.revision

    def is_wanted(self, name: str, seat: Seat) -> bool:
        """Whether a seat is one that the model is to have."""
        wanted = self.models.get(name)
        return wanted is not None and wanted.version == seat.deployment.version and self.lives.is_awake(name)

    def situation(self, now_s: float, names: Iterable[str], gone: Set[str] = frozenset()) -> Situation:
        """What the placement is to decide on, with these models wanted, and without those that will be gone."""
        models = {name: self.models[name] for name in names if name in self.models}
        placed: dict[str, set[str]] = {name: set() for name in models}
        leaving: dict[str, set[str]] = {}
        going: dict[str, Deployment] = {}
        for (name, host), seat in self.seats.items():
            if name in gone:
                continue
            is_placed = seat.state in TAKEN and name in models and self.is_wanted(name, seat)
            (placed if is_placed else leaving).setdefault(name, set()).add(host)
            if name not in models:
                going[name] = seat.deployment
        barred = self._bars.at(now_s)
        return Situation(models, self.hosts, placed, leaving, barred, now_s, self.roles, self.emptied, going)

    @property
    def emptied(self) -> Set[str]:
        """Hosts that are to be empty, because the operator wants it or because nobody needs them."""
        return self.draining if self.scaling is None else self.draining | self.scaling.leaving

    # -- what others see -------------------------------------------------------------------------------

    def view(self) -> ClusterView:
        """What frontends act on."""
        seats, models = self.seats.views(self.hosts), {}
        for name in dict.fromkeys([*self.models, *seats]):
            version = self.models[name].version if name in self.models else -1
            is_cold = version >= 0 and name not in seats and not self.lives.is_awake(name)
            seen, rest = seats.get(name, {}), self.lives.rest_of(name)
            models[name] = ModelView(version, seen, self._errors.get(name), is_cold, rest, self._silent)
        lives = {host: report.life for host, report in self.hosts.items()}
        roles = {host: self.roles[host] for host in self.roles.keys() & lives if self.roles[host] is not Role.MIXED}
        overdue = frozenset(host for host, report in self.hosts.items() if report.overdue)
        return ClusterView(
            self.epoch, self.version, self.revision, models, lives, roles, dict(self.log.totals), overdue,
            frozenset(self.emptied & lives.keys()), self.models.retiring, tuple(self.peers), self.is_ending,
            self._host_count(),
        )  # fmt: skip

    def _host_count(self) -> HostCount | None:
        if (scaling := self.scaling) is None:
            return None
        pending = tuple(sorted(scaling.pending(self.hosts)))
        return HostCount(scaling.bounds.least, scaling.bounds.most, pending, tuple(sorted(scaling.leaving)))

    def snapshot(self) -> dict[str, Any]:
        """What the next controller needs beyond what hosts and frontends tell it; small and plain."""
        plain = {"epoch": self.epoch, "revision": self.revision, "seq": self._seq, "hosts": sorted(self.hosts)}
        plain |= {"draining": sorted(self.draining)} if self.draining else {}
        plain |= {"awake": self.lives.awake} if self.lives.has_choice else {}
        return plain | ({"roles": dict(self.roles)} if self.roles else {})

    def check(self) -> None:
        """Prove that every seat is on a living host in that life; raises AssertionError."""
        assert {pair for host in self.hosts for pair in self.seats.on_host(host)} == self.seats.keys()
        for (name, host), seat in self.seats.items():
            report = self.hosts.get(host)
            assert report is not None and report.life == seat.life, f"seat of {name} on {host} outlived its host"

    def _note(self, action: str, reason: str, model: str | None = None, host: str | None = None) -> None:
        self._seq += 1
        at_s = self._wall_clock()
        self.log.add(Decision(self._seq, at_s, self.epoch, self.revision, action, reason, model, host))

    def _changed(self) -> None:
        self.version += 1

    # -- taking over -----------------------------------------------------------------------------------

    def _adopt(self, report: HostReport) -> None:
        """Take over what a host has loaded and nobody here ordered; it is left again if it is not wanted."""
        for name, hosted in report.models.items():
            if (name, report.host) in self.seats:
                continue
            wanted = self.models.get(name)
            if wanted is None or wanted.version != hosted.version:
                wanted = Deployment(name, hosted.version)
            else:
                self.lives.found(name)
            self.seats[name, report.host] = Seat(wanted, report.life, SeatState.SERVING)
            self._note("adopted", "the host has it loaded", name, report.host)
            self._changed()
        if report.building is not None and report.controller != self.identity:
            self._adopt_building(report, *report.building)

    def _adopt_building(self, report: HostReport, name: str, version: int) -> None:
        """Go on with what a former controller has ordered: the host answers the same order once it is carried out."""
        wanted = self.models.get(name)
        if wanted is not None and wanted.version == version and (name, report.host) not in self.seats:
            self.seats[name, report.host] = Seat(wanted, report.life, SeatState.LOADING)
            self.lives.found(name)
            self._note("adopted", "the host is loading it", name, report.host)
            self._changed()

    def _drop_vanished(self, report: HostReport) -> None:
        """A seat that serves and that the host does not have; a host says so only if something was lost on the way."""
        for name, host in self.seats.on_host(report.host):
            if self.seats[name, host].state is SeatState.SERVING and name not in report.models:
                del self.seats[name, host]
                self._note("vanished", "the host does not have it", name, host)
                self._changed()
