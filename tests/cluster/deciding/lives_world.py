# SPDX-License-Identifier: Apache-2.0
"""A controller's logic, hosts and servers in memory, without Ray, on a clock of the test: for models on demand."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from tests.cluster.deciding.test_reconcile import MIB, MemoryHost
from tokenpool.cluster.live_placement import placement_of
from tokenpool.cluster.placement import KeepReplicas
from tokenpool.cluster.reconcile import Reconciler
from tokenpool.cluster.values import Deployment, HostReport, Order, Peer, SeatState, Use
from tokenpool.cluster_config import ClusterConfig
from tokenpool.config import Loading
from tokenpool.errors import HostError

PERIOD_S = 0.5
RULE = Loading(at_start=False, unload_after_s=math.inf, keep=None, timeout_s=600.0)
_numbers = itertools.count(1)


def model(name: str, mib: int = 4, **rule: Any) -> Deployment:
    return Deployment(name, 1, weight_bytes=mib * MIB, payload=b"spec", loading=RULE._replace(**rule))


@dataclass(eq=False)
class Request:
    model: str
    steps: int
    since_s: float
    tenant: str = ""
    end: str = ""
    number: int = field(default_factory=lambda: next(_numbers))


class Host(MemoryHost):
    """Takes some periods for a load; what it is told meanwhile waits."""

    def __init__(self, name: str, pages: int = 64, load_periods: int = 1) -> None:
        super().__init__(name, pages)
        self.load_periods = load_periods
        self.orders: list[tuple[Order, int]] = []
        self.is_there = True
        self.built: Counter[str] = Counter()

    @property
    def building(self) -> Deployment | None:
        first = self.orders[0][0] if self.orders else None
        is_new = first is not None and first.action == "add" and first.deployment.name not in self.models
        return first.deployment if first is not None and is_new else None

    def report(self, number: float) -> HostReport:
        building = (self.building.name, self.building.version) if self.building else None
        return replace(super().report(number), building=building)

    def die(self) -> list[Order]:
        lost, self.orders = [order for order, _ in self.orders], []
        self.start()
        return lost

    def take(self, order: Order) -> None:
        """Begin to carry it out, or let it wait; those of an earlier controller that wait are dropped then."""
        assert order.epoch > self.epoch or (order.epoch, order.controller) == (self.epoch, self.controller)
        if order.controller != self.controller:
            del self.orders[1:]
        self.epoch, self.controller = order.epoch, order.controller
        self.orders.append((order, self.load_periods))

    def order(self, order: Order) -> int:
        order = order._replace(epoch=self.epoch, controller=self.controller)  # it was taken
        if order.action == "add" and order.deployment.name in self.models:
            return self.changes
        if order.action == "add" and order.deployment.name not in self.refuses:
            self.built[order.deployment.name] += 1
        return super().order(order)


class Server:
    """Holds requests, joins what serves, and does what the view asks for, as real ones do."""

    def __init__(self, name: str) -> None:
        self.peer = Peer(name, 64, 1)
        self.name = name
        self.held: dict[str, list[Request]] = {}
        self.running: dict[str, list[Request]] = {}
        self.ready: set[str] = set()
        self.rested: dict[str, int] = {}
        self.used_s: dict[str, float] = {}
        self.is_there = True
        self.is_stopped = False
        """Whether its process does nothing for a while."""

    def ask(self, request: Request) -> None:
        where = self.running if request.model in self.ready else self.held
        where.setdefault(request.model, []).append(request)

    def uses(self, now_s: float) -> dict[str, Use]:
        uses = {}
        for name in self.held.keys() | self.running.keys() | self.rested.keys() | self.used_s.keys():
            held = self.held.get(name, [])
            due = {r.tenant: r.since_s + 600 - now_s for r in reversed(held)}
            since_s = min((r.since_s for r in held), default=now_s)
            idle_s = now_s - self.used_s.get(name, -math.inf)
            running = len(self.running.get(name, []))
            uses[name] = Use(len(held), due, now_s - since_s, running, idle_s, self.rested.get(name, 0))
        return uses

    def follow(self, control: Reconciler, now_s: float) -> None:
        self.ready = set()
        for name, seen in control.view().models.items():
            seats = seen.seats
            serving = [host for host, seat in seats.items() if seat.state is SeatState.SERVING]
            if seen.error is not None and not seats:
                for request in self.held.pop(name, []):
                    request.end = f"refused: {seen.error}"
            self.rested.pop(name, None)
            if seen.rest and not self.running.get(name):
                self.rested[name] = seen.rest
            for host in serving:
                control.seats.joined(self.name, name, host, seats[host].life)
            if serving and not seen.rest:
                self.ready.add(name)
                self.running.setdefault(name, []).extend(self.held.pop(name, []))
            if serving:
                self._step(name, now_s)
            for host, seat in seats.items():
                if seat.state is SeatState.LEAVING:
                    if not serving:
                        self._step(name, now_s)
                    if serving or not self.running.get(name):
                        control.seats.left(self.name, name, host, seat.life)

    def _step(self, name: str, now_s: float) -> None:
        for request in self.running.get(name, []):
            request.steps -= 1
            self.used_s[name] = now_s
            if request.steps <= 0:
                request.end = "answered"
        self.running[name] = [request for request in self.running.get(name, []) if not request.end]


class World:
    """A controller, hosts and servers."""

    server_timeout_s = 2.0

    def __init__(
        self,
        models: list[Deployment],
        num_hosts: int = 1,
        max_loaded: int | None = None,
        is_live: bool = False,
        **host: Any,
    ) -> None:
        self.now_s = 100.0
        self.models, self.max_loaded, self.is_live = models, max_loaded, is_live
        self.hosts = {f"h{i}": Host(f"h{i}", **host) for i in range(num_hosts)}
        self.servers = {name: Server(name) for name in ("one", "two")}
        self.requests: list[Request] = []
        self.have_returned = False
        """Whether a host was back with models after it had counted as lost."""
        self.control = self._controller(None, models)
        for server in self.servers.values():
            self.control.join(server.peer, self.now_s)

    def _controller(self, snapshot: dict[str, Any] | None, models: list[Deployment]) -> Reconciler:
        placement = placement_of(ClusterConfig()) if self.is_live else KeepReplicas(1)
        return Reconciler(
            placement, host_timeout_s=2.0, now_s=self.now_s, snapshot=snapshot, identity=f"c{next(_numbers)}",
            num_hosts=len(self.hosts), models=models, servers=self.control.peers.all if snapshot is not None else (),
            server_timeout_s=self.server_timeout_s, max_loaded=self.max_loaded,
        )  # fmt: skip

    def replace_controller(self, *, with_snapshot: bool = True) -> None:
        snapshot = json.loads(json.dumps(self.control.snapshot())) if with_snapshot else {}
        self.control = self._controller(snapshot, self.control.models.kept)
        for server in self.working():
            self.control.join(server.peer, self.now_s)

    def working(self) -> list[Server]:
        return [server for server in self.servers.values() if server.is_there and not server.is_stopped]

    def ask(self, server: str, name: str, steps: int = 1, tenant: str = "") -> Request:
        self.requests.append(request := Request(name, steps, self.now_s, tenant))
        self.servers[server].ask(request)
        return request

    def kill_server(self, name: str) -> None:
        server = self.servers[name]
        server.is_there = False
        for request in self.requests:
            if request in [r for rs in (*server.held.values(), *server.running.values()) for r in rs]:
                request.end = "lost with its server"

    def kill_host(self, name: str) -> None:
        self.hosts[name].die()

    def period(self) -> None:
        self.now_s += PERIOD_S
        for host in self.hosts.values():
            if host.is_there:
                self.control.host_reported(host.report(self.now_s), self.now_s)
        for server in self.working():
            if not self.control.peers.beat(server.name, self.now_s):
                self.control.join(server.peer, self.now_s)
            self.control.tell(server.name, server.uses(self.now_s), self.now_s)
        for order in self.control.tick(self.now_s):
            self._check_order(order)
            self.hosts[order.host].take(order)
        for host in self.hosts.values():
            self._work(host)
        for server in self.working():
            if self.control.is_settled:
                server.follow(self.control, self.now_s)
        self.control.check()
        self._check()

    def _work(self, host: Host) -> None:
        while host.is_there and host.orders:
            order, left = host.orders[0]
            if order.action == "add" and left > 0:
                host.orders[0] = order, left - 1
                return
            host.orders.pop(0)
            changes, error = 0, None
            try:
                if order.life != host.life:
                    raise HostError("a new process")
                changes = host.order(order)
            except Exception as raised:
                error = raised
            if order.controller == self.control.identity:
                self.control.order_done(order, error, self.now_s, changes)

    def _check_order(self, order: Order) -> None:
        name = order.deployment.name
        if order.action == "remove":
            elsewhere = any(m == name and h != order.host for m, h in self.control.seats)
            for server in self.servers.values():
                is_known = server.is_there and server.name in {peer.name for peer in self.control.peers.all}
                assert elsewhere or not is_known or not server.running.get(name), f"{name} is in use"

    def _check(self) -> None:
        if self.max_loaded is not None and not self.have_returned:
            assert len(self.loaded()) <= self.max_loaded, self.loaded()

    def loaded(self) -> set[str]:
        """Models that are in hosts of which the controller knows, or are being loaded there."""
        hosts = [self.hosts[name] for name in self.control.hosts]
        found = {name for host in hosts for name in host.models}
        return found | {host.building.name for host in hosts if host.building}

    def run(self, periods: int = 400) -> None:
        """Until all requests have ended, at most so long."""
        for _ in range(periods):
            if all(request.end for request in self.requests):
                return
            self.period()
        assert [] == [(r.model, r.number) for r in self.requests if not r.end], self.control.log.last()[-30:]

    def settle(self, periods: int = 8) -> None:
        for _ in range(periods):
            self.period()

    def ends(self) -> list[str]:
        return [request.end for request in self.requests]

    def actions(self, *names: str) -> list[tuple[str, str]]:
        return [(d["action"], d["model"]) for d in self.control.log.last() if d["action"] in names]
