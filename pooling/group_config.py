# SPDX-License-Identifier: Apache-2.0
"""Which models belong on one host and which on different ones, and which hosts a model may be on.

    cluster:
      together: [chat, embed]            # one group, or a list of groups
      apart: [[chat, code], [chat, vision]]
    models:
      - {name: chat, model: ./chat, hosts: [fast, "!old"]}

Imports neither vllm nor ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Annotated, Any, Protocol

from tokenpool import units
from tokenpool.errors import ConfigError, check_setting, show
from tokenpool.sections import Written

Group = tuple[str, ...]

_NAMES = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 2}


def _read_groups(value: object) -> tuple[Group, ...]:
    if isinstance(value, list) and value and not any(isinstance(item, list) for item in value):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(group, list) for group in value):
        raise ConfigError(f"expected a list of models, or a list of such lists, got {show(value)}")
    groups = tuple(tuple(units.parse_text(name) for name in group) for group in value)
    for group in groups:
        check_setting(len(group) > 1, None, f"{show(list(group))} is no group: name two models or more")
        twice = next((name for name in group if group.count(name) > 1), None)
        check_setting(twice is None, None, f"{show(list(group))} has {show(twice)} twice")
    return groups


def _read_labels(value: object) -> Group:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise ConfigError(f"expected a label, or a list of labels, got {show(value)}")
    labels = tuple(units.parse_text(label) for label in value)
    bad = next((label for label in labels if not label.removeprefix("!").strip()), None)
    check_setting(bad is None, None, f"{show(bad)} is no label")
    return labels


Groups = Annotated[
    tuple[Group, ...],
    Written(_read_groups, "list of models, or of such lists", {"anyOf": [_NAMES, {"type": "array", "items": _NAMES}]}),
]
"""Groups of models; one alone may be written without the outer list."""
_LABEL_LIST = {"type": "array", "items": {"type": "string", "minLength": 1}}
Labels = Annotated[
    Group, Written(_read_labels, "label or labels", {"anyOf": [{"type": "string", "minLength": 1}, _LABEL_LIST]})
]
"""Labels of hosts; one that begins with `!` is of hosts to keep off."""


class _Grouped(Protocol):
    """What is asked here of a model of the pool file."""

    @property
    def name(self) -> str: ...
    @property
    def hosts(self) -> Group: ...
    @property
    def replicas(self) -> int | None: ...
    @property
    def max_replicas(self) -> int | None: ...


class _Cluster(Protocol):
    """What is asked here of the pool file's `cluster`."""

    @property
    def hosts(self) -> object: ...
    @property
    def most_hosts(self) -> int | None: ...
    @property
    def replicas(self) -> int: ...
    @property
    def together(self) -> tuple[Group, ...]: ...
    @property
    def apart(self) -> tuple[Group, ...]: ...


def may_be_on(wanted: Sequence[str], labels: frozenset[str]) -> bool:
    """Whether a model that wants these `hosts` may be on a host with these labels.

    With labels to have, one of them is enough; none of those to keep off may be there.
    """
    if any(label[1:] in labels for label in wanted if label.startswith("!")):
        return False
    having = [label for label in wanted if not label.startswith("!")]
    return not having or any(label in labels for label in having)


def apart_by_model(together: Sequence[Group], apart: Sequence[Group]) -> dict[str, frozenset[str]]:
    """The models that each model shares no host with; what one of a group keeps off, the whole group keeps off."""
    group_of = {name: group for group in together for name in group}
    found: dict[str, set[str]] = {}
    for a, b in (pair for group in apart for pair in combinations(group, 2)):
        for one, other in ((a, b), (b, a)):
            for name in group_of.get(one, (one,)):
                found.setdefault(name, set()).update(group_of.get(other, (other,)))
    return {name: frozenset(others) for name, others in found.items()}


def check_groups(cluster: _Cluster, models: Sequence[_Grouped]) -> None:
    """Raise ConfigError if the groups name no model, or cannot be kept."""
    by_name: dict[str, Any] = {model.name: model for model in models}
    for key, groups in (("together", cluster.together), ("apart", cluster.apart)):
        for name in (name for group in groups for name in group):
            problem = f"{show(name)} is no model of the pool: correct it, or remove it"
            check_setting(name in by_name, f"cluster.{key}", problem)
    leader: dict[str, Group] = {}
    for group in cluster.together:
        for name in group:
            problem = f"{show(name)} is in two groups: make one of them"
            check_setting(name not in leader, "cluster.together", problem)
            leader[name] = group
        for key in ("hosts", "replicas", "max_replicas"):
            values = {getattr(by_name[name], key) for name in group}
            problem = f"{show(list(group))} have different {key}: give all of them the same"
            check_setting(len(values) == 1, "cluster.together", problem)
    for group in cluster.apart:
        for a, b in combinations(group, 2):
            problem = f"{show(a)} and {show(b)} are together too: remove them from one of the two"
            check_setting(a not in leader or leader[a] is not leader.get(b), "cluster.apart", problem)
        needed = sum(by_name[name].replicas or cluster.replicas for name in group)
        problem = f"{show(list(group))} need {needed} hosts, one for each replica, cluster.hosts is {cluster.hosts}: "
        problem += "raise it, or lower replicas"
        check_setting(cluster.most_hosts is None or needed <= cluster.most_hosts, "cluster.apart", problem)
