# SPDX-License-Identifier: Apache-2.0
"""From what is wanted and what hosts report to orders and a view for frontends. Plain Python: no Ray, no clock, no I/O.

A *seat* is one model on one host:

    LOADING ──done──► SERVING ──► LEAVING ──all servers left──► REMOVING ──done──► (gone)
       │ failed: the pair is barred for a while
       └── its host is lost, or starts a new life: the seat is gone at once, whatever its state

No server is needed for a host to load a model: each has itself attached to the engines that serve.
The hosts are the truth about what is loaded: a new controller takes seats over from their reports.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from tokenpool.cluster.decision_log import Decision, DecisionLog
from tokenpool.cluster.peers import Peers
from tokenpool.cluster.placement import Move, Placement, Situation
from tokenpool.cluster.seats import BAR_S, Bars, Seat, Seats
from tokenpool.cluster.values import ClusterView, Deployment, HostReport, ModelView, Order, Peer, SeatState, SeatView
from tokenpool.cluster.wishes import Wishes
from tokenpool.errors import CapacityError, ConfigError, HostError, PoolError
from tokenpool.policy.capacity import Role

_FIRST_SETTLE_S = 300.0
"""Longest wait for all hosts of a new pool: the first to come shall not get every model."""
_SETTLE_S = 3.0
"""Longest wait of a later controller for the hosts that its predecessor knew."""
_ORDER_LIMIT_S = 3600.0
"""For the answer to an order; a host that hangs is killed by its supervisor long before, and one that is slow reports
what it has loaded in the end."""
_TAKEN = (SeatState.LOADING, SeatState.SERVING)


class Reconciler:
    """All that the controller knows and decides; `now_s` is a monotonic clock of the caller."""

    def __init__(
        self,
        placement: Placement,
        *,
        host_timeout_s: float,
        now_s: float,
        order_limit_s: float = _ORDER_LIMIT_S,
        snapshot: dict[str, Any] | None = None,
        num_hosts: int = 0,
        models: Iterable[Deployment] = (),
        servers: Iterable[Peer] = (),
        server_timeout_s: float = 10.0,
        identity: str = "controller",
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`snapshot` is that of the predecessor, empty if it left none; None = there was no predecessor.

        A first controller waits for `num_hosts` hosts before it places `models`. `servers` are those that the
        predecessor had; one that says nothing for `server_timeout_s` is gone.
        """
        self.identity = identity
        self.epoch = int((snapshot or {}).get("epoch", 0)) + 1
        self.models = Wishes(models, int((snapshot or {}).get("revision", 0)))
        self.peers = Peers(timeout_s=server_timeout_s, now_s=now_s, known=servers)
        self.gone: list[Peer] = []
        """Servers that hosts are to forget; whoever tells them takes them from here."""
        self.is_ending = False
        """Whether servers are to end."""
        self.log = DecisionLog()
        self.hosts: dict[str, HostReport] = {}
        self.seats = Seats()
        """By (model, host)."""
        self.roles = {host: Role(role) for host, role in (snapshot or {}).get("roles", {}).items()}
        """Of hosts that were given one, also of such that are lost: they come back with it."""
        self.draining = set((snapshot or {}).get("draining", ()))
        """Hosts that the operator wants empty, also of such that are lost."""
        self.version = 0
        """Grows with every change that frontends need to know."""
        self._placement = placement
        self._host_timeout_s = host_timeout_s
        self._order_limit_s = order_limit_s
        self._heard_s: dict[str, float] = {}
        self._errors: dict[str, PoolError] = {}
        self._bars = Bars()
        self._expected = set((snapshot or {}).get("hosts", ()))
        self._num_hosts = num_hosts if snapshot is None else 0
        self._settle_until_s = now_s + (_FIRST_SETTLE_S if snapshot is None else _SETTLE_S)
        self.is_settled = False
        """Whether enough was known to decide; before that a view would tell frontends that hosts are gone."""
        self._min_changes: dict[tuple[str, str], int] = {}  # by (host, life): older reports are of the past
        self._last: dict[str, HostReport] = {}  # of every host that was ever there
        self._silent: frozenset[str] = frozenset()
        self._wall_clock = wall_clock
        self._seq = int((snapshot or {}).get("seq", 0))
        reason = "first of this pool" if snapshot is None else f"takes over from epoch {self.epoch - 1}"
        self._note("controller_started", reason)

    # -- what happens ----------------------------------------------------------------------------------

    @property
    def revision(self) -> int:
        """Of what is wanted."""
        return self.models.revision

    def join(self, peer: Peer, now_s: float) -> bool:
        """A server is there; returns whether it has to have itself attached to engines anew."""
        is_new = self.peers.join(peer, now_s)
        self._note("frontend_joined", f"server {peer.name} on {peer.address}, pid {peer.pid}")
        self._changed()
        return is_new

    def leave(self, name: str, now_s: float, reason: str = "it ended") -> None:
        """A server ends."""
        if (peer := self.peers.leave(name, now_s)) is not None:
            self._forget_peer(peer, reason)

    def end(self) -> None:
        """All servers are to end."""
        self.is_ending = True
        self._note("end", "the pool ends")
        self._changed()

    def _forget_peer(self, peer: Peer, reason: str) -> None:
        self.gone.append(peer)
        self._note("frontend_lost", f"server {peer.name} on {peer.address}: {reason}")
        self._changed()

    def deploy(self, deployment: Deployment) -> int:
        """Want one more model; returns its version. Raises ConfigError if there is another one of its name."""
        wanted, before = self.models.deploy(deployment), self.revision
        if wanted.version == before:
            self._errors.pop(wanted.name, None)
            self._bars.forget(wanted.name)
            self._note("model_wanted", f"revision {before}", wanted.name)
            self._changed()
        return wanted.version

    def retire(self, name: str, drain_s: float, now_s: float) -> bool:
        """Want a model no longer once all servers have drained it; returns False if it is not wanted."""
        is_there = self.models.retire(name, drain_s, now_s)
        self._changed()
        return is_there

    def withdraw(self, name: str) -> None:
        """Want a model no longer; its seats are left and unloaded."""
        if self.models.withdraw(name):
            self._errors.pop(name, None)
            self._note("model_unwanted", f"revision {self.revision}", name)
            self._changed()

    def drain(self, host: str, *, is_wanted: bool) -> None:
        """Want a host empty, or in use again; raises ConfigError for one that was never there."""
        if host not in self._last:
            raise ConfigError(f"there is no host {host!r}: the pool has {', '.join(sorted(self._last)) or 'none'}")
        if is_wanted is not (host in self.draining):
            self.draining ^= {host}
            self._note("drain" if is_wanted else "undrain", "the operator asked for it", host=host)
            self._changed()

    def host_reported(self, report: HostReport, now_s: float) -> bool:
        """A host's supervisor is there and says what the host has loaded; returns whether that is news of the host."""
        last = self._last.get(report.host)
        if last is not None and report.generation < last.generation:
            return False  # its node was cut off, and another one has taken its place
        if last is not None and last.node == report.node and last.number > report.number:
            return False  # overtaken by a later one
        self._last[report.host] = report
        is_others = report.controller not in ("", self.identity)
        if report.epoch > self.epoch or (report.epoch == self.epoch and is_others):
            self.epoch = report.epoch + 1  # a predecessor whose snapshot did not reach us
            self._changed()
        self._heard_s[report.host] = now_s
        before = self.hosts.get(report.host)
        if before is not None and before.life and before.life != report.life:
            self.host_lost(report.host, "its process ended")
            before = None
        if not report.life:
            return True
        self.hosts[report.host] = report
        self._silent -= {report.host}
        self._expected.discard(report.host)
        if before is not None and bool(before.overdue) != bool(report.overdue):
            self._note("host_overdue" if report.overdue else "host_in_time", report.overdue, host=report.host)
            self._changed()
        if before is None:
            loaded = f", {len(report.models)} models loaded" if report.models else ""
            self._note("host_joined", f"life {report.life} on {report.address}{loaded}", host=report.host)
            self._changed()
        if report.changes >= self._min_changes.get((report.host, report.life), 0):
            self._adopt(report)
            self._drop_vanished(report)
        return True

    def host_lost(self, host: str, reason: str) -> None:
        """A host is gone with all that it had loaded."""
        if self.hosts.pop(host, None) is None:
            return
        gone = self.seats.on_host(host)
        for pair in gone:
            del self.seats[pair]
        self._min_changes = {key: count for key, count in self._min_changes.items() if key[0] != host}
        self._note("host_lost", f"{reason}; it had {len(gone)} models", host=host)
        self._changed()

    def order_done(self, order: Order, error: Exception | None, now_s: float, changes: int = 0) -> None:
        """The host has carried out an order, its `changes`th, or failed to."""
        self._min_changes[order.host, order.life] = max(changes, self._min_changes.get((order.host, order.life), 0))
        name, pair = order.deployment.name, (order.deployment.name, order.host)
        seat = self.seats.get(pair)
        if seat is None or seat.life != order.life or seat.deployment.version != order.deployment.version:
            return  # another life; what is loaded there will be reported
        if error is None and order.action == "add":
            seat.state = SeatState.SERVING
            self._bars.pop(pair, None)
            self._errors.pop(name, None)
            self._note("model_added", "the host has loaded it", name, order.host)
        elif error is None:
            del self.seats[pair]
            self._note("model_removed", "the host has unloaded it", name, order.host)
        elif order.action == "add":
            del self.seats[pair]
            self._errors[name] = error if isinstance(error, PoolError) else HostError(f"{error}")
            wait_s = self._bars.add(pair, now_s)
            self._note("add_failed", f"{error}; not again for {wait_s:g} s", name, order.host)
        else:
            wait_s = BAR_S[min(seat.failures, len(BAR_S) - 1)]
            seat.ordered, seat.failures, seat.retry_s = False, seat.failures + 1, now_s + wait_s
            self._note("remove_failed", f"{error}; not again for {wait_s:g} s", name, order.host)
        self._changed()

    # -- what follows ----------------------------------------------------------------------------------

    def tick(self, now_s: float) -> list[Order]:
        """Decide; returns the orders to send now. Called once per period and after every event."""
        for host, heard_s in list(self._heard_s.items()):
            if host in self.hosts and now_s - heard_s > self._host_timeout_s:
                self.host_lost(host, f"no word for {now_s - heard_s:.1f} s")
                self._silent |= {host}
        for peer in self.peers.expire(now_s):
            self._forget_peer(peer, "it says nothing any more")
        if not self._settled(now_s):
            return []
        for name in self.models.finished(self.peers.names, now_s):
            self.withdraw(name)
        self._give_up_orders(now_s)
        self._leave_unwanted()
        self._place(now_s)
        return self._orders(now_s)

    def _settled(self, now_s: float) -> bool:
        """Whether enough is known to decide: hosts said what they have, and former servers that they are there."""
        if not self.is_settled:
            have_all = not self._expected and len(self.hosts) >= max(1, self._num_hosts) and not self.peers.missing
            self.is_settled = have_all or (now_s >= self._settle_until_s and bool(self.hosts))
            if self.is_settled:
                self._changed()
        return self.is_settled

    def _leave_unwanted(self) -> None:
        for (name, host), seat in list(self.seats.items()):
            if self.models.get(name) == seat.deployment or seat.state not in _TAKEN:
                continue
            if seat.state is SeatState.SERVING:
                self._leave(name, host, "it is not wanted any more")
            self._changed()
        for seat in self.seats.values():
            if seat.state is SeatState.LEAVING and self.peers.names <= seat.left_by:
                seat.state, seat.ordered = SeatState.REMOVING, False
                self._changed()

    def _place(self, now_s: float) -> None:
        barred = self._bars.at(now_s)
        placed: dict[str, set[str]] = {name: set() for name in self.models}
        leaving: dict[str, set[str]] = {}
        for (name, host), seat in self.seats.items():
            is_placed = seat.state in _TAKEN and self.models.get(name) == seat.deployment
            (placed if is_placed else leaving).setdefault(name, set()).add(host)
        situation = Situation(self.models, self.hosts, placed, leaving, barred, now_s, self.roles, self.draining)
        moves = self._placement.decide(situation)
        self._note_homeless(situation, moves)
        for move in moves:
            pair = (move.model, move.host)
            if move.action == "role":
                self._note("role", move.reason, host=move.host)
                self.roles[move.host] = move.role
            elif move.action == "add" and pair not in self.seats:
                self._note("add", move.reason, *pair)
                life = self.hosts[move.host].life
                self.seats[pair] = Seat(self.models[move.model], life, SeatState.LOADING)
            elif move.action == "remove" and pair in self.seats and self.seats[pair].state is SeatState.SERVING:
                self._leave(*pair, move.reason)
            self._changed()

    def _note_homeless(self, situation: Situation, moves: list[Move]) -> None:
        if not self.hosts:
            return  # they are being started
        waiting = {name for name in self.models if not situation.placed[name]} - {move.model for move in moves}
        for name in [name for name in waiting - self._errors.keys() if not self._placement.has_room(name, situation)]:
            problem = f"model {name!r}: no host has room for it, or may take it; add hosts, or raise their memory"
            self._errors[name] = CapacityError(problem)
            self._note("not_placed", "no host has room for it", name)
            self._changed()

    def _leave(self, name: str, host: str, reason: str) -> None:
        self._note("remove", reason, name, host)
        self.seats[name, host].state = SeatState.LEAVING

    def _orders(self, now_s: float) -> list[Order]:
        orders = []
        for (_, host), seat in self.seats.items():
            if seat.ordered or seat.state not in (SeatState.LOADING, SeatState.REMOVING) or now_s < seat.retry_s:
                continue
            seat.ordered, seat.ordered_s = True, now_s
            orders.append(self._order(host, seat))
        return orders

    def _order(self, host: str, seat: Seat) -> Order:
        action = "add" if seat.state is SeatState.LOADING else "remove"
        return Order(self.epoch, self.identity, host, seat.life, action, seat.deployment)

    def _give_up_orders(self, now_s: float) -> None:
        """Take orders that were never answered as failed; what they came to in the end will be reported."""
        for (_, host), seat in list(self.seats.items()):
            is_due = seat.ordered and seat.state in (SeatState.LOADING, SeatState.REMOVING)
            if is_due and now_s - seat.ordered_s > self._order_limit_s:
                error = HostError(f"{host} has not answered the order for {self._order_limit_s:g} s")
                self.order_done(self._order(host, seat), error, now_s)

    # -- taking over -----------------------------------------------------------------------------------

    def _adopt(self, report: HostReport) -> None:
        """Take over what a host has loaded and nobody here ordered; it is left again if it is not wanted."""
        for name, hosted in report.models.items():
            if (name, report.host) in self.seats:
                continue
            wanted = self.models.get(name)
            if wanted is None or wanted.version != hosted.version:
                wanted = Deployment(name, hosted.version)
            self.seats[name, report.host] = Seat(wanted, report.life, SeatState.SERVING)
            self._note("adopted", "the host has it loaded", name, report.host)
            self._changed()

    def _drop_vanished(self, report: HostReport) -> None:
        """A seat that serves and that the host does not have; a host says so only if something was lost on the way."""
        for name, host in self.seats.on_host(report.host):
            if self.seats[name, host].state is SeatState.SERVING and name not in report.models:
                del self.seats[name, host]
                self._note("vanished", "the host does not have it", name, host)
                self._changed()

    # -- what others see -------------------------------------------------------------------------------

    def view(self) -> ClusterView:
        """What frontends act on."""
        seats: dict[str, dict[str, SeatView]] = {name: {} for name in self.models}
        for (name, host), seat in self.seats.items():
            of_model = seats.setdefault(name, {})
            if (report := self.hosts.get(host)) is not None:
                version = seat.deployment.version
                of_model[host] = SeatView(seat.life, seat.state, version, report.address, report.machine)
        models = {}
        for name, of_model in seats.items():
            version = self.models[name].version if name in self.models else -1
            models[name] = ModelView(version, of_model, self._errors.get(name), self._silent)
        lives = {host: report.life for host, report in self.hosts.items()}
        roles = {host: self.roles[host] for host in self.roles.keys() & lives if self.roles[host] is not Role.MIXED}
        overdue = frozenset(host for host, report in self.hosts.items() if report.overdue)
        return ClusterView(
            self.epoch, self.version, self.revision, models, lives, roles, dict(self.log.totals), overdue,
            frozenset(self.draining & lives.keys()), self.models.retiring, tuple(self.peers), self.is_ending,
        )  # fmt: skip

    def snapshot(self) -> dict[str, Any]:
        """What the next controller needs beyond what hosts and frontends tell it; small and plain."""
        plain = {"epoch": self.epoch, "revision": self.revision, "seq": self._seq, "hosts": sorted(self.hosts)}
        plain |= {"draining": sorted(self.draining)} if self.draining else {}
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
