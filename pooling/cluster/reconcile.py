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

import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from typing import Any

from tokenpool.cluster.deciding.elastic import Elastic
from tokenpool.cluster.deciding.pool_state import PoolState
from tokenpool.cluster.deciding.scaling import Change
from tokenpool.cluster.deciding.scene import Event, Scene
from tokenpool.cluster.placement import Move, Placement, Situation
from tokenpool.cluster.seats import BAR_S, Seat
from tokenpool.cluster.values import Deployment, HostReport, Order, Peer, SeatState, Use
from tokenpool.errors import CapacityError, ConfigError, HostError, PoolError

_FIRST_SETTLE_S = 300.0
"""Longest wait for all hosts of a new pool: the first to come shall not get every model."""
_SETTLE_S = 3.0
"""Longest wait of a later controller for the hosts that its predecessor knew."""
_ORDER_LIMIT_S = 3600.0
"""For the answer to an order; a host that hangs is killed by its supervisor long before, and one that is slow reports
what it has loaded in the end."""


class Reconciler(PoolState):
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
        elastic: Elastic | None = None,
        period_s: float = math.inf,
        **state: Any,
    ) -> None:
        """`snapshot` is that of the predecessor, empty if it left none; None = there was no predecessor.

        A first controller waits for `num_hosts` hosts before it places models. `tick` is called every `period_s`; what
        passes beyond two of them was no silence of others. See PoolState for `state`: `models`, the
        `servers` that the predecessor had, of which one that says nothing for `server_timeout_s` is gone, and what
        else it is given.
        """
        super().__init__(now_s=now_s, snapshot=snapshot, scaling=elastic.scaling if elastic else None, **state)
        self.gone: list[Peer] = []
        """Servers that hosts are to forget; whoever tells them takes them from here."""
        self._placement = placement
        self._host_timeout_s = host_timeout_s
        self._order_limit_s = order_limit_s
        self._heard_s: dict[str, float] = {}
        self._elastic = elastic
        self._period_s, self._ticked_s = period_s, now_s
        asked = () if snapshot is None or self.scaling is None else self.scaling.wanted
        self._expected = set((snapshot or {}).get("hosts", asked))
        self._num_hosts = num_hosts if snapshot is None else 0
        self._settle_until_s = now_s + (_FIRST_SETTLE_S if snapshot is None else _SETTLE_S)
        self.is_settled = False
        """Whether enough was known to decide; before that a view would tell frontends that hosts are gone."""
        self._min_changes: dict[tuple[str, str], int] = {}  # by (host, life): older reports are of the past
        self._last: dict[str, HostReport] = {}  # of every host that was ever there
        reason = "first of this pool" if snapshot is None else f"takes over from epoch {self.epoch - 1}"
        self._note("controller_started", reason)

    # -- what happens ----------------------------------------------------------------------------------

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

    def tell(self, server: str, uses: Mapping[str, Use], now_s: float) -> list[str] | None:
        """A server has these requests; returns the models of which it shall `equip` hosts, None if it has to join."""
        if server not in self.peers.names:
            return None
        self.lives.uses.tell(server, uses, now_s)
        used = (name for name, use in uses.items() if use.num_held or use.num_unfinished)
        bare = [name for name in used if name in self.models and self.models[name].payload is None]
        return [name for name in bare if name not in self._errors]

    def equip(self, name: str, version: int, made: bytes | PoolError, now_s: float) -> None:
        """A server has made what hosts need of a model, or cannot."""
        if name not in self.models or self.models[name].version != version:
            return
        if isinstance(made, bytes):
            self.models.equip(name, made)
        elif self.models[name].payload is None and name not in self._errors:
            self.lives.keep(self.models, now_s)  # it may be newer than the last decision
            self._note_events([self.lives.fail(name, made, now_s)])

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
        if self.scaling is not None and self.scaling.is_over(report.host):
            return False
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
            if self.seats[pair].state is SeatState.LOADING and self.seats[pair].ordered:
                self.lives.died(pair[0])
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
        self._forgive(now_s)
        for host, heard_s in list(self._heard_s.items()):
            if host in self.hosts and now_s - heard_s > self._host_timeout_s:
                self.host_lost(host, f"no word for {now_s - heard_s:.1f} s")
                self._silent |= {host}
        for peer in self.peers.expire(now_s):
            self._forget_peer(peer, "it says nothing any more")
        if not self._settled(now_s):
            return []
        for name in self.models.finished(self.peers.awaited, now_s):
            self.withdraw(name)
        self._give_up_orders(now_s)
        self._decide(now_s)
        if self._elastic is not None:
            self._note_hosts(self._elastic.look(self, now_s))
        return self._orders(now_s)

    def _forgive(self, now_s: float) -> None:
        """Count no time in which this controller stood still: what others said meanwhile is yet to be heard."""
        still_s, self._ticked_s = now_s - self._ticked_s - 2 * self._period_s, now_s
        if still_s > 0:
            self._heard_s = {host: min(now_s, heard_s + still_s) for host, heard_s in self._heard_s.items()}
            self.peers.forgive(still_s, now_s)

    def _settled(self, now_s: float) -> bool:
        """Whether enough is known to decide: hosts said what they have, and former servers that they are there."""
        if not self.is_settled:
            least = max(1, self._num_hosts) if self.scaling is None else 0
            have_all = not self._expected and len(self.hosts) >= least and not self.peers.missing
            no_longer = self.scaling is not None and now_s >= self._settle_until_s + self._host_timeout_s
            self.is_settled = have_all or (now_s >= self._settle_until_s and bool(self.hosts)) or no_longer
            if self.is_settled:
                self._changed()
        return self.is_settled

    def _decide(self, now_s: float) -> None:
        self.lives.keep(self.models, now_s)
        self.lives.look(now_s, self.peers.names)
        for name in self.lives.forgiven(now_s):
            self._errors.pop(name, None)
            self._changed()
        for _ in range(len(self.hosts) + 1):
            self._note_events(events := self.lives.decide(self._scene(now_s)))
            self._leave_unwanted()
            self._place(now_s)
            if not any(event.action == "wake" for event in events):
                break
        until_s = lambda name: self._bars.until_s(name, self.hosts, now_s)  # noqa: E731
        self._note_events(self.lives.give_up(self._scene(now_s), until_s))

    def _scene(self, now_s: float) -> Scene:
        def has_room(name: str, gone: Set[str]) -> bool:
            return self._placement.has_room(name, self.situation(now_s, {*self.lives.awake, name} - gone, gone))

        retiring, servers = self.models.retiring.keys(), self.peers.awaited
        stranded = self._elastic.stranded(self, now_s) if self._elastic else frozenset()
        return Scene(
            now_s, self.models, retiring, self.seats, servers, len(self.hosts), has_room, self._errors, self._may_come,
            stranded,
        )  # fmt: skip

    def _may_come(self, name: str) -> bool:
        return self._elastic is not None and self._elastic.may_come(self.models[name], self)

    def _note_hosts(self, changes: Iterable[Change]) -> None:
        for action, host, reason in changes:
            self._note(action, reason, host=host)
            if action == "host_ending":  # nothing is on it, and what it still says does not count
                self.hosts.pop(host, None)
                self._last.pop(host, None)
                self._heard_s.pop(host, None)
                self._silent -= {host}
            self._changed()

    def host_ended(self, host: str) -> None:
        """A host that was given back is gone."""
        assert self.scaling is not None
        self.scaling.ended(host)
        self.draining.discard(host)
        self._bars.forget_host(host)
        self._note("host_returned", "its node may go", host=host)
        self._changed()

    def _note_events(self, events: Iterable[Event]) -> None:
        for action, name, reason, error in events:
            self._errors.pop(name, None)
            if error is not None:
                self._errors[name] = error
            self._note(action, reason, name)
            self._changed()

    def _leave_unwanted(self) -> None:
        for (name, host), seat in list(self.seats.items()):
            if seat.state is SeatState.SERVING and not self.is_wanted(name, seat):
                self._leave(name, host, "it is not wanted any more")
                self._changed()
        for seat in self.seats.values():
            if seat.state is SeatState.LEAVING and self.peers.awaited <= seat.left_by:
                seat.state, seat.ordered = SeatState.REMOVING, False
                self._changed()

    def _place(self, now_s: float) -> None:
        situation = self.situation(now_s, self.lives.awake)
        moves = self._placement.decide(situation)
        self._note_homeless(situation, moves)
        for move in moves:
            pair = (move.model, move.host)
            if move.action == "role":
                self._note("role", move.reason, host=move.host)
                self.roles[move.host] = move.role
            elif move.action == "add" and self.models[move.model].payload is None:
                continue  # a server is about to make it
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
        waiting = {name for name, hosts in situation.placed.items() if not hosts} - {move.model for move in moves}
        situation = replace(situation, going={})  # those make room soon
        waiting = {name for name in waiting - self._errors.keys() if not self._may_come(name)}
        for name in [name for name in waiting if not self._placement.has_room(name, situation)]:
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
