# SPDX-License-Identifier: Apache-2.0
"""Kinds of hosts that models ask for by their `hosts` labels, and how Ray is asked for a host of a kind.

A kind is such a list of labels: a host is of it that has one of them and none of those that begin with `!`. Every host
is of the kind `ANY`. Imports neither vllm nor ray.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from tokenpool.errors import check_setting, show

Kind = tuple[str, ...]
ANY: Kind = ()

_NAME = "[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL = re.compile(rf"([A-Za-z0-9][A-Za-z0-9.-]{{0,252}}/)?{_NAME}={_NAME}")
"""Kubernetes' syntax of labels, which is Ray's."""


class _Labelled(Protocol):
    """What is asked here of a model of the pool file."""

    @property
    def name(self) -> str: ...
    @property
    def hosts(self) -> Kind: ...


def kind_of(labels: Iterable[str]) -> Kind:
    """The kind that a model's `hosts` name, in whatever order."""
    return tuple(sorted(set(labels)))


def is_within(narrow: Sequence[str], wide: Sequence[str]) -> bool:
    """Whether every host of one kind is of the other one too, as far as labels tell. A node has one value for a key."""
    having, barred = _parts(narrow)
    wide_having, wide_barred = _parts(wide)
    is_had = not wide_having or (bool(having) and all(_implies(label, wide_having) for label in having))
    return is_had and all(
        label in barred or (bool(having) and all(_is_other_value(own, label) for own in having))
        for label in wide_barred
    )


def selectors(kind: Sequence[str]) -> list[dict[str, str]]:
    """Ray's label selectors, of which a node has to meet one; empty where no node can be of the kind.

    Each maps a key to `value`, `in(value, ...)` or one of these after `!`
    (https://docs.ray.io/en/latest/ray-core/scheduling/labels.html). `kind` is one that `check_kinds` has let through.
    """
    having, barred = (_by_key(labels) for labels in _parts(kind))
    off = {key: f"!{_one_of(values)}" for key, values in barred.items()}
    if not having:
        return [off]
    found = []
    for key, values in having.items():
        left = [value for value in values if value not in barred.get(key, ())]
        if left:
            found.append({**off, key: _one_of(left)})
    return found


def check_kinds(models: Sequence[_Labelled]) -> None:
    """Raise ConfigError if a model wants hosts that Ray cannot be asked for."""
    for i, model in enumerate(models):
        where = f"models[{i}].hosts"
        for label in model.hosts:
            problem = (
                f"{show(label)} is nothing that Ray's autoscaler can be asked for: with cluster.hosts as {{min: N, "
                "max: M} write labels of nodes as key=value, such as gpu=h100, or give cluster.hosts a number"
            )
            check_setting(_LABEL.fullmatch(label.removeprefix("!")) is not None, where, problem)
        problem = f"{show(list(model.hosts))} leave no host: what is wanted is kept off too"
        check_setting(bool(selectors(model.hosts)), where, problem)


def _parts(kind: Sequence[str]) -> tuple[list[str], list[str]]:
    having = [label for label in kind if not label.startswith("!")]
    return having, [label[1:] for label in kind if label.startswith("!")]


def _implies(label: str, others: Sequence[str]) -> bool:
    return label in others or label.partition("=")[0] in others


def _is_other_value(label: str, other: str) -> bool:
    key, equals, value = label.partition("=")
    other_key, other_equals, other_value = other.partition("=")
    return bool(equals and other_equals) and key == other_key and value != other_value


def _by_key(labels: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, Any] = {}
    for key, _, value in (label.partition("=") for label in labels):
        found.setdefault(key, []).append(value)
    return found


def _one_of(values: Sequence[str]) -> str:
    return values[0] if len(values) == 1 else f"in({', '.join(values)})"
