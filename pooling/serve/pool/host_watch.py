# SPDX-License-Identifier: Apache-2.0
"""What the pool tells of its host while that is busy: progress of loading and draining, and the last known state.

A host builds models on the thread that answers for its state, so a question may take as long as a build.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import cache
from typing import Any

from tokenpool.metric_registry import metric
from tokenpool.model_life import Life
from tokenpool.process.guard import HostGuard
from tokenpool.serve.access.admission import FORECAST_PERIOD_S
from tokenpool.serve.gateway.model_app import ModelApp

logger = logging.getLogger(__name__)

Call = Callable[[str], Awaitable[Any]]

_LOADING = (Life.LOADING, Life.UNAVAILABLE)
"""States of models that are being loaded, the second by a host that comes back."""
_SHARES = {
    "starting host": 5,
    "planning": 10,
    "building engine": 20,
    "loading weights": 40,
    "warming up": 75,
    "connecting": 95,
}
"""Percent of a load that is behind a model in each phase; one that waits has none."""
_PERIOD_S = 0.25
_DRAIN_LOG_PERIOD_S = 2.0
_PATIENCE_S, _PATIENCE_WHILE_BUILDING_S = 5.0, 0.2


class HostWatch:
    """Follows one host; used on the event loop.

    `host_call` gives the function that calls the present host, or None while there is none; it raises PoolError.
    `guard` gives the guard of that host, or None where somebody else has it. `restore` is called with each model that
    was taken off while the host was silent, and is in that state still when it answers again.
    """

    def __init__(
        self,
        models: Mapping[str, ModelApp],
        host_call: Callable[[], Call | None],
        guard: Callable[[], HostGuard | None] = lambda: None,
        restore: Callable[[str], None] | None = None,
    ) -> None:
        self._models = models
        self._host_call = host_call
        self._guard = guard
        self._restore = restore or self._serve_again
        self._hushed: tuple[HostGuard | None, set[str]] = (None, set())  # whose host was overdue, and its models
        self.is_overdue = False
        """Whether the host's pulse is, and models were taken off for it."""
        self.stopping = False
        """Whether all models are being drained."""
        self._build: dict[str, Any] | None = None
        self._answers = False
        self._began_s: dict[str, float] = {}
        self._logged: dict[str, object] = {}
        self._drain_logged_s = 0.0
        self._question: asyncio.Task[dict[str, Any]] | None = None
        self._last: tuple[float, dict[str, Any]] | None = None

    async def run(self) -> None:
        """Look at the host while models load or drain and log what changes, until cancelled."""
        while True:
            await self._look()
            await asyncio.sleep(_PERIOD_S)

    # -- progress ------------------------------------------------------------------------------------

    def progress(self) -> dict[str, Any] | None:
        """Loading so far: `done` of `total` models and, per model that loads, phase and seconds; None when all are."""
        loading = {name: self._loading(name) for name in self._waiting()}
        if not loading:
            return None
        total = self._num_wanted()
        return {"done": total - len(loading), "total": total, "loading": loading}

    def share(self, name: str) -> str:
        """How far the loading of a model has come, roughly, by its phase: `40 %`."""
        return f"{_SHARES.get(self._phase(name), 0)} %"

    def _loading(self, name: str) -> dict[str, Any]:
        elapsed_s = round(time.monotonic() - self._began_s[name], 3) if name in self._began_s else 0.0
        return {"phase": self._phase(name), "elapsed_s": elapsed_s}

    def _phase(self, name: str) -> str:
        """The host's word for the model that it builds; else what the frontend does before or after that."""
        if self._build is not None and self._build["model"] == name:
            return self._build["phase"]
        if name != next(iter(self._waiting()), name):
            return "waiting"
        if not self._answers:
            return "starting host"
        built = self._logged.get(name) not in (None, "planning", "starting host", "waiting")
        return "connecting" if built else "planning"

    def _num_wanted(self) -> int:
        return sum(model.state != Life.COLD for model in self._models.values())

    def _waiting(self) -> list[str]:
        hushed = self._hushed[1]
        return [name for name, model in self._models.items() if model.state in _LOADING and name not in hushed]

    async def _look(self) -> None:
        self._hush()
        waiting, call = self._waiting(), self._host_call()
        build, self._answers = None, False
        if waiting and call is not None:
            try:
                build = await call("progress")
                self._answers = True
            except Exception as error:  # a host that ends: the supervisor says so
                logger.debug("no progress: %s", error)
        self._build = build
        for name in waiting:
            self._log_phase(name)
        for name in self._began_s.keys() - set(waiting):
            del self._began_s[name]
            self._logged.pop(name, None)
        self._log_draining()

    def _log_phase(self, name: str) -> None:
        phase = self._phase(name)
        if phase == self._logged.get(name):
            return
        self._logged[name] = phase
        if phase == "waiting":
            return
        since = self._began_s.setdefault(name, time.monotonic())
        total = self._num_wanted()
        done = total - len(self._waiting())
        logger.info("loading model=%s phase=%s seconds=%.1f done=%d of=%d", name, phase.replace(" ", "_"),
                    time.monotonic() - since, done, total)  # fmt: skip

    def _log_draining(self) -> None:
        drained = [n for n, model in self._models.items() if self.stopping or model.state == Life.DRAINING]
        left = {name: count for name in drained if (count := self._models[name].inflight)}
        if not left or time.monotonic() - self._drain_logged_s < _DRAIN_LOG_PERIOD_S:
            return
        self._drain_logged_s = time.monotonic()
        for name, count in left.items():
            logger.info("draining model=%s requests_left=%d", name, count)

    # -- pulse ---------------------------------------------------------------------------------------

    def pulse(self) -> dict[str, Any] | None:
        """What the host did when it was asked last, and how long ago that was; None where somebody else asks."""
        guard = self._guard()
        return guard.snapshot() if guard is not None else None

    def _hush(self) -> None:
        """Take models off while the host's pulse is overdue; they are back with it, unless that host dies."""
        guard = self._guard()
        if guard is None:
            return
        _pulse_age().set(guard.age_s)
        before, names = self._hushed
        if guard is not before or guard.is_over:
            names = set()  # they come up with the next host
        if guard.is_over:
            pass
        elif guard.is_overdue:
            for name, model in self._models.items():
                if model.state == Life.READY:
                    model.state, model.retry_after_s = Life.UNAVAILABLE, 5.0
                    names.add(name)
        else:
            for model in (self._models[name] for name in names if name in self._models):
                if model.state == Life.UNAVAILABLE:
                    self._restore(model.name)
            names = set()
        self._hushed = guard, names
        self.is_overdue = guard.is_overdue and not guard.is_over

    def _serve_again(self, name: str) -> None:
        self._models[name].state = Life.READY

    # -- state ---------------------------------------------------------------------------------------

    async def state(self) -> dict[str, Any] | None:
        """The host's state, its age in `age_s`; an older one while the host is busy; None if it never answered.

        At most one question is under way, so that callers who give up do not use up the threads. Raises PoolError
        when the host is gone.
        """
        call = self._host_call()
        if call is None:
            return None
        if (guard := self._guard()) is not None and guard.is_overdue and self._last is not None:
            return self._last_known()
        patience_s = _PATIENCE_WHILE_BUILDING_S if self._build is not None else _PATIENCE_S
        deadline = time.monotonic() + patience_s
        while self._question is not None and not self._question.done():
            if not await _ends(self._question, deadline):
                return self._last_known()
        self._question = question = asyncio.create_task(self._ask(call))
        question.add_done_callback(lambda task: task.cancelled() or task.exception())  # its asker may have given up
        if not await _ends(question, deadline):
            return self._last_known()
        return {**question.result(), "age_s": 0.0}

    async def _ask(self, call: Call) -> dict[str, Any]:
        state = await call("state")
        self._last = time.monotonic(), state
        return state

    def _last_known(self) -> dict[str, Any] | None:
        if self._last is None:
            return None
        told_s, state = self._last
        return {**state, "age_s": round(time.monotonic() - told_s, 3)}


async def follow_forecasts(models: Mapping[str, ModelApp], host_call: Callable[[], Call | None]) -> None:
    """Ask the host when first tokens would come, while that can refuse a request, until cancelled."""
    while True:
        await asyncio.sleep(FORECAST_PERIOD_S)
        concerned, call = [m for m in models.values() if m.inflight and m.gate.wants_forecast], host_call()
        if not concerned or call is None:
            continue
        try:
            loads = await call("load")
        except Exception as error:  # such as a host that is being restarted: old forecasts lapse
            logger.debug("no forecast: %s", error)
            continue
        for model in concerned:
            if model.name in loads:
                model.gate.learn(loads[model.name])


@cache
def _pulse_age() -> Any:
    """The metric; made where a host is guarded, for elsewhere it would tell of none."""
    return metric("host_pulse_age_seconds").make()


async def _ends(task: asyncio.Task[Any], deadline_s: float) -> bool:
    done, _ = await asyncio.wait({task}, timeout=max(0.0, deadline_s - time.monotonic()))
    return bool(done)
