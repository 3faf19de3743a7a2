# SPDX-License-Identifier: Apache-2.0
"""Keeps what vLLM's Responses API stores by tenant: an id that one has made, or chosen, means nothing to another.

vLLM keeps responses, their messages, events and background tasks in mappings by an id that clients may choose. Here
these are mappings by tenant and id; the tenant is the one whose call is running. vLLM forgets nothing of it:
here the oldest goes when there is too much. Imports no vLLM.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from typing import Any

from tokenpool.serve.access.tenant_call import CURRENT_CALL, current_tenant

MAX_ID_CHARS = 1 << 10
"""Of an id that a client has chosen: it goes to the engine, and comes back with each token."""
_STORES = ("response_store", "msg_store", "event_store", "background_tasks")
MAX_STORED_BYTES = 64 << 20
"""Of what a tenant has stored with one model, about; the oldest of it that is over goes first."""
_EVENT_BYTES = 2048
"""An event of a stream, which has a few characters of the answer, as an object."""
_ENTRY_BYTES = 4096
"""Objects of a response beside its texts."""
_UNFINISHED = ("queued", "in_progress")
_MOST_AT_ONCE = 16
"""Events that are sent before others have a turn."""


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
        self._totals: Counter[str] = Counter()  # by owner
        self._running: set[tuple[str, str]] = set()

    def stored(self, owner: str, key: str, value: Any) -> None:
        """A tenant has stored something by that id; what is too much of its own goes."""
        self._count(owner, key, _size_of(value))
        is_response = not isinstance(value, (asyncio.Task, list)) and not _is_stream(value)
        if is_response and (owner, key) not in self._running:
            self._drop_events(owner, key)
        if isinstance(value, asyncio.Task):
            self._running.add((owner, key))
            value.add_done_callback(lambda task: self._ended(owner, key, task))
        self._make_room(owner)

    def _drop_events(self, owner: str, key: str) -> None:
        """A new response has the id: what the one before it has sent is not of this one."""
        for store in self.stores:
            if _is_stream(store._items.get((owner, key))):
                store.drop(owner, key)

    def _count(self, owner: str, key: str, size: int) -> None:
        sizes = self._sizes.setdefault(owner, {})
        size += 0 if key in sizes else _ENTRY_BYTES + len(key)
        sizes[key] = sizes.get(key, 0) + size
        self._totals[owner] += size

    def _ended(self, owner: str, key: str, task: asyncio.Task[Any]) -> None:
        self._running.discard((owner, key))
        held: list[Any] = [store._items.get((owner, key)) for store in self.stores]
        for value in held:
            if (task.cancelled() or task.exception()) and getattr(value, "status", "") in _UNFINISHED:
                value.status = "cancelled" if task.cancelled() else "failed"  # in vLLM it stays queued for ever
        if key in self._sizes.get(owner, {}):
            self._count(owner, key, sum([_EVENT_BYTES * len(value[0]) for value in held if _is_stream(value)]))
            self._make_room(owner)

    def _make_room(self, owner: str) -> None:
        sizes, newest = self._sizes[owner], next(reversed(self._sizes[owner]))
        too_old = []
        for key, size in sizes.items():
            if self._totals[owner] <= self._max_bytes or key == newest:
                break
            if (owner, key) not in self._running:
                self._totals[owner] -= size
                too_old.append(key)
        for key in too_old:
            del sizes[key]
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
    try:
        return len(value.model_dump_json()) if hasattr(value, "model_dump_json") else len(str(value))
    except ValueError:  # its texts are no UTF-8
        return len(repr(value))


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
        serving.create_responses = partial(_create, serving, serving.create_responses, set[tuple[str, str]]())


async def _create(
    serving: Any, create: Callable[..., Any], begun: set[tuple[str, str]], request: Any, *args: Any, **options: Any
) -> Any:
    """vLLM's `create`, but for ids that cannot be kept, or that a response has which is being made.

    vLLM would forget how to cancel that one, and who reads its events would wait for ever. `begun` has the tenant and
    id of those that are to run in the background, until vLLM has noted their tasks.
    """
    own = current_tenant(), request.request_id
    for param in ("request_id", "previous_response_id"):
        given, fault = getattr(request, param) or "", ""
        if len(given) > MAX_ID_CHARS:
            fault = f"It has {len(given)} characters, at most {MAX_ID_CHARS} are taken."
        elif given.encode(errors="replace") != given.encode(errors="surrogatepass"):
            fault = "It has half of a surrogate pair: it is no UTF-8."
        elif param == "request_id" and (given in serving.background_tasks or own in begun):
            fault = "A response of this id is being made: wait for its end, or give another id."
        if fault:
            return _error(serving, fault, param)
    if not getattr(request, "background", None):
        return await create(request, *args, **options)
    begun.add(own)
    try:
        return await create(request, *args, **options)
    finally:
        begun.discard(own)


def _error(serving: Any, fault: str, param: str) -> Any:
    return serving.create_error_response(
        message=fault, err_type="invalid_request_error", status_code=HTTPStatus.BAD_REQUEST, param=param
    )


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
            return _error(serving, fault, param)
    return await retrieve(response_id, starting_after, stream)


async def _stream(serving: Any, response_id: str, starting_after: int | None = None) -> AsyncIterator[Any]:
    """The events of a response from one on, until the last one, or until who makes them has ended without it."""
    events, news = serving.event_store.get(response_id) or (deque(), asyncio.Event())
    task = serving.background_tasks.get(response_id)
    index = 0 if starting_after is None else starting_after + 1
    with _told_of_end(task, news):  # it may end before it has begun, and its events may be none of these
        while True:
            news.clear()
            while index < len(events):
                event = events[index]
                yield event
                if getattr(event, "type", "") == "response.completed":
                    return
                index += 1
                if index % _MOST_AT_ONCE == 0:
                    await asyncio.sleep(0)
            if task is None or task.done():
                return
            await news.wait()


@contextmanager
def _told_of_end(task: asyncio.Task[Any] | None, news: asyncio.Event) -> Iterator[None]:
    """Set `news` when the task ends in the block."""

    def tell(_: object) -> None:
        news.set()

    if task is not None:
        task.add_done_callback(tell)
    try:
        yield
    finally:
        if task is not None:
            task.remove_done_callback(tell)


def has_response(serving: Any, response_id: str, owner: str) -> bool:
    """Tell whether a tenant has stored `response_id` with a model."""
    store = getattr(serving, "response_store", ())
    return store.holds(owner, response_id) if isinstance(store, TenantStore) else response_id in store


def made_beside(serving: Any) -> list[asyncio.Task[Any]]:
    """The tasks that make responses of all tenants of which nobody's call waits for the end."""
    store = getattr(serving, "background_tasks", None)
    tasks = store._items.values() if isinstance(store, TenantStore) else ()
    return [task for task in tasks if not task.done()]
