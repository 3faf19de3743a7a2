# SPDX-License-Identifier: Apache-2.0
"""Follows the pool file of a running pool: models that are added, changed or removed there come and go."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from tokenpool.config import ModelSpec, PoolConfig, load_pool_file
from tokenpool.errors import PoolError
from tokenpool.metric_registry import metric

logger = logging.getLogger(__name__)

_LOOK_S = 1.0
_DRAIN_S = 60.0
_RETRY_S, _LONGEST_RETRY_S = 30.0, 600.0
"""Seconds until what could not be done is tried again, at first and at most."""

Stamp = tuple[int, int, int]


class Pool(Protocol):
    """What is changed."""

    async def check_model(self, spec: ModelSpec) -> None:
        """Raise PoolError if a model could not take the place of the one of its name, as far as can be told now."""
        ...

    async def add_model(self, spec: ModelSpec) -> object:
        """Load a model; raises PoolError."""
        ...

    async def remove_model(self, name: str, drain_s: float) -> None:
        """Drain and unload a model; raises PoolError, KeyError if it is not there."""
        ...


class PoolFile:
    """Carries out what changes in a pool file, for as long as `follow` runs.

    A file that is wrong changes nothing. What one of its models asks for and cannot be done is tried again later, and
    the others are seen to; a model that shall become another one stays what it is until the new one is known to be
    good, and comes back if that cannot be loaded all the same. What was added or removed through the admin API stays so
    unless the file's entry for it changes. Settings other than the models need a restart.
    """

    def __init__(self, path: str, pool: Pool, running: Sequence[ModelSpec], retry_s: float = _RETRY_S) -> None:
        """`running` are the models that the pool was started with, by an earlier state of the file."""
        self._path = path
        self._pool = pool
        self._now = {spec.name: spec for spec in running}
        """What the pool has by the file's wish."""
        self._stamp: Stamp | None = None
        self._settings: PoolConfig | None = None
        self._failures: dict[str, str] = {}
        self._first_retry_s = self._retry_s = retry_s
        self._due_s = 0.0
        self._ok, self._refused = _metrics()
        self._ok.set(1)

    @property
    def done(self) -> tuple[ModelSpec, ...]:
        """The entries of the file that have been carried out, and not taken back since."""
        return tuple(self._now.values())

    async def follow(self) -> None:
        """Look at the file every second, until cancelled. Links on the way to it, as a ConfigMap's, are followed."""
        while True:
            await self.look()
            await asyncio.sleep(_LOOK_S)

    async def look(self) -> None:
        """Carry out what is new in the file, and what is due to be tried again."""
        stamp = _stamp(self._path)
        if stamp is not None and (stamp != self._stamp or (self._failures and time.monotonic() >= self._due_s)):
            await self._take(stamp)

    async def _take(self, stamp: Stamp) -> None:
        is_new, self._stamp = stamp != self._stamp, stamp
        try:
            wanted = await asyncio.to_thread(load_pool_file, self._path)
        except (PoolError, OSError, ValueError) as error:  # also one that cannot be read, or is no text
            if is_new:
                self._refused.inc()
                logger.error("pool file not taken, the pool stays as it is: %s", error)
            self._ok.set(0)
            return
        before, self._settings = self._settings or wanted, wanted
        if replace(before, models=wanted.models) != wanted:
            logger.warning("pool file: only changes of `models` are taken while the pool runs; restart for the others")
        failures = await self._apply(wanted.models)
        for name in (name for name, text in failures.items() if self._failures.get(name) != text or is_new):
            logger.error("pool file: %s", failures[name])
        self._failures = failures
        self._ok.set(0 if failures else 1)
        self._retry_s = self._first_retry_s if is_new else min(2 * self._retry_s, _LONGEST_RETRY_S)
        self._due_s = time.monotonic() + self._retry_s

    async def _apply(self, models: Sequence[ModelSpec]) -> dict[str, str]:
        """Remove, then change, then add, so that memory is there for what comes; returns what failed, by model."""
        wanted, failures = {spec.name: spec for spec in models}, dict[str, str]()
        changed = [name for name in self._now if name in wanted and in_order(wanted[name]) != in_order(self._now[name])]
        for name in [name for name in self._now if name not in wanted]:
            await self._remove(name, failures)
        for name in changed:
            await self._change(wanted[name], failures)
        for spec in [spec for name, spec in wanted.items() if name not in self._now and name not in failures]:
            await self._add(spec, failures)
        return failures

    async def _change(self, spec: ModelSpec, failures: dict[str, str]) -> None:
        before = self._now[spec.name]
        try:
            await self._pool.check_model(spec)
        except Exception as error:  # whatever it is, the model serves on and the rest of the file counts
            failures[spec.name] = _text("model not changed", spec.name, error)
            return
        if await self._remove(spec.name, failures) and not await self._add(spec, failures):
            await self._add(before, {})

    async def _remove(self, name: str, failures: dict[str, str]) -> bool:
        try:
            await self._pool.remove_model(name, _DRAIN_S)
            logger.info("pool file: model removed model=%s", name)
        except KeyError:
            logger.info("pool file: model is gone already model=%s", name)
        except Exception as error:  # as above
            failures[name] = _text("model not removed", name, error)
            return False
        del self._now[name]
        return True

    async def _add(self, spec: ModelSpec, failures: dict[str, str]) -> bool:
        try:
            await self._pool.add_model(spec)
        except Exception as error:  # as above
            failures[spec.name] = _text("model not added", spec.name, error)
            return False
        self._now[spec.name] = spec
        logger.info("pool file: model added model=%s", spec.name)
        return True


@functools.cache
def _metrics() -> tuple[Any, Any]:
    """Made in the process that follows a file, and in no other."""
    return metric("pool_file_ok").make(), metric("pool_file_refused").make()


def in_order(spec: ModelSpec) -> ModelSpec:
    """A model with its flags by name, because the order of the keys of `args` means nothing."""
    flags: list[list[str]] = [[]]
    for word in spec.args:
        if word.startswith("--"):
            flags.append([])
        flags[-1].append(word)
    flags.sort(key=lambda words: words[:1])
    return replace(spec, args=tuple(word for words in flags for word in words))


def _text(what: str, name: str, error: Exception) -> str:
    """What failed, in one line; an error that is not ours has its type with it."""
    said = " ".join(str(error).split())
    return f"{what} model={name}: {said if isinstance(error, PoolError) else f'{type(error).__name__}: {said}'}"


def _stamp(path: str) -> Stamp | None:
    """What changes with the file, whichever links lead to it."""
    try:
        status = os.stat(path)
    except OSError:
        return None  # such as between the two halves of a save
    return status.st_mtime_ns, status.st_ino, status.st_size
