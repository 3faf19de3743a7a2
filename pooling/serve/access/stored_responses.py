# SPDX-License-Identifier: Apache-2.0
"""Keeps what vLLM's Responses API stores by tenant: an id that one has made, or chosen, means nothing to another.

vLLM keeps responses, their messages, events and background tasks in mappings by an id that clients may choose. Here
these are mappings by tenant and id; the tenant is the one whose call is running. vLLM forgets nothing of it:
here the oldest goes when there is too much. Imports no vLLM.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from functools import partial
from http import HTTPStatus
from typing import Any

from tokenpool.serve.access.tenant_call import CURRENT_CALL, current_tenant

_STORES = ("response_store", "msg_store", "event_store", "background_tasks")
MAX_STORED_BYTES = 64 << 20
"""Of what a tenant has stored with one model, about; the oldest of it that is over goes first."""
_EVENT_BYTES = 2048
"""An event of a stream, which has a few characters of the answer, as an object."""


class TenantStore(MutableMapping[str, Any]):
    """One of vLLM's mappings; a background task in it keeps its call from being over."""

    def __init__(self, shelf: ResponseShelf | None = None) -> None:
        """`shelf` is told what is stored."""
        self._items: dict[tuple[str, str], Any] = {}
        self._shelf = shelf

    def holds(self, owner: str, key: str) -> bool:
        """Whether a tenant has that id; the pool without tenants has the owner ''."""
        return (owner, key) in self._items

    def drop(self, owner: str, key: str) -> None:
        """Forget what a tenant has by that id, if it has."""
        self._items.pop((owner, key), None)

    def __getitem__(self, key: str) -> Any:
        return self._items[current_tenant(), key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._items[current_tenant(), key] = value
        if isinstance(value, asyncio.Task) and (call := CURRENT_CALL.get()) is not None:
            call.keep_for(value)
        if self._shelf is not None:
            self._shelf.stored(current_tenant(), key, value)

    def __delitem__(self, key: str) -> None:
        del self._items[current_tenant(), key]

    def __iter__(self) -> Iterator[str]:
        owner = current_tenant()
        return (key for name, key in self._items if name == owner)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class ResponseShelf:
    """All that one model's Responses API has stored, by tenant and id, and about how much that is."""

    def __init__(self, max_bytes: int = MAX_STORED_BYTES) -> None:
        self.stores: list[TenantStore] = []
        self._max_bytes = max_bytes
        self._sizes: dict[str, dict[str, int]] = {}  # by owner and id, the oldest first
        self._running: set[tuple[str, str]] = set()

    def stored(self, owner: str, key: str, value: Any) -> None:
        """A tenant has stored something by that id; what is too much of its own goes."""
        sizes = self._sizes.setdefault(owner, {})
        sizes[key] = sizes.get(key, 0) + _size_of(value)
        if isinstance(value, asyncio.Task):
            self._running.add((owner, key))
            value.add_done_callback(lambda task: self._ended(owner, key))
        self._make_room(owner)

    def _ended(self, owner: str, key: str) -> None:
        self._running.discard((owner, key))
        if key in self._sizes.get(owner, {}):
            held: list[Any] = [store._items.get((owner, key)) for store in self.stores]
            num_events = sum([len(value[0]) for value in held if _is_stream(value)])
            self._sizes[owner][key] += _EVENT_BYTES * num_events
            self._make_room(owner)

    def _make_room(self, owner: str) -> None:
        sizes = self._sizes[owner]
        total = sum(sizes.values())
        *older, _ = sizes
        for key in older:
            if total <= self._max_bytes:
                break
            if (owner, key) not in self._running:
                total -= sizes.pop(key)
                for store in self.stores:
                    store.drop(owner, key)


def _is_stream(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) > 0 and isinstance(value[0], deque)


def _size_of(value: Any) -> int:
    """About how many bytes of text it has; O(them)."""
    if isinstance(value, asyncio.Task) or _is_stream(value):
        return 0
    if isinstance(value, list):
        return sum(_size_of(each) for each in value)
    return len(value.model_dump_json()) if hasattr(value, "model_dump_json") else len(str(value))


def keep_apart(serving: Any) -> None:
    """Let the Responses API of a model, if it has one, keep what it stores by tenant; before its first request.

    A stream of a stored response ends when nothing more can come, and is refused where there is none.
    """
    shelf = ResponseShelf()
    for name in _STORES if serving is not None else ():
        if hasattr(serving, name):
            setattr(serving, name, TenantStore(shelf))
            shelf.stores.append(getattr(serving, name))
    if hasattr(serving, "responses_background_stream_generator"):
        serving.responses_background_stream_generator = partial(_stream, serving)
        serving.retrieve_responses = partial(_retrieve, serving, serving.retrieve_responses)


async def _retrieve(
    serving: Any, retrieve: Callable[..., Any], response_id: str, starting_after: int | None, stream: bool | None
) -> Any:
    """vLLM's `retrieve`, but for streams that there cannot be."""
    if stream and response_id in serving.response_store:
        fault, param = "", "starting_after"
        if response_id not in serving.event_store:
            fault, param = "It was not made with `background` and `stream`: get it without `stream`.", "stream"
        elif starting_after is not None and starting_after < 0:
            fault = "It counts events from 0."
        if fault:
            return serving.create_error_response(
                message=fault, err_type="invalid_request_error", status_code=HTTPStatus.BAD_REQUEST, param=param
            )
    return await retrieve(response_id, starting_after, stream)


async def _stream(serving: Any, response_id: str, starting_after: int | None = None) -> AsyncIterator[Any]:
    """The events of a response from one on, until the last one, or until who makes them has ended without it."""
    events, news = serving.event_store[response_id]
    index = 0 if starting_after is None else starting_after + 1
    while True:
        news.clear()
        while index < len(events):
            event = events[index]
            yield event
            if getattr(event, "type", "") == "response.completed":
                return
            index += 1
        task = serving.background_tasks.get(response_id)
        if task is None or task.done():
            return
        await news.wait()


def has_response(serving: Any, response_id: str, owner: str) -> bool:
    """Tell whether a tenant has stored `response_id` with a model."""
    store = getattr(serving, "response_store", ())
    return store.holds(owner, response_id) if isinstance(store, TenantStore) else response_id in store
