# SPDX-License-Identifier: Apache-2.0
"""Which host gets which model: the seam between the reconciler and a policy, and the plainest policy."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from tokenpool.cluster.values import Deployment, HostReport
from tokenpool.group_config import may_be_on
from tokenpool.memory.page_counts import model_pages, needed_pages
from tokenpool.policy.capacity import Role


class Move(NamedTuple):
    """One change of the placement."""

    action: str
    """`add`, `remove` or `role`."""
    model: str
    """Empty for `role`."""
    host: str
    reason: str
    role: Role = Role.MIXED
    """For `role`."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What a placement is decided on."""

    models: Mapping[str, Deployment]
    """What is wanted."""
    hosts: Mapping[str, HostReport]
    """What is there."""
    placed: Mapping[str, Set[str]]
    """Hosts of each wanted model, those included that still load it, those excluded that it leaves."""
    leaving: Mapping[str, Set[str]]
    """Hosts that a model leaves; its memory there is still in use."""
    barred: Set[tuple[str, str]]
    """(model, host) that failed lately."""
    now_s: float
    """Monotonic clock."""
    roles: Mapping[str, Role] = field(default_factory=dict)
    """Of hosts that were given one; all others do everything."""
    draining: Set[str] = frozenset()
    """Hosts that nothing comes to, and that models leave once they are served elsewhere."""
    going: Mapping[str, Deployment] = field(default_factory=dict)
    """Models that are not wanted now, and leave hosts."""


class Loads(NamedTuple):
    """What hosts have to do."""

    by_host: Mapping[str, float] = {}
    """Of those that are up and do not drain, where that is known; 1 = a host's whole time."""
    is_over: bool = False
    """Whether tokens of one come late, or surely will."""


class Placement(Protocol):
    """Decides what changes; called once per period on one thread."""

    def decide(self, situation: Situation) -> list[Move]:
        """The changes to make now, possibly none."""
        ...

    def has_room(self, name: str, situation: Situation) -> bool:
        """Whether any host that is there could take a model now, barred or not."""
        ...

    def loads(self, situation: Situation) -> Loads:
        """What hosts have to do, as far as it is known."""
        ...


class KeepReplicas:
    """Every model on `replicas` hosts, or its own number, on those with the fewest bytes of weights first.

    Nothing moves otherwise, but off hosts that drain and off such that a model may not be on.
    """

    def __init__(self, replicas: int, apart: Mapping[str, Set[str]] | None = None) -> None:
        """`apart` has the models that each shares no host with."""
        self.replicas = replicas
        self.apart = apart or {}

    def decide(self, situation: Situation) -> list[Move]:
        """Seats for models that have too few, the largest model first."""
        placed = {name: set(situation.placed.get(name, ())) for name in situation.models}
        moves = self._leave(placed, situation)
        order = sorted(situation.models.values(), key=lambda d: (-d.priority, len(placed[d.name]), -d.weight_bytes))
        for deployment in order:
            name, wanted = deployment.name, deployment.replicas or self.replicas
            while len(_good(deployment, placed[name], situation)) < wanted:
                free = [
                    host
                    for host, report in situation.hosts.items()
                    if host not in placed[name]
                    and (name, host) not in situation.barred
                    and may_be_there(deployment, report, situation)
                    and not self._meets(name, host, placed, situation)
                    and fits(deployment, report, deployments_on(host, placed, situation))
                ]
                if not free:
                    break
                best = min(free, key=lambda host: (_load(deployments_on(host, placed, situation)), host))
                reason = f"{len(_good(deployment, placed[name], situation))} of {wanted} replicas"
                moves.append(Move("add", name, best, reason))
                placed[name].add(best)
        return moves

    def has_room(self, name: str, situation: Situation) -> bool:
        """See Placement."""
        return has_room(name, situation, self.apart)

    def loads(self, situation: Situation) -> Loads:
        """See Placement; nothing is measured here."""
        return Loads()

    def _meets(self, name: str, host: str, placed: Mapping[str, Set[str]], situation: Situation) -> bool:
        others = self.apart.get(name, frozenset())
        return any(host in placed.get(other, ()) or host in situation.leaving.get(other, ()) for other in others)

    def _leave(self, placed: Mapping[str, Set[str]], situation: Situation) -> list[Move]:
        """Seats to give up where a model is not to be, once enough others serve it."""
        moves = []
        for name, model in situation.models.items():
            good = _good(model, placed[name], situation)
            serving = sum(name in situation.hosts[host].models for host in good)
            if serving >= (model.replicas or self.replicas):
                reason = f"{serving} others serve it, and this host drains or is not for it"
                moves += [Move("remove", name, host, reason) for host in sorted(placed[name] - good)]
        return moves


def fits(deployment: Deployment, report: HostReport, others: list[Deployment]) -> bool:
    """Whether a host's budget holds a model beside `others`, each with its KV floor, as far as sizes are known."""
    sizes = [d.weight_bytes for d in [*others, deployment]]
    if report.movable and sum(sizes) > report.host_memory:
        return False
    together = sizes[-1:] if report.movable else sizes
    return needed_pages(together, report.page_size, report.kv_floor_pages) <= report.device_memory // report.page_size


def room_bytes(deployment: Deployment, report: HostReport) -> int:
    """What a model takes of the budget that limits how many models a host can have."""
    if report.movable:
        return deployment.weight_bytes
    return model_pages(deployment.weight_bytes, report.page_size, report.kv_floor_pages) * report.page_size


def may_be_there(deployment: Deployment, report: HostReport, situation: Situation) -> bool:
    """Whether a host is one for the model, room and other models aside."""
    return report.host not in situation.draining and may_be_on(deployment.hosts, report.labels | {report.host})


def _good(deployment: Deployment, hosts: Set[str], situation: Situation) -> set[str]:
    there = situation.hosts
    return {host for host in hosts if host in there and may_be_there(deployment, there[host], situation)}


def has_room(name: str, situation: Situation, apart: Mapping[str, Set[str]]) -> bool:
    """Whether any host that is there could take a model now, barred or not."""
    model, placed = situation.models[name], situation.placed
    return any(
        may_be_there(model, report, situation)
        and not any(host in placed.get(other, ()) for other in apart.get(name, ()))
        and fits(model, report, deployments_on(host, placed, situation))
        for host, report in situation.hosts.items()
    )


def deployments_on(host: str, placed: Mapping[str, Set[str]], situation: Situation) -> list[Deployment]:
    """The models that are on a host, or leave it."""
    names = {name for where in (placed, situation.leaving) for name, hosts in where.items() if host in hosts}
    found = (situation.models.get(name) or situation.going.get(name) for name in sorted(names))
    return [deployment for deployment in found if deployment is not None]


def _load(deployments: list[Deployment]) -> tuple[int, int]:
    return sum(d.weight_bytes for d in deployments), len(deployments)
