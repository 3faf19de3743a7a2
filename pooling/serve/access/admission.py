# SPDX-License-Identifier: Apache-2.0
"""Whether a new request reaches its model's app: a bounded queue per model, and no promise that would be broken.

The queue is counted here, in the frontend: calls of which no byte of the answer has been sent. What only the host
knows, when a first token would come, is asked for by `follow_forecasts` now and then. Imports no vLLM.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from starlette.responses import Response
from starlette.types import Message, Scope

from tokenpool.config import SLO, Admission
from tokenpool.policy.admission import AdmissionLimits, AdmissionMode, Admit, Reject, judge
from tokenpool.serve.access.auth import error_response
from tokenpool.serve.access.dev_routes import DEV_PATHS
from tokenpool.serve.access.tenant_line import TenantLine

FORECAST_PERIOD_S = 0.5
"""How often the host is asked while it matters."""
_FORECAST_LIFE_S = 4 * FORECAST_PERIOD_S
_UNQUEUED_PATHS = (
    "/tokenize", "/detokenize", "/count_tokens", "/render", "/derender", "/cancel",
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter", *DEV_PATHS,
)  # fmt: skip
"""POST routes that wait for no token."""
_KINDS = {429: "RateLimitError", 503: "ServiceUnavailableError"}


class HeldQueue(Protocol):
    """Requests that wait for a model that is not loaded."""

    def __len__(self) -> int: ...

    @property
    def counts(self) -> Mapping[str, int]:
        """How many each tenant has."""


class EngineQueue(NamedTuple):
    """What a model's engine client knows of its requests."""

    begun: int = 0
    """Requests that have tokens but are answered in one piece, at their end."""
    waiting_tokens: int = 0
    """Prompt tokens of the requests that have no token yet."""


class Forecast(NamedTuple):
    """What the host predicts for a new request of one model, of the usual length."""

    first_token_in_s: float
    """Seconds to its first token; inf if no end is in sight."""
    prefill_s: float
    """Seconds that each further request adds."""
    as_of_s: float
    """When it was true, on the monotonic clock."""


class Ticket:
    """One call into a model's app; it counts as waiting until the first byte of its answer."""

    __slots__ = ("_gate", "_since_s")

    def __init__(self, gate: Gate | None) -> None:
        self._gate = gate
        self._since_s = time.monotonic()
        if gate is not None:
            gate.unanswered += 1

    def note(self, message: Message) -> None:
        """A message of the answer goes out. vLLM sends the start of a stream before its first token is there."""
        if self._gate is not None and message["type"] == "http.response.body" and message.get("body"):
            self._gate.last_wait_s = time.monotonic() - self._since_s
            self.close()

    def close(self) -> None:
        """The call begins to be answered, or is over; may be called twice."""
        if self._gate is not None:
            self._gate.unanswered -= 1
            self._gate = None


