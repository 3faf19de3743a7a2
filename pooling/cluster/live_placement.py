# SPDX-License-Identifier: Apache-2.0
"""Lets the capacity policy place models by what the hosts report: rates are differences of their running totals."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from tokenpool.cluster.placement import KeepReplicas, Move, Situation, room_bytes
from tokenpool.cluster.values import Deployment, HostReport
from tokenpool.policy.capacity import (
    Action,
    CapacityHost,
    CapacityModel,
    CapacityPolicy,
    CapacitySeat,
    CapacityView,
    StepCosts,
)
from tokenpool.policy.turns import Residency

_WINDOW_S = 60.0
_SAMPLE_S = 1.0
_USUAL_PROMPT_TOKENS = 256
"""Hosts do not report lengths of prompts."""
_ADDS = (Action.PLACE, Action.REPLICATE, Action.MOVE)


class _Totals(NamedTuple):
    at_s: float
    requests: int
    ended: int
    tokens: int
    on_time: int
    step_s: float


class _Rates(NamedTuple):
    arrivals_per_s: float = 0.0
    wanted_tokens_per_s: float = 0.0
    tokens_per_s: float = 0.0
    on_time_frac: float = 1.0
    busy_frac: float = 0.0


@dataclass(slots=True)
class LivePlacement:
    """A `Placement` that asks a `CapacityPolicy`, at most once per `period_s` while nothing is missing.

    A MOVE is an add now and a remove once the model serves there. ROLE and SHARE are not carried out. What the policy
    would put on a barred host, KeepReplicas puts elsewhere.
    """

    policy: CapacityPolicy
    replicas: int
    max_replicas: int | None = None
    period_s: float = 1.0
    _history: dict[tuple[str, str, str], deque[_Totals]] = field(default_factory=dict)  # by (model, host, life)
    _moved_s: dict[str, float] = field(default_factory=dict)
    _moves: dict[tuple[str, str], str] = field(default_factory=dict)  # (model, from) -> to
    _asked_s: float = -math.inf

    def decide(self, situation: Situation) -> list[Move]:
        """The changes to make now."""
        moves = self._finish_moves(situation)
        is_whole = all(len(hosts) >= self.replicas for hosts in situation.placed.values())
        if is_whole and situation.now_s - self._asked_s < self.period_s:
            return moves
        self._asked_s = situation.now_s
        self._sample(situation)
        asked, refused = self._ask(situation)
        moves += asked
        if refused:
            moves += self._elsewhere(refused, asked, situation)
        for move in moves:
            self._moved_s[move.model] = situation.now_s
        return moves

    def _elsewhere(self, refused: set[str], asked: list[Move], situation: Situation) -> list[Move]:
        placed = {name: set(hosts) for name, hosts in situation.placed.items()}
        for move in asked:
            if move.action == "add":
                placed[move.model].add(move.host)
        found = KeepReplicas(self.replicas).decide(replace(situation, placed=placed))
        return [move for move in found if move.model in refused]

    def _ask(self, situation: Situation) -> tuple[list[Move], set[str]]:
        """The policy's moves, and the models that it would put on a barred host."""
        moves, refused = [], set()
        for decision in self.policy.decide(self._view(situation)):
            name, source, target = decision.model, decision.from_host, decision.to_host
            if name is None:
                continue
            if decision.action in _ADDS and (name, target) in situation.barred:
                refused.add(name)
            elif decision.action in _ADDS and target is not None:
                moves.append(Move("add", name, target, f"{decision.action}: {decision.reason}"))
                if decision.action is Action.MOVE and source is not None:
                    self._moves[name, source] = target
            elif decision.action is Action.DROP and source is not None:
                moves.append(Move("remove", name, source, f"{decision.action}: {decision.reason}"))
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

    def _sample(self, situation: Situation) -> None:
        living = {}
        for host, report in situation.hosts.items():
            for name, hosted in report.models.items():
                key = (name, host, report.life)
                samples = living[key] = self._history.get(key) or deque()
                if hosted.load and (not samples or situation.now_s - samples[-1].at_s >= _SAMPLE_S):
                    samples.append(_totals(situation.now_s, hosted.load))
                while samples and situation.now_s - samples[0].at_s > _WINDOW_S:
                    samples.popleft()
        self._history = living

    def _rates(self, name: str, report: HostReport) -> _Rates:
        samples = self._history.get((name, report.host, report.life), ())
        if len(samples) < 2:
            return _Rates()
        first, last = samples[0], samples[-1]
        seconds, tokens, ended = last.at_s - first.at_s, last.tokens - first.tokens, last.ended - first.ended
        arrivals_per_s = max(0, last.requests - first.requests) / seconds
        answer_tokens = tokens / ended if ended > 0 else 0.0
        return _Rates(
            arrivals_per_s,
            max(tokens / seconds, arrivals_per_s * answer_tokens),
            tokens / seconds,
            min(1.0, (last.on_time - first.on_time) / tokens) if tokens else 1.0,
            min(1.0, (last.step_s - first.step_s) / seconds),
        )

    def _view(self, situation: Situation) -> CapacityView:
        hosts = [self._host(report, situation) for report in situation.hosts.values()]
        models = [self._model(deployment, situation) for deployment in situation.models.values()]
        return CapacityView(situation.now_s, hosts, models, long_window_s=_WINDOW_S)

    def _host(self, report: HostReport, situation: Situation) -> CapacityHost:
        seats, used = [], 0
        for where, is_leaving in ((situation.placed, False), (situation.leaving, True)):
            for name, names in where.items():
                if report.host in names and name in situation.models:
                    seats.append(self._seat(name, report, is_leaving))
                    used += room_bytes(situation.models[name], report)
        budget = report.host_memory if report.movable else report.device_memory
        return CapacityHost(
            report.host,
            report.node,
            report.device_memory,
            max(0, budget - used),
            seats=seats,
            busy_frac=min(1.0, sum(self._rates(name, report).busy_frac for name in report.models)),
            num_copies=sum(seat.is_coming for seat in seats),
        )

    def _seat(self, name: str, report: HostReport, is_leaving: bool) -> CapacitySeat:
        hosted, rates = report.models.get(name), self._rates(name, report)
        load = hosted.load if hosted else {}
        return CapacitySeat(
            name,
            Residency.RESIDENT if load.get("state") == "resident" else Residency.WARM,
            is_coming=hosted is None,
            is_leaving=is_leaving,
            num_running=load.get("running", 0),
            num_waiting=load.get("waiting", 0),
            tokens_per_s=rates.tokens_per_s,
            on_time_frac=rates.on_time_frac,
        )

    def _model(self, deployment: Deployment, situation: Situation) -> CapacityModel:
        name = deployment.name
        on = [report for report in situation.hosts.values() if name in report.models]
        rates = [self._rates(name, report) for report in on]
        arrivals_per_s = sum(r.arrivals_per_s for r in rates)
        return CapacityModel(
            name,
            deployment.weight_bytes,
            ttft_s=deployment.details.get("ttft_s", math.inf),
            tpot_s=deployment.details.get("tpot_s", math.inf),
            priority=deployment.priority,
            arrivals_per_s=arrivals_per_s,
            input_tokens_per_s=arrivals_per_s * _USUAL_PROMPT_TOKENS,
            output_tokens_per_s=sum(r.wanted_tokens_per_s for r in rates),
            costs=_costs([report.models[name].load for report in on]),
            min_replicas=self.replicas,
            max_replicas=self.max_replicas,
            since_move_s=situation.now_s - self._moved_s.get(name, -math.inf),
        )


def _totals(now_s: float, load: Mapping[str, Any]) -> _Totals:
    ended = load["attainment"]["num_requests"]
    requests = ended + load["running"] + load["waiting"]
    return _Totals(now_s, requests, ended, load["tokens"], load["tokens_on_time"], load["step_seconds"])


def _costs(loads: list[Mapping[str, Any]]) -> StepCosts:
    for load in loads:
        if coefficients := load.get("costs", {}).get("coefficients"):
            return StepCosts(**coefficients)
    return StepCosts()
