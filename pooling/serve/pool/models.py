# SPDX-License-Identifier: Apache-2.0
"""The models of a pool in one table, and how each fares: one that cannot be loaded is `failed`, the others serve.

    loading ──► ready ◄──► unavailable      its host died, and comes back
       │            ▲
       ▼            │ an attempt succeeds
     failed ────────┘        tried again after 0.5 s at first and up to 30 s, and never for longer than it waits

A model that is being loaded whenever its host dies may be the cause. It is loaded after the others then, and after
MAX_HOST_DEATHS such deaths in a row it is not loaded any more: it is *given up*.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus

from tokenpool.config import Loading, PoolConfig
from tokenpool.errors import PoolError
from tokenpool.model_life import Life
from tokenpool.policy.admission import AdmissionLimits
from tokenpool.policy.fairness import FairTurns
from tokenpool.process.keeper import Backoff
from tokenpool.serve.access.admission import Gate
from tokenpool.serve.access.holding import Hold
from tokenpool.serve.gateway.model_app import ModelApp, no_app
from tokenpool.serve.gateway.router import ModelRouter
from tokenpool.serve.launch.model_plan import ModelPlan
from tokenpool.serve.launch.names import names_of, series_names
from tokenpool.serve.pool.model_clients import Client

logger = logging.getLogger(__name__)

MAX_HOST_DEATHS = 3
"""So many hosts may die in a row while they load a model."""
_RETRY_AFTER_S = 5.0
_NO_CLAIM = (math.inf, math.inf, "")


@dataclass(slots=True, eq=False)
class PoolModel:
    """One model: what is planned, what the router shows, what its requests go through, and what went wrong."""

    plan: ModelPlan
    app: ModelApp
    client: Client | None = None
    """None before the first host has it."""
    rule: Loading = Loading(at_start=True, unload_after_s=math.inf, keep=None, timeout_s=1800.0)
    """When it is loaded and unloaded."""
    is_on_demand: bool = False
    """Whether it is loaded when requests wait for it: it is so, or was unloaded."""
    is_settled: bool = True
    """Whether a host that comes back is to load it: not while it is being added, for who adds it hears of a failure."""
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
    is_told: bool = False
    """Whether several frontends, if there are, have its plan from the start on."""
    is_leaving: bool = False
    """Whether somebody waits for its removal."""
    is_unwanted: bool = False
    """Whether it was to be removed and could not be: what is tried again is the removal."""
    is_hostless: bool = False
    """Whether no host is there for it, and none can come."""
    backoff: Backoff = field(default_factory=lambda: Backoff(stable_after_s=math.inf))
    number: int = field(default_factory=itertools.count(1).__next__)
    """Which of all models of this process it is: a name comes again, with other settings."""
    plan_to_send: ModelPlan = field(init=False)
    """The plan as another process can be given it."""

    def __post_init__(self) -> None:
        self.plan_to_send = replace(self.plan, checked=None)

    @property
    def name(self) -> str:
        """Its name in the pool."""
        return self.plan.spec.name

    @property
    def is_given_up(self) -> bool:
        """Whether nobody will load it any more, so that nothing may wait for it."""
        return self.host_deaths >= MAX_HOST_DEATHS or self.is_unwanted or self.is_hostless

    @property
    def is_wanted(self) -> bool:
        """Whether it is to be loaded: by itself, or for those who use it or wait for it."""
        if self.client is not None or not self.is_on_demand:
            return self.app.state != Life.COLD
        return self.app.state in (Life.LOADING, Life.UNAVAILABLE) and len(self.app.hold) > 0

    @property
    def has_finished(self) -> bool:
        """Whether it is loaded and has no request."""
        return self.client is not None and not self.app.inflight and not self.client.num_unfinished

    @property
    def is_idle(self) -> bool:
        """Whether it has none, and nobody waits for it."""
        return self.has_finished and not len(self.app.hold)

    def wake(self) -> None:
        """It is cold, or being unloaded, and is to be loaded."""
        if self.app.state == Life.COLD:
            self.app.move(Life.LOADING)

    def get_cold(self) -> None:
        """Nothing of it is built any more; if somebody waits for it, it is loaded again."""
        self.client, self.host_pid, self.error, self.due_s, self.plan.checked = None, 0, None, math.inf, None
        self.is_on_demand = True
        self.app.answer_with_nothing()
        self.app.is_resting, self.app.reason = False, ""
        if not self.is_leaving:
            self.app.move(Life.COLD)
            if len(self.app.hold):
                self.wake()

    def answer_with(self, client: Client) -> None:
        """Send its requests through `client`."""
        self.client = client
        self.app.answer_with(client)

    def served(self, host_pid: int = 0) -> None:
        """Its host has it."""
        self.error, self.due_s, self.host_deaths, self.host_pid = None, math.inf, 0, host_pid
        self.backoff.reset()
        self.restore()

    def restore(self) -> None:
        """Its host answers: it is served, unless it leaves or its client died."""
        if not self.is_leaving and not self.app.is_resting:
            self._show(self.client_fault)

    def suspend(self) -> None:
        """No host takes its requests now; one will, unless it says otherwise."""
        self.app.move(Life.UNAVAILABLE)
        self.app.reason, self.app.retry_after_s = "", _RETRY_AFTER_S

    def fail(self, error: Exception, *, took_s: float = 0.0, tried_by: str = "") -> None:
        """It could not be loaded, or removed, which took so long.

        It is tried again, by somebody else if `tried_by` names them, unless it is given up.
        """
        wait_s = max(self.backoff.next_s(), took_s)  # attempts take the others at most half of the time
        self.error, self.due_s = error, math.inf
        if tried_by:
            what_follows = f"tried again by {tried_by}"
        elif self.is_given_up and not self.is_unwanted:
            what_follows = "not tried again: remove it and add it anew"
        else:
            self.due_s, what_follows = time.monotonic() + wait_s, f"tried again in {wait_s:.3g} s"
        is_known = isinstance(error, PoolError)  # its words say it all
        logger.error("model failed model=%s, %s: %s", self.name, what_follows, reason_of(error),
                     exc_info=None if is_known else error)  # fmt: skip
        error.__traceback__ = error.__cause__ = error.__context__ = None  # their frames hold what was half built
        self.app.reason, self.app.retry_after_s = reason_of(error), max(1.0, wait_s)  # 503s say it
        if not self.is_leaving:
            self.app.move(Life.FAILED)

    def give_up(self, error: PoolError) -> None:
        """No host is there for it, and none can come: whoever waits for it, or begins to, gets 503."""
        self.is_hostless = True
        self.fail(error, tried_by="the next server")
        self.fail_requests(status=HTTPStatus.SERVICE_UNAVAILABLE)

    def fail_requests(self, reason: str = "", status: HTTPStatus = HTTPStatus.BAD_GATEWAY) -> None:
        """End what was accepted for it, because it will not be loaded any more."""
        if self.client is not None:
            reason = f"The model `{self.name}` is not loaded any more: {reason or self.app.reason}"
            self.client.fail_all(reason, status)

    def note_host_death(self) -> None:
        """A host died while it loaded the model."""
        self.host_deaths += 1
        logger.error("engine host died while it loaded model=%s deaths=%d of=%d", self.name, self.host_deaths,
                     MAX_HOST_DEATHS)  # fmt: skip

    def note_client_fault(self, fault: str) -> None:
        """Its client in this process died; with an empty `fault` it is there again. Its engine is well."""
        self.client_fault = fault
        if self.error is None and self.app.state in (Life.READY, Life.FAILED):
            self._show(fault)

    def _show(self, fault: str) -> None:
        self.app.move(Life.FAILED if fault else Life.READY)
        self.app.reason = fault


class Models(Mapping[str, PoolModel]):
    """All models by name, in the order they were added; the router has those that are in here."""

    def __init__(
        self, config: PoolConfig, router: ModelRouter, num_parts: int = 1, make_hold: Callable[[], Hold] = Hold
    ) -> None:
        """`num_parts` frontends keep their part of each model's queue, this one of them."""
        self.changing = asyncio.Lock()
        """Held while a model is added or removed, or a host started: one at a time."""
        self._config = config
        self._router = router
        self._num_parts, self._num_servers = num_parts, 1
        self._make_hold = make_hold
        self._models: dict[str, PoolModel] = {}
        weights = {tenant.name: tenant.weight for tenant in config.tenants}
        self._turns = FairTurns(lambda tenant: weights.get(tenant, 1.0))
        self.wanted = asyncio.Event()
        """Set when a request begins to wait for a model, and when there is one more, or one that finishes and goes."""
        self.progress_of: Callable[[str], str] = lambda name: ""
        """How far the loading of a model has come, in a few words."""

    @property
    def come_and_go(self) -> bool:
        """Whether any is loaded when it is wanted, or unloaded."""
        rules = (model.rule for model in self._models.values())
        return self._config.max_loaded is not None or any(
            not rule.at_start or rule.unload_after_s < math.inf for rule in rules
        )

    @property
    def apps(self) -> Mapping[str, ModelApp]:
        """What the router has of them; a live, read-only view."""
        return self._router.models

    def __getitem__(self, name: str) -> PoolModel:
        return self._models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def add(self, plan: ModelPlan, *, is_settled: bool = True) -> PoolModel:
        """Take in a model, which is `loading`; raises ValueError if its name is taken."""
        gate = Gate.of(plan.spec.name, self._config.admission_of(plan.spec), plan.spec.slo)
        gate.limits = self._part_of(gate.limits)
        claimed = {name for name, _ in names_of(plan)}
        app = ModelApp(plan.spec.name, no_app, retry_after_s=_RETRY_AFTER_S, gate=gate, claimed=claimed)
        rule, app.hold = self._config.loading_of(plan.spec), self._make_hold()
        app.hold.limit_s, app.hold.ttft_s = rule.timeout_s, plan.spec.slo.ttft_s if plan.spec.slo else math.inf
        app.state = Life.LOADING if rule.at_start else Life.COLD
        app.on_wanted, app.progress = self.wanted.set, lambda: self.progress_of(plan.spec.name)
        self._router.add(app)
        model = self._models[plan.spec.name] = PoolModel(
            plan, app, rule=rule, is_on_demand=not rule.at_start, is_settled=is_settled
        )
        self.wanted.set()
        return model

    def share_queues(self, num_servers: int) -> None:
        """Keep a part of each model's queue, beside the parts of other servers of the pool."""
        if num_servers != self._num_servers:
            self._num_servers = num_servers
            for model in self.values():
                gate, whole = model.app.gate, self._config.admission_of(model.plan.spec)
                limits = replace(
                    gate.limits, max_waiting=whole.max_waiting, max_waiting_tokens=whole.max_waiting_tokens
                )
                gate.limits = self._part_of(limits)

    def _part_of(self, limits: AdmissionLimits) -> AdmissionLimits:
        """This process's part of the limits of a queue."""

        def part(bound: int | None) -> int | None:
            return None if bound is None else math.ceil(bound / (self._num_parts * self._num_servers))

        return replace(limits, max_waiting=part(limits.max_waiting), max_waiting_tokens=part(limits.max_waiting_tokens))

    def remove(self, name: str) -> set[str]:
        """Forget a model; returns the names that its series of metrics have. Raises KeyError."""
        model = self._models.pop(name)
        names = self.series_of(model)
        self._router.remove(name)
        return names

    def series_of(self, model: PoolModel) -> set[str]:
        """The names that a model's series of metrics have."""
        return series_names(model.app.aliases(), model.plan)

    # -- what happens --------------------------------------------------------------------------------

    def lose_host(self, host: str, *, blame: bool = True) -> None:
        """A host is gone, with `blame` perhaps because of its requests. Those that it had come back with the next."""
        for model in self.values():
            model.host_pid = 0
            if model.app.state not in (Life.DRAINING, Life.COLD) and model.error is None:
                model.suspend()
            elif model.is_unwanted:
                model.due_s = time.monotonic()  # it was on that host: nothing is left to be removed
            if model.client is not None:
                model.client.lost(host, blame=blame)

    # -- what is to be done --------------------------------------------------------------------------

    def to_load(self) -> list[PoolModel]:
        """Those that a new host is to load, in that order.

        What its forerunners died of comes last, and before it first what requests wait for: of the tenant that has had
        the fewest loads for its weight, the most urgent ones.
        """
        wanted = [m for m in self.values() if m.is_settled and not m.is_given_up and m.is_wanted]
        return sorted(wanted, key=lambda model: (model.host_deaths, self.claim(model)))

    def claim(self, model: PoolModel) -> tuple[float, float]:
        """The best claim to its load of those who wait for it: turns that its tenant has had, and when it is due."""
        return min(self._claims(model), default=_NO_CLAIM)[:2]

    def take_turn(self, model: PoolModel) -> None:
        """A model is loaded for those who wait: whoever had the best claim on it has had that turn."""
        if claims := self._claims(model):
            self._turns.take(min(claims)[2])

    def _claims(self, model: PoolModel) -> list[tuple[float, float, str]]:
        due_by_tenant = model.app.hold.due_by_tenant
        return [(self._turns.counter(tenant), due_s, tenant) for tenant, due_s in due_by_tenant.items()]

    def loaded(self) -> list[PoolModel]:
        """Those of which something is built, least recently used first."""
        built = [model for model in self.values() if model.client is not None]
        return sorted(built, key=lambda model: model.app.last_used_s)

    def due(self) -> list[PoolModel]:
        """Those that are to be tried again now."""
        now_s = time.monotonic()
        return [model for model in self.values() if model.due_s <= now_s and not model.is_leaving]

    def refuse_if_all_failed(self) -> None:
        """Raise what stopped the first model, if none can be served."""
        errors = [model.error for model in self.values()]
        if errors and all(errors):
            assert errors[0] is not None
            raise errors[0]

    @property
    def can_go_on(self) -> bool:
        """Whether there is a model that nothing is known against."""
        return any(not model.host_deaths and model.error is None for model in self.values())

    @property
    def have_failed(self) -> bool:
        """Whether there are models, and all of them have failed."""
        return {model.app.state for model in self.values()} == {Life.FAILED}

    @property
    def settled(self) -> bool:
        """Whether no model is on its way, and not all have failed."""
        states = {model.app.state for model in self.values()}
        return states <= {Life.READY, Life.COLD, Life.FAILED} and not self.have_failed


def reason_of(error: BaseException) -> str:
    """What an exception says, in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, PoolError) and text else f"{type(error).__name__}: {text}".rstrip(": ")
