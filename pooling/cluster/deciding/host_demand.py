# SPDX-License-Identifier: Apache-2.0
"""How many hosts models need for their memory, and which host can be emptied. Plain Python: no Ray, no clock."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cache, partial

from tokenpool.cluster.placement import Situation, deployments_on, fits, may_be_there, room_bytes
from tokenpool.cluster.values import Deployment, HostReport
from tokenpool.group_config import Group, apart_by_model, may_be_on
from tokenpool.host_kinds import ANY, Kind, is_within, kind_of


@dataclass(frozen=True, slots=True)
class Rules:
    """What the pool file says of where models may be, labels aside."""

    replicas: int = 1
    """Of models that have no number of their own."""
    together: Sequence[Group] = ()
    apart: Sequence[Group] = ()


@dataclass(slots=True)
class _Bin:
    """One host that is filled."""

    kind: Kind = ANY
    """Of hosts that all its models may be on."""
    names: set[str] = field(default_factory=set)
    used_bytes: int = 0

    def add(self, names: Iterable[str], nbytes: int, kind: Kind) -> None:
        """Have models that want hosts of a kind."""
        self.names.update(names)
        self.used_bytes += nbytes
        if not is_within(self.kind, kind):
            self.kind = kind


def hosts_needed(
    models: Iterable[Deployment], blank: HostReport | None, rules: Rules, known: Collection[Set[str]] = ()
) -> list[Kind]:
    """Hosts on which these models fit, each on as many as it has replicas, by their kinds; empty only without models.

    `blank` is a host of the pool, whatever it has; None = none was ever seen: then one is taken to hold everything.
    `known` has the labels of each host that is there, and its name.
    The largest come first, each to the first host that can have it. What no host can hold needs none.
    """
    by_name = {model.name: model for model in models}
    if not by_name:
        return []
    least = max(copies_of(model, rules) for model in by_name.values())
    apart = apart_by_model(rules.together, rules.apart) if blank is not None else {}
    may_share = cache(partial(_may_share, known=known))
    budget = _budget(blank)
    bins: list[_Bin] = []
    groups = _groups(by_name, rules)
    for members in sorted(groups, key=lambda names: (-sum(by_name[n].weight_bytes for n in names), names)):
        needed, kind = 0, kind_of(by_name[members[0]].hosts)  # those of a group have the same
        if blank is not None:
            needed = sum(room_bytes(by_name[name], blank) for name in members)
            if needed > budget or not all(fits(by_name[name], blank, []) for name in members):
                continue
        others = frozenset().union(*(apart.get(name, frozenset()) for name in members))
        free = [b for b in bins if b.used_bytes + needed <= budget and not others & b.names and may_share(b.kind, kind)]
        copies = max(copies_of(by_name[name], rules) for name in members)
        fresh = [_Bin() for _ in range(copies - len(free))]
        bins += fresh
        for one in [*free, *fresh][:copies]:
            one.add(members, needed, kind)
    return [*(one.kind for one in bins), *[ANY] * (least - len(bins))]


def _may_share(one: Kind, other: Kind, known: Collection[Set[str]]) -> bool:
    """Whether models of two kinds may be on one host: one with `known` labels is of both, so that none waits for a host
    of the other's kind, which may never come."""
    narrow, wide = (one, other) if is_within(one, other) else (other, one)
    return narrow == wide or (is_within(narrow, wide) and any(may_be_on(narrow, frozenset(labels)) for labels in known))


def _budget(blank: HostReport | None) -> float:
    """What of a host its models share, see `room_bytes`."""
    if blank is None:
        return math.inf
    return blank.host_memory if blank.movable else blank.device_memory - blank.page_size  # the page of null blocks


def copies_of(model: Deployment, rules: Rules) -> int:
    """Hosts that are to have a model, at least."""
    return model.replicas or rules.replicas


def _groups(names: Iterable[str], rules: Rules) -> list[Group]:
    there = dict.fromkeys(names)
    groups = [tuple(name for name in group if name in there) for group in rules.together]
    grouped = {name for group in groups for name in group}
    return [*(group for group in groups if group), *((name,) for name in there if name not in grouped)]


def can_empty(host: str, needed: Set[str], situation: Situation, rules: Rules, leaving: Set[str]) -> bool:
    """Whether what is `needed` on a host has room on the others, without those that are `leaving` too."""
    apart = apart_by_model(rules.together, rules.apart)
    out = {host, *leaving}
    others = {name: report for name, report in situation.hosts.items() if name not in out}
    placed = {name: set(hosts) for name, hosts in situation.placed.items()}
    moving = [situation.models[name] for name in needed & situation.models.keys() if host in placed.get(name, ())]
    for model in sorted(moving, key=lambda model: (-model.weight_bytes, model.name)):
        if len(placed[model.name] & others.keys()) >= copies_of(model, rules):
            continue
        home = next((h for h, report in others.items() if _takes(model, report, placed, situation, apart)), None)
        if home is None:
            return False
        placed[model.name].add(home)
    return True


def _takes(
    model: Deployment,
    report: HostReport,
    placed: Mapping[str, Set[str]],
    situation: Situation,
    apart: Mapping[str, Set[str]],
) -> bool:
    host = report.host
    return (
        host not in placed[model.name]
        and may_be_there(model, report, situation)
        and not any(host in placed.get(other, ()) for other in apart.get(model.name, ()))
        and fits(model, report, deployments_on(host, placed, situation))
    )
