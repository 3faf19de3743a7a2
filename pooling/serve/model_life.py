# SPDX-License-Identifier: Apache-2.0
"""How each model of a pool fares: one that cannot be loaded is `failed`, the others serve, and it is tried again.

    loading ──► resident ◄──► unavailable      its host died, and comes back
       │            ▲
       ▼            │ an attempt succeeds
     failed ────────┘        tried again after 0.5 s at first and up to 30 s, and never for longer than it waits

A model that is being loaded whenever its host dies may be the cause. It is loaded after the others then, and after
MAX_HOST_DEATHS such deaths in a row it is not loaded any more: it is *given up*.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tokenpool.errors import PoolError
from tokenpool.serve.keeper import Backoff
from tokenpool.serve.model_app import ModelApp

logger = logging.getLogger(__name__)

MAX_HOST_DEATHS = 3
"""So many hosts may die in a row while they load a model."""
_DEFAULT_RETRY_AFTER_S = 5.0


@dataclass(slots=True, eq=False)
class ModelLife:
    """What went wrong with one model, and what is to be done about it."""

    error: Exception | None = None
    """Why it is `failed`; None while it is not."""
    due_s: float = math.inf
    """When it is tried again, on the monotonic clock."""
    host_deaths: int = 0
    """How many hosts in a row died while they loaded it."""
    host_pid: int = 0
    """The host process that has it, or had it last; 0 without one of this machine."""
    client_fault: str = ""
    """Why its client in this process is not there; empty while it is."""
    is_leaving: bool = False
    """Whether somebody waits for its removal."""
    is_unwanted: bool = False
    """Whether it was to be removed and could not be: what is tried again is the removal."""
    backoff: Backoff = field(default_factory=lambda: Backoff(stable_after_s=math.inf))

    @property
    def is_given_up(self) -> bool:
        """Whether nobody will load it any more, so that nothing may wait for it."""
        return self.host_deaths >= MAX_HOST_DEATHS or self.is_unwanted


class ModelLives:
    """The lives of all models of a pool; sets what the router shows of them."""

    def __init__(self, models: Mapping[str, ModelApp]) -> None:
        self._models = models
        self._lives: dict[str, ModelLife] = {}

    def __getitem__(self, name: str) -> ModelLife:
        """The life of a model, which begins when it is asked for first."""
        return self._lives.setdefault(name, ModelLife())

    def forget(self, name: str) -> None:
        """The model was removed; one that comes under its name has a life of its own."""
        self._lives.pop(name, None)

    # -- what happens --------------------------------------------------------------------------------

    def served(self, name: str, host_pid: int = 0) -> None:
        """The model takes requests, at the host process with that pid."""
        life = self[name]
        life.error, life.due_s, life.host_deaths, life.host_pid = None, math.inf, 0, host_pid
        life.backoff.reset()
        self.restored(name)

    def restored(self, name: str) -> None:
        """The model's host answers: it is served, unless it leaves or its client died."""
        life, model = self[name], self._models[name]
        if not life.is_leaving:
            model.state, model.reason = ("failed", life.client_fault) if life.client_fault else ("resident", "")

    def failed(self, name: str, error: Exception, *, took_s: float = 0.0, tried_by: str = "") -> None:
        """The model could not be loaded, or removed, which took so long.

        It is tried again, by somebody else if `tried_by` names them, unless it is given up.
        """
        life, model = self[name], self._models[name]
        wait_s = max(life.backoff.next_s(), took_s)  # attempts take the others at most half of the time
        life.error, life.due_s = error, math.inf
        if tried_by:
            what_follows = f"tried again by {tried_by}"
        elif life.is_given_up and not life.is_unwanted:
            what_follows = "not tried again: remove it and add it anew"
        else:
            life.due_s, what_follows = time.monotonic() + wait_s, f"tried again in {wait_s:.3g} s"
        is_known = isinstance(error, PoolError)  # its words say it all
        logger.error("model failed model=%s, %s: %s", name, what_follows, reason_of(error),
                     exc_info=None if is_known else error)  # fmt: skip
        error.__traceback__ = error.__cause__ = error.__context__ = None  # their frames hold what was half built
        model.reason, model.retry_after_s = reason_of(error), max(1.0, wait_s)  # 503s say it
        if not life.is_leaving:
            model.state = "failed"

    def host_died_loading(self, name: str) -> None:
        """A host died while it loaded the model."""
        life = self[name]
        life.host_deaths += 1
        logger.error("engine host died while it loaded model=%s deaths=%d of=%d", name, life.host_deaths,
                     MAX_HOST_DEATHS)  # fmt: skip

    def client_fault(self, name: str, fault: str) -> None:
        """The model's client in this process died; with an empty `fault` it is there again. Its engine is well."""
        life, model = self[name], self._models.get(name)
        life.client_fault = fault
        if model is None or life.error is not None or model.state not in ("resident", "failed"):
            return
        model.state, model.reason = ("failed", fault) if fault else ("resident", "")

    def host_gone(self) -> None:
        """No model has a host; those that had one come back with the next."""
        for name, model in self._models.items():
            self[name].host_pid = 0
            if model.state != "draining" and self[name].error is None:
                model.state, model.reason, model.retry_after_s = "unavailable", "", _DEFAULT_RETRY_AFTER_S
            elif self[name].is_unwanted:
                self[name].due_s = time.monotonic()  # it was on that host: nothing is left to be removed

    # -- what is to be done --------------------------------------------------------------------------

    def to_load(self, names: Iterable[str]) -> list[str]:
        """Those that a new host is to load, in that order: what its forerunners died of comes last."""
        wanted = [name for name in names if not self[name].is_given_up]
        return sorted(wanted, key=lambda name: self[name].host_deaths)

    def due(self) -> list[str]:
        """Those that are to be tried again now."""
        now_s = time.monotonic()
        return [name for name in self._models if self[name].due_s <= now_s and not self[name].is_leaving]

    def refuse_if_all_failed(self) -> None:
        """Raise what stopped the first model, if none can be served."""
        errors = [self[name].error for name in self._models]
        if errors and all(errors):
            assert errors[0] is not None
            raise errors[0]

    @property
    def can_go_on(self) -> bool:
        """Whether there is a model that nothing is known against."""
        return any(not life.host_deaths and life.error is None for life in map(self.__getitem__, self._models))

    @property
    def ready(self) -> bool:
        """Whether a model can be served, if there is any, and no other one is on its way."""
        states = {model.state for model in self._models.values()}
        return states <= {"resident", "failed"} and (not states or "resident" in states)


def reason_of(error: BaseException) -> str:
    """What an exception says, in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, PoolError) and text else f"{type(error).__name__}: {text}".rstrip(": ")
