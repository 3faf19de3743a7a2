# SPDX-License-Identifier: Apache-2.0
"""Walks everything that can be reached from an object, to compare it or to find what two objects share."""

from __future__ import annotations

import enum
import types
from collections.abc import Iterator
from typing import Any

import torch

_LEAVES = (
    *(str, bytes, int, float, complex, type(None), range, enum.Enum, torch.dtype, torch.device),
    *(type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType),
)
"""Nothing of them changes, or they are code, which all models of a process share."""


def reachable(root: Any) -> Iterator[tuple[str, Any]]:
    """Every object below `root` that could change, once, with the path to it; depth first, in a fixed order."""
    seen: dict[int, Any] = {}
    stack = [("", root)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, _LEAVES) or id(value) in seen:
            continue
        seen[id(value)] = value  # keeps it alive, so that no id is used twice
        yield path, value
        stack.extend((path + step, child) for step, child in reversed(_children(value)))


def shared_objects(first: Any, second: Any) -> list[str]:
    """Paths in `first` of the objects that `second` reaches too; tuples and other frozen containers do not count."""
    theirs = {id(value): value for _, value in reachable(second)}
    frozen = (tuple, frozenset)
    return [path for path, value in reachable(first) if id(value) in theirs and not isinstance(value, frozen)]


def snapshot(root: Any) -> dict[str, str]:
    """Path -> type and, for leaves and unordered sets, value of everything below `root`; equal if nothing changed."""
    found = {}
    for path, value in reachable(root):
        found[path] = type(value).__name__
        if isinstance(value, set | frozenset):
            found[path] += repr(sorted(map(repr, value)))
        for step, child in _children(value):
            if isinstance(child, _LEAVES):
                found[path + step] = repr(child)
    return found


def _children(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [(f"[{index}]", item) for index, item in enumerate(value)]
    if isinstance(value, set | frozenset):
        return [("{}", item) for item in value]
    if isinstance(value, types.MethodType):
        return [(".__self__", value.__self__)]
    slots = {
        name
        for kind in type(value).__mro__
        for name in (
            [kind.__dict__["__slots__"]]
            if isinstance(kind.__dict__.get("__slots__"), str)
            else kind.__dict__.get("__slots__", ())
        )
        if hasattr(value, name)
    }
    named = {**{name: getattr(value, name) for name in sorted(slots)}, **getattr(value, "__dict__", {})}
    return [(f".{name}", item) for name, item in named.items() if name not in ("__dict__", "__weakref__")]