@dataclass(slots=True, eq=False)
class Gate:
    """Decides on the new requests of one model; owned by the event loop's thread."""

    model: str = ""
    limits: AdmissionLimits = AdmissionLimits()
    ttft_s: float = math.inf
    """Seconds in which a first token is due; inf without an SLO."""
    engine: Callable[[], EngineQueue] = EngineQueue
    """Counts what the engine client knows; O(its requests), so it is called near a bound only."""
    unanswered: int = 0
    """Calls without the first byte of an answer: they wait, or will be answered in one piece."""
    last_wait_s: float = 1.0
    """How long the call had waited that began to be answered last."""
    line: TenantLine | None = None
    """Where requests of tenants wait; None in a pool without tenants."""
    _refused: dict[int, int] = field(default_factory=lambda: dict.fromkeys(_KINDS, 0))
    _forecast: Forecast | None = None
    _admitted_since: int = 0

    @classmethod
    def of(cls, model: str, settings: Admission, slo: SLO | None) -> Gate:
        """The gate of a model with these settings."""
        limits = AdmissionLimits(settings.max_waiting, settings.max_waiting_tokens, AdmissionMode(settings.on_miss))
        return cls(model, limits, slo.ttft_s if slo else math.inf)

    def serve_from(self, engine: Callable[[], EngineQueue], num_seats: int) -> None:
        """The model's requests go to `engine` from now on, where `num_seats` can run at a time."""
        self.engine = engine
        if self.line is not None:
            self.line.shares.seats = num_seats

    @property
    def wants_forecast(self) -> bool:
        """Whether the host's prediction can refuse a request of this model."""
        return self.limits.mode is AdmissionMode.REJECT and self.ttft_s < math.inf

    def learn(self, load: Mapping[str, Any]) -> None:
        """Take in what the host has just told about the model."""
        self._forecast = Forecast(load["first_token_in_s"], load["prefill_s"], time.monotonic())
        self._admitted_since = 0

    def admit(
        self, scope: Scope, path: str, tenant: str | None = None, held: HeldQueue | None = None
    ) -> Ticket | Response:
        """Take a request in, which counts at once, or return the answer that refuses it.

        A full queue refuses those tenants that hold their part of it; one that holds less comes in. `held` is where
        requests wait for the model while it is not loaded: there all wait, also what wants no token.
        """
        is_counted = waits_for_tokens(scope, path)
        if not is_counted and held is None:
            return Ticket(None)
        answer = self._decide(tenant, held) if is_counted else self._decide_held(tenant, held)
        if not isinstance(answer, Reject):
            self._admitted_since += is_counted
            return Ticket(self if is_counted else None)
        self._refused[answer.status] += 1
        message = f"{answer.reason[:1].upper()}{answer.reason[1:]}; retry after {answer.retry_after_s} s."
        headers = {"retry-after": str(answer.retry_after_s)}
        return error_response(answer.status, _KINDS[answer.status], message, "model", headers)

    def take_refused(self) -> dict[int, int]:
        """Refusals by status since this was called last."""
        refused, self._refused = self._refused, dict.fromkeys(_KINDS, 0)
        return refused

    def _decide(self, tenant: str | None, held: HeldQueue | None) -> Admit | Reject | None:
        bound, tokens_bound = self.limits.max_waiting, self.limits.max_waiting_tokens
        is_full = bound is not None and self.unanswered >= bound
        if is_full and self._is_within_share(tenant, held):
            return None
        if not is_full and tokens_bound is None and not self.wants_forecast:
            return None
        engine = self.engine() if is_full or tokens_bound is not None else EngineQueue()
        return judge(
            self.model,
            self.limits,
            num_waiting=max(0, self.unanswered - engine.begun),
            waiting_tokens=engine.waiting_tokens,
            prompt_tokens=0,  # the app tokenizes
            wait_s=self._wait_s(tenant),
            ttft_s=self.ttft_s,
        )

    def _decide_held(self, tenant: str | None, held: HeldQueue | None) -> Admit | Reject | None:
        """Judge a request that wants no token, but waits until the model is loaded."""
        num_held, bound = len(held) if held is not None else 0, self.limits.max_waiting
        if bound is None or num_held < bound or self._is_within_share(tenant, held):
            return None
        return judge(
            self.model,
            AdmissionLimits(bound),
            num_waiting=num_held,
            waiting_tokens=0,
            prompt_tokens=0,
            wait_s=self.last_wait_s,
            ttft_s=self.ttft_s,
        )

    def _is_within_share(self, tenant: str | None, held: HeldQueue | None) -> bool:
        bound = self.limits.max_waiting
        if bound is None or tenant is None or self.line is None:
            return False
        return self.line.is_within_share(tenant, bound, held.counts if held is not None else {})

    def _wait_s(self, tenant: str | None) -> float:
        """Seconds that a new request would wait, as far as is known."""
        forecast = self._forecast
        if not self.wants_forecast:
            return self.last_wait_s
        if forecast is None or time.monotonic() - forecast.as_of_s > _FORECAST_LIFE_S:
            return 0.0  # nothing is known against it
        before = self._admitted_since
        if tenant is not None and self.line is not None:  # the host does not know of those that are held
            before = self.line.num_before(tenant)
        return forecast.first_token_in_s + before * forecast.prefill_s


def waits_for_tokens(scope: Scope, path: str) -> bool:
    """Tell whether a request's answer comes from the engine."""
    return scope["type"] == "http" and scope["method"] == "POST" and not path.endswith(_UNQUEUED_PATHS)
