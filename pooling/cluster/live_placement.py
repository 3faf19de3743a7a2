# SPDX-License-Identifier: Apache-2.0
"""Lets the capacity policy place models by what the hosts report."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from tokenpool.cluster.groups import Together
from tokenpool.cluster.placement import KeepReplicas, Loads, Move, Placement, Situation, has_room, room_bytes
from tokenpool.cluster.traffic import Rates, Seat, TrafficBook
from tokenpool.cluster.values import Deployment, HostedReport, HostReport
from tokenpool.cluster_config import ClusterConfig
from tokenpool.group_config import apart_by_model, may_be_on
from tokenpool.policy.capacity import (
    Action,
    CapacityHost,
    CapacityModel,
    CapacityPolicy,
    CapacitySeat,
    CapacityView,
    HostState,
    Role,
    StepCosts,
    windows,
)
from tokenpool.policy.capacity_board import Board
from tokenpool.policy.capacity_live import LiveCapacity
from tokenpool.policy.turns import Residency

_ADDS = (Action.PLACE, Action.REPLICATE, Action.MOVE)
_NO_COSTS, _NO_RATES = StepCosts(), Rates()


class _Measured(NamedTuple):
    """What was measured of all seats."""

    rates: Mapping[Seat, Rates]
    since_s: Mapping[Seat, float]


def placement_of(config: ClusterConfig) -> Placement:
    """The placement that a pool file's cluster section asks for.

    The windows and rests of the policy grow and shrink together with `capacity_window`.
    """
    placement = _for_single_models(config)
    return Together(placement, config.together) if config.together else placement


def _for_single_models(config: ClusterConfig) -> Placement:
    apart = apart_by_model(config.together, config.apart)
    if config.capacity == "fixed":
        return KeepReplicas(config.replicas, apart)
    window_s, usual = config.capacity_window_s, LiveCapacity()
    scale = window_s / ClusterConfig().capacity_window_s
    policy = LiveCapacity(
        settle_s=usual.settle_s * scale,
        quiet_s=usual.quiet_s * scale,
        role_s=usual.role_s * scale,
        horizon_s=usual.horizon_s * scale,
    )
    return LivePlacement(
        policy,
        config.replicas,
        config.max_replicas,
        num_prefill=config.prefill_hosts,
        period_s=max(1.0, config.reconcile_period_s),
        window_s=window_s,
        apart=apart,
    )


class LivePlacement:
    """A `Placement` that asks a `CapacityPolicy`, at most once per `period_s` while nothing is missing.

    A MOVE is an add now and a remove once the model serves there. What the policy would put on a barred host,
    KeepReplicas puts elsewhere.
    """

    def __init__(
        self,
        policy: CapacityPolicy,
        replicas: int,
        max_replicas: int | None = None,
        *,
        num_prefill: int = 0,
        period_s: float = 1.0,
        window_s: float = ClusterConfig().capacity_window_s,
        apart: Mapping[str, frozenset[str]] | None = None,
    ) -> None:
        """`replicas` and `max_replicas` are for models that have none of their own; see KeepReplicas for `apart`.

        `num_prefill` hosts begin as such that only prefill, and the others only decode; with 0 all do both.
        Traffic is averaged over `window_s` and the shorter `windows` that go with it.
        """
        self.policy = policy
        self.replicas = replicas
        self.max_replicas = max_replicas
        self.num_prefill = num_prefill
        self.period_s = period_s
        self.apart = apart or {}
        self._windows = windows(window_s)
        self._traffic = TrafficBook(window_s)
        self._begun_s: float | None = None
        self._model_s: dict[str, float] = {}  # when a seat of it came or began to leave
        self._host_s: dict[str, float] = {}
        self._role_s: dict[str, float] = {}
        self._moves: dict[tuple[str, str], str] = {}  # (model, from) -> to
        self._asked_s = -math.inf

    def decide(self, situation: Situation) -> list[Move]:
        """The changes to make now."""
        with _no_collection():
            return self._decide(situation)

    def has_room(self, name: str, situation: Situation) -> bool:
        """See Placement."""
        return has_room(name, situation, self.apart)

    def loads(self, situation: Situation) -> Loads:
        """See Placement; nothing before the first `decide`."""
        if self._begun_s is None or not situation.hosts:
            return Loads()
        usual = LiveCapacity()
        with _no_collection():
            board = Board(self._view(situation), usual.full, usual.target_frac)
        there = [(host.host, float(load)) for host, load in zip(board.view.hosts, board.loads, strict=True)]
        up = {host: load for (host, load), is_up in zip(there, board.is_up, strict=True) if is_up}
        return Loads(up, bool((board.is_up & (board.loads > board.limit)).any()))

    def _decide(self, situation: Situation) -> list[Move]:
        now_s = situation.now_s
        if self._begun_s is None:
            self._begun_s = now_s
        self._traffic.take(now_s, situation.hosts.values(), situation.models)
        if moves := self._first_roles(situation):
            return self._noted(moves, now_s)
        moves = self._finish_moves(situation)
        models = situation.models
        is_whole = all(
            len(hosts) >= (models[name].replicas or self.replicas) for name, hosts in situation.placed.items()
        )
        if not is_whole or now_s - self._asked_s >= self.period_s:
            self._asked_s = now_s
            asked, refused = self._ask(situation)
            moves += asked
            if refused:
                moves += self._elsewhere(refused, asked, situation)
        return self._noted(moves, now_s)

    def _noted(self, moves: list[Move], now_s: float) -> list[Move]:
        for move in moves:
            if move.action == "role":
                self._role_s[move.host] = now_s
            else:
                self._model_s[move.model] = self._host_s[move.host] = now_s
        return moves

    def _first_roles(self, situation: Situation) -> list[Move]:
        """Roles of hosts that have none yet, in a pool whose operator has split them."""
        if not self.num_prefill:
            return []
        moves = []
        count = sum(situation.roles.get(host) is Role.PREFILL for host in situation.hosts)
        for host in sorted(situation.hosts.keys() - situation.roles.keys()):
            role = Role.PREFILL if count < self.num_prefill else Role.DECODE
            count += role is Role.PREFILL
            moves.append(Move("role", "", host, f"{role}: the pool file asks for {self.num_prefill} to prefill", role))
        return moves

    def _elsewhere(self, refused: set[str], asked: list[Move], situation: Situation) -> list[Move]:
        placed = {name: set(hosts) for name, hosts in situation.placed.items()}
        for move in asked:
            if move.action == "add":
                placed[move.model].add(move.host)
        found = KeepReplicas(self.replicas, self.apart).decide(replace(situation, placed=placed))
        return [move for move in found if move.model in refused]

    def _ask(self, situation: Situation) -> tuple[list[Move], set[str]]:
        """The policy's moves, and the models that it would put on a barred host."""
        moves, refused = [], set()
        for decision in self.policy.decide(self._view(situation)):
            name, source, target = decision.model, decision.from_host, decision.to_host
            reason = f"{decision.action}: {decision.reason}"
            if decision.action is Action.ROLE and target is not None:
                moves.append(Move("role", "", target, reason, decision.role or Role.MIXED))
            elif decision.action in _ADDS and name is not None and target is not None:
                if (name, target) in situation.barred:
                    refused.add(name)
                    continue
                moves.append(Move("add", name, target, reason))
                if decision.action is Action.MOVE and source is not None:
                    self._moves[name, source] = target
            elif decision.action is Action.DROP and name is not None and source is not None:
                moves.append(Move("remove", name, source, reason))
        return moves, refused

    def _finish_moves(self, situation: Situation) -> list[Move]:
        """Removes for which the other half of a MOVE was waiting."""
        moves = []
        for (name, source), target in list(self._moves.items()):
            placed = situation.placed.get(name, frozenset())
            if target not in placed or source not in placed:
                del self._moves[name, source]
            elif name in situation.hosts[target].models:
                del self._moves[name, source]
                moves.append(Move("remove", name, source, f"move: it serves on {target} now"))
        return moves

    # -- what the policy sees --------------------------------------------------------------------------

    def _view(self, situation: Situation) -> CapacityView:
        on_host: dict[str, list[tuple[str, bool]]] = {host: [] for host in situation.hosts}  # model, is leaving
        for where, is_leaving in ((situation.placed, False), (situation.leaving, True)):
            for name in where.keys() & situation.models.keys():
                for host in where[name] & on_host.keys():
                    on_host[host].append((name, is_leaving or (name, host) in self._moves))
        measured = _Measured(self._traffic.seats(self._windows.seat_s), self._traffic.since_s())
        hosts = [
            self._host(report, sorted(on_host[name]), measured, situation) for name, report in situation.hosts.items()
        ]
        models = self._models(situation)
        return CapacityView(situation.now_s, hosts, models, self._windows)

    def _host(
        self, report: HostReport, models: list[tuple[str, bool]], measured: _Measured, situation: Situation
    ) -> CapacityHost:
        host, life, now_s = report.host, report.life, situation.now_s
        busy_frac, came_s = 0.0, -math.inf
        for name in report.models:
            seat = name, host, life
            busy_frac += measured.rates.get(seat, _NO_RATES).busy_frac
            came_s = max(came_s, measured.since_s.get(seat, came_s))
        seats = [
            _seat(name, report.models.get(name), measured.rates.get((name, host, life), _NO_RATES), is_leaving)
            for name, is_leaving in models
        ]
        going = [model for name, model in situation.going.items() if host in situation.leaving.get(name, ())]
        there = [*going, *(situation.models[name] for name, _ in models)]
        used = sum([room_bytes(model, report) for model in there])
        budget = report.host_memory if report.movable else report.device_memory
        return CapacityHost(
            host,
            report.node,
            report.device_memory,
            max(0, budget - used),
            situation.roles.get(host, Role.MIXED),
            HostState.DRAINING if host in situation.draining else HostState.UP,
            seats=seats,
            busy_frac=min(1.0, busy_frac),
            num_copies=sum([seat.is_coming for seat in seats]),
            since_role_s=self._since(self._role_s, host, now_s),
            since_move_s=min(self._since(self._host_s, host, now_s), now_s - came_s),
        )

    def _since(self, times_s: Mapping[str, float], name: str, now_s: float) -> float:
        """Seconds since a change; a new controller does not know the last one, and waits as if it were just now."""
        assert self._begun_s is not None
        return now_s - times_s.get(name, self._begun_s)

    def _models(self, situation: Situation) -> list[CapacityModel]:
        costs: dict[str, StepCosts] = {}
        for report in situation.hosts.values():
            for name, hosted in report.models.items():
                if name not in costs and (coefficients := hosted.load.get("costs", {}).get("coefficients")):
                    costs[name] = StepCosts(**coefficients)
        longs = self._traffic.models(self._windows.long_s)
        shorts = self._traffic.models(self._windows.short_s)
        models = []
        for name, deployment in situation.models.items():
            rates, recent = longs.get(name, _NO_RATES), shorts.get(name, _NO_RATES)
            model = CapacityModel(
                name,
                deployment.weight_bytes,
                ttft_s=deployment.details.get("ttft_s", math.inf),
                tpot_s=deployment.details.get("tpot_s", math.inf),
                priority=deployment.priority,
                arrivals_per_s=rates.arrivals_per_s,
                recent_arrivals_per_s=recent.arrivals_per_s,
                input_tokens_per_s=rates.input_tokens_per_s,
                output_tokens_per_s=rates.wanted_tokens_per_s,
                costs=costs.get(name, _NO_COSTS),
                min_replicas=deployment.replicas or self.replicas,
                max_replicas=deployment.max_replicas or self.max_replicas,
                allowed=_allowed(deployment, situation),
                apart=self.apart.get(name, frozenset()),
                since_move_s=self._since(self._model_s, name, situation.now_s),
            )
            models.append(model)
        return models


@contextmanager
def _no_collection() -> Iterator[None]:
    """Put the garbage collector off: a view of thousands of models has no cycles, and looking for some costs half as
    much again as building it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _allowed(deployment: Deployment, situation: Situation) -> frozenset[str] | None:
    if not deployment.hosts:
        return None
    hosts = situation.hosts.items()
    return frozenset(host for host, report in hosts if may_be_on(deployment.hosts, report.labels | {host}))


def _seat(name: str, hosted: HostedReport | None, rates: Rates, is_leaving: bool) -> CapacitySeat:
    load = hosted.load if hosted else {}
    return CapacitySeat(
        name,
        Residency.ON_DEVICE if load.get("state") == Residency.ON_DEVICE else Residency.IN_HOST,
        is_coming=hosted is None,
        is_leaving=is_leaving,
        num_running=load.get("running", 0),
        num_waiting=load.get("waiting", 0),
        tokens_per_s=rates.tokens_per_s,
        on_time_frac=rates.on_time_frac,
    )
