# SPDX-License-Identifier: Apache-2.0
"""Keeps what vLLM's Responses API stores by tenant: an id that one has made, or chosen, means nothing to another.

vLLM keeps responses, their messages, events and background tasks in mappings by an id that clients may choose. Here
these are mappings by tenant and id; the tenant is the one whose call is running. Imports no vLLM.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, MutableMapping
from typing import Any

from tokenpool.serve.access.tenant_call import CURRENT_CALL, current_tenant

_STORES = ("response_store", "msg_store", "event_store", "background_tasks")


class TenantStore(MutableMapping[str, Any]):
    """One of vLLM's mappings; a background task in it keeps its call from being over."""

    def __init__(self) -> None:
        self._items: dict[tuple[str, str], Any] = {}

    def holds(self, owner: str, key: str) -> bool:
        """Whether a tenant has that id; the pool without tenants has the owner ''."""
        return (owner, key) in self._items

    def __getitem__(self, key: str) -> Any:
        return self._items[current_tenant(), key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._items[current_tenant(), key] = value
        if isinstance(value, asyncio.Task) and (call := CURRENT_CALL.get()) is not None:
            call.keep_for(value)

    def __delitem__(self, key: str) -> None:
        del self._items[current_tenant(), key]

    def __iter__(self) -> Iterator[str]:
        owner = current_tenant()
        return (key for name, key in self._items if name == owner)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def keep_apart(serving: Any) -> None:
    """Let the Responses API of a model, if it has one, keep what it stores by tenant; before its first request."""
    for name in _STORES if serving is not None else ():
        if hasattr(serving, name):
            setattr(serving, name, TenantStore())


def has_response(serving: Any, response_id: str, owner: str) -> bool:
    """Tell whether a tenant has stored `response_id` with a model."""
    store = getattr(serving, "response_store", ())
    return store.holds(owner, response_id) if isinstance(store, TenantStore) else response_id in store
