# SPDX-License-Identifier: Apache-2.0
"""Every error that tokenpool raises on purpose; messages say what is wrong, with numbers, and what to change.

    PoolError
    ├── ConfigError             the pool file or an option is wrong (also a ValueError)
    ├── CapacityError           not enough device pages: how many are needed, free, and who holds the rest
    ├── PatchMismatchError      a patch does not fit the installed vLLM
    ├── ModelRefusedError       this model, or a feature it asks for, cannot be pooled
    ├── ModelUnavailableError   the model cannot serve now; it says when to come back
    ├── SwitchError             weights or KV could not be moved; it says in which phase
    └── HostError               an engine host died, hangs or answers nonsense
        └── ModelBusyError      a model that is to be unloaded still has requests

    EngineLostError             an engine cannot go on, and its host with it; outside PoolError, so that nobody who
                                handles a failure of one model takes it for one
    LateRankError           a rank of a tensor parallel group failed in an earlier step; handled where it is raised

    try:
        config = load_pool_file("pool.yaml")
    except PoolError as error:
        sys.exit(f"tokenpool: {error}")

All of them can be copied and pickled: they cross process borders. Imports nothing of ours.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


def show(value: object) -> str:
    """Return a short, one-line form of a user's value for an error message; never raises."""
    try:
        return _REPR.repr(value)
    except ValueError:  # an int of more digits than Python prints
        return f"a very long {type(value).__name__}"


class PoolError(Exception):
    """Base of all errors below; catch it to report any of them in one line."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The default calls the class with `args` alone, which lacks the keyword-only parameters.
        return _rebuild, (type(self), self.args), self.__dict__


def _rebuild(kind: type[PoolError], args: tuple[Any, ...]) -> PoolError:
    return kind.__new__(kind, *args)


class ConfigError(PoolError, ValueError):
    """A setting is wrong: one line, ``source: key: problem and fix``."""

    def __init__(self, problem: str, *, key: str | None = None, source: str | None = None) -> None:
        self.problem = problem
        """What is wrong and how to fix it, without the place."""
        self.key = key
        """Path of the setting as the user wrote it: ``models[1].slo.tpot``; None = the whole input."""
        self.source = source
        """File or option that holds the setting; None = not known."""
        message = ": ".join(part for part in (source, key, problem) if part)
        super().__init__(" ".join(message.splitlines()))

    def under(self, parent: str | None = None, *, source: str | None = None) -> ConfigError:
        """Return the same error with `parent` put before the key, and with `source` if it had none."""
        key = self.key or parent
        if self.key and parent:
            key = f"{parent}{self.key}" if self.key.startswith("[") else f"{parent}.{self.key}"
        return ConfigError(self.problem, key=key, source=self.source or source)


def check_setting(condition: bool, key: str | None, problem: str) -> None:
    """Raise ConfigError unless `condition` holds."""
    if not condition:
        raise ConfigError(problem, key=key)


@contextmanager
def config_errors_under(key: str | None = None, *, source: str | None = None) -> Iterator[None]:
    """Put `key` and `source` before the key of any ConfigError that leaves the block."""
    try:
        yield
    except ConfigError as error:
        raise error.under(key, source=source) from error.__cause__


class CapacityError(PoolError):
    """Device memory does not suffice; the message says what is needed, what is free and what to change."""

    def __init__(
        self,
        message: str,
        *,
        needed_pages: int | None = None,
        free_pages: int | None = None,
        holders: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(message)
        self.needed_pages = needed_pages
        """Pages that were asked for; None = the shortage is not one of pages."""
        self.free_pages = free_pages
        """Pages nobody held at that moment; None as above."""
        self.holders: dict[str, int] = dict(holders or {})
        """Pages by holder at that moment."""


class PatchMismatchError(PoolError):
    """The installed vLLM is not the one a patch was written for; nothing was patched."""


class ModelRefusedError(PoolError):
    """A model cannot be pooled, now or later, unless its settings change."""

    def __init__(self, model: str, feature: str, hint: str) -> None:
        super().__init__(f"model {model!r} cannot be pooled: {feature}; {hint}")
        self.model = model
        """Name of the model in the pool."""
        self.feature = feature
        """What the pool cannot do for it."""
        self.hint = hint
        """What to change."""


class ModelUnavailableError(PoolError):
    """A model cannot take requests at the moment; clients may try again."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(f"{message}; retry after {retry_after_s:g} s")
        self.retry_after_s = retry_after_s
        """When a new attempt makes sense, in seconds from now (the Retry-After header)."""


class SwitchError(PoolError):
    """Weights or KV of a model could not be moved; the model is in a legal state, mostly the one before."""

    def __init__(self, model: str, phase: str, problem: str) -> None:
        super().__init__(f"model {model!r}: {phase} failed: {problem}")
        self.model = model
        """Name of the model in the pool."""
        self.phase = phase
        """The step that failed, such as `map`, `copy`, `verify`, `drop` or `fetch`."""


class UnfitCopyError(PoolError):
    """A host copy that other hosts of the node share is not that of this model: it must read its own."""

    def __init__(self, model: str, problem: str) -> None:
        super().__init__(f"model {model!r}: the node's copy of its weights does not fit: {problem}")
        self.model = model
        self.problem = problem


class HostError(PoolError):
    """An engine host failed: it died, does not answer, or answered what it must not."""


class ModelBusyError(HostError):
    """A model cannot be unloaded while it has requests: drain or abort them, then try again."""


class EngineLostError(Exception):
    """An engine's state is not to be trusted any more: its host process ends, and is started again.

    No PoolError: whoever handles the failure of one model must let it pass.
    """


class LateRankError(Exception):
    """Another rank has failed in a step that the first one has gone on from; its cause is what was raised there."""


def text_of(error: BaseException) -> str:
    """What an error says, or its kind where it says nothing, as EOFError and TimeoutError do."""
    return str(error) or type(error).__name__
