# SPDX-License-Identifier: Apache-2.0
"""Lets the validation of a request's body stop at the first element of a list that is wrong.

Pydantic tells every fault of every element, once for each type that an element may have. A body of 20 KB with 5,000
items that are none of the 30 kinds of the Responses API has a million faults: their list takes gigabytes, and half a
minute on the event loop. What is valid stays so, and its value is the same; only the list of faults is shorter.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import TypeAdapter
from pydantic_core import SchemaValidator

_CONTAINERS = frozenset({"list", "tuple", "set", "frozenset", "dict"})
_NOT_SCHEMAS = frozenset({"metadata", "serialization", "default", "expected"})
_MARK = "_tokenpool_stops_early"


def stop_at_first_faults(app: FastAPI) -> None:
    """Change how all routes of a model's app validate bodies; a second call finds nothing to change."""
    for adapter in _adapters(app):
        if not getattr(adapter, _MARK, False):
            # Without those that pydantic has built for the models within, which tell all faults.
            adapter.validator = SchemaValidator(_stopping(adapter.core_schema, {}), _use_prebuilt=False)
            setattr(adapter, _MARK, True)


def _adapters(app: FastAPI) -> Iterator[TypeAdapter[Any]]:
    """What validates bodies: for FastAPI, and for the one route of vLLM's that tries a list of types itself."""
    for route in app.routes:
        if not isinstance(route, APIRoute):
            continue
        for field in route.dependant.body_params:
            yield field._type_adapter
        yield from _within(route.endpoint, set())


def _within(function: Any, seen: set[int]) -> Iterator[TypeAdapter[Any]]:
    """Adapters in lists that a function, or one that it wraps, has taken from where it was made."""
    if id(function) in seen or not inspect.isfunction(function):
        return
    seen.add(id(function))
    for value in inspect.getclosurevars(function).nonlocals.values():
        yield from _within(value, seen)
        if isinstance(value, list):
            pairs = (each for each in value if isinstance(each, tuple) and each)
            yield from (first for first, *_ in pairs if isinstance(first, TypeAdapter))


def _stopping(schema: Any, seen: dict[int, Any]) -> Any:
    """A copy of a core schema in which lists and mappings stop early; O(nodes), parts that are shared stay so."""
    if isinstance(schema, list):
        return [_stopping(each, seen) for each in schema]
    if isinstance(schema, tuple):
        return tuple(_stopping(each, seen) for each in schema)
    if not isinstance(schema, dict):
        return schema
    if id(schema) not in seen:
        made = seen[id(schema)] = {}
        kind = schema.get("type")
        is_node = isinstance(kind, str)  # else fields by name, of which one may be named so
        made.update({k: v if is_node and k in _NOT_SCHEMAS else _stopping(v, seen) for k, v in schema.items()})
        if is_node and kind in _CONTAINERS:
            made["fail_fast"] = True
    return seen[id(schema)]
