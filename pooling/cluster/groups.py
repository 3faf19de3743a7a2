# SPDX-License-Identifier: Apache-2.0
"""Models that are placed and kept together: a placement that sees each group as one model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tokenpool.cluster.placement import Loads, Move, Placement, Situation, deployments_on, fits, may_be_there
from tokenpool.cluster.values import Deployment, HostedReport, HostReport
from tokenpool.group_config import Group
from tokenpool.policy.turns import Residency

_TOTALS = ("requests", "prompt_tokens", "finished", "tokens", "tokens_on_time", "step_seconds", "running", "waiting")
"""What a group has done, or has to do, is what its models have."""


class Together:
    """A `Placement` for single models that moves each group as a whole.

    A group stands where all its models are, or are to come. Where one cannot come, because it failed there or there is
    no room, the others stay until the group is served elsewhere.
    """

    def __init__(self, placement: Placement, groups: Sequence[Group]) -> None:
        """A group is known to `placement` by the name of its first model that is in the pool."""
        self._placement = placement
        self._groups = groups

    def decide(self, situation: Situation) -> list[Move]:
        """See Placement."""
        groups = self._present(situation)
        stray = {leader: self._stray(members, situation) for leader, members in groups.items()}
        folded = _fold(situation, groups, stray)
        made = [move for whole in self._placement.decide(folded) for move in _unfold(whole, groups, situation)]
        going = {(move.model, move.host) for move in made if move.action == "remove"}
        for leader, members in groups.items():
            made += self._complete(leader, members, situation, stray[leader], going)
            made += _give_up(members, situation, stray[leader])
        once: dict[tuple[str, str, str], Move] = {}
        for move in made:
            once.setdefault((move.action, move.model, move.host), move)
        return list(once.values())

    def has_room(self, name: str, situation: Situation) -> bool:
        """See Placement; for the whole group of a model."""
        groups = self._present(situation)
        leader = next((leader for leader, members in groups.items() if name in members), name)
        return self._placement.has_room(leader, _fold(situation, groups, {}))

    def loads(self, situation: Situation) -> Loads:
        """See Placement."""
        return self._placement.loads(_fold(situation, self._present(situation), {}))

    def _present(self, situation: Situation) -> dict[str, Group]:
        found = (tuple(name for name in group if name in situation.models) for group in self._groups)
        return {members[0]: members for members in found if len(members) > 1}

    def _stray(self, members: Group, situation: Situation) -> set[str]:
        """Hosts with some of the models on which the others cannot come, while another host could take all."""
        hosts = set().union(*(situation.placed.get(name, ()) for name in members))
        return {host for host in hosts if not all(_is_coming(name, host, situation) for name in members)}

    def _complete(
        self, leader: str, members: Group, situation: Situation, stray: set[str], going: set[tuple[str, str]]
    ) -> list[Move]:
        hosts = set().union(*(situation.placed.get(name, ()) for name in members)) - stray
        return [
            Move("add", name, host, f"{leader} and {name} are together")
            for host in sorted(hosts & situation.hosts.keys())
            for name in members
            if host not in situation.placed.get(name, ())
            and host not in situation.leaving.get(name, ())
            and not any((other, host) in going for other in members)
        ]


def _is_coming(name: str, host: str, situation: Situation) -> bool:
    """Whether a model is on a host, or can come there now or once it has left."""
    if host in situation.placed.get(name, ()) or host in situation.leaving.get(name, ()):
        return True
    report = situation.hosts.get(host)
    if report is None or (name, host) in situation.barred:
        return False
    model = situation.models[name]
    return may_be_there(model, report, situation) and fits(
        model, report, deployments_on(host, situation.placed, situation)
    )


def _give_up(members: Group, situation: Situation, stray: set[str]) -> list[Move]:
    """Leave hosts without the whole group, once all its models are served where it is whole."""
    whole = [
        host
        for host, report in situation.hosts.items()
        if host not in stray and all(n in report.models and host in situation.placed.get(n, ()) for n in members)
    ]
    if not whole:
        return []
    reason = f"{members[0]} and the others are together on {whole[0]}"
    return [
        Move("remove", name, host, reason)
        for host in sorted(stray)
        for name in members
        if host in situation.placed.get(name, ())
    ]


def _unfold(move: Move, groups: Mapping[str, Group], situation: Situation) -> list[Move]:
    members = groups.get(move.model)
    if members is None:
        return [move]
    is_add = move.action == "add"
    return [
        move._replace(model=name)
        for name in members
        if (move.host in situation.placed.get(name, ())) is not is_add
        and not (is_add and move.host in situation.leaving.get(name, ()))
    ]


def _fold(situation: Situation, groups: Mapping[str, Group], stray: Mapping[str, set[str]]) -> Situation:
    """The situation with one model for each group, under the name of its leader."""
    leader_of = {name: leader for leader, members in groups.items() for name in members}
    models = {
        name: _as_one([situation.models[member] for member in groups[name]]) if name in groups else model
        for name, model in situation.models.items()
        if leader_of.get(name, name) == name
    }
    hosts = {host: _with_groups(report, groups, leader_of) for host, report in situation.hosts.items()}
    placed: dict[str, set[str]] = {name: set() for name in models}
    leaving: dict[str, set[str]] = {}
    for where, folded in ((situation.placed, placed), (situation.leaving, leaving)):
        for name, on in where.items():
            folded.setdefault(leader_of.get(name, name), set()).update(on)
    for leader, on in stray.items():
        placed[leader] -= on
        leaving.setdefault(leader, set()).update(on)  # its memory is in use there
    barred = {(leader_of.get(name, name), host) for name, host in situation.barred}
    return replace(situation, models=models, hosts=hosts, placed=placed, leaving=leaving, barred=barred)


def _as_one(models: Sequence[Deployment]) -> Deployment:
    details = {
        key: min([model.details.get(key, math.inf) for model in models])
        for key in ("ttft_s", "tpot_s")
        if any(key in model.details for model in models)
    }
    return replace(
        models[0],
        weight_bytes=sum([model.weight_bytes for model in models]),
        priority=max([model.priority for model in models]),
        payload=b"",
        details=details,
    )


def _with_groups(report: HostReport, groups: Mapping[str, Group], leader_of: Mapping[str, str]) -> HostReport:
    models = {name: hosted for name, hosted in report.models.items() if name not in leader_of}
    for leader, members in groups.items():
        if all(name in report.models for name in members):
            models[leader] = _one_report([report.models[name] for name in members])
    return replace(report, models=models)


def _one_report(reports: Sequence[HostedReport]) -> HostedReport:
    loads: list[dict[str, Any]] = [report.load for report in reports]
    if not all(loads):
        return replace(reports[0], load={})
    load = dict(loads[0])
    load |= {key: sum([other.get(key, 0) for other in loads]) for key in _TOTALS if key in load}
    if any(other.get("state") != Residency.ON_DEVICE for other in loads):
        load["state"] = next(other.get("state") for other in loads if other.get("state") != Residency.ON_DEVICE)
    return replace(reports[0], load=load)
