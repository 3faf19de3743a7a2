# SPDX-License-Identifier: Apache-2.0
"""Whether a new request is taken in: bounded queues per model, and no promise that the pool cannot keep.

Pure: reads no clock. Imports neither vllm nor ray.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

from tokenpool.errors import check_setting
from tokenpool.policy.turns import ModelView, PoolView

_LONGEST_RETRY_S = 60


class AdmissionMode(StrEnum):
    """What happens to a request whose first token is predicted to come late."""

    QUEUE = "queue"
    """It waits; only a full queue refuses."""
    REJECT = "reject"
    """It is refused with 503, so that a client can try elsewhere at once."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """One model's settings."""

    max_waiting: int | None = None
    """Requests that may wait for their prefill; None = no bound."""
    max_waiting_tokens: int | None = None
    """Prompt tokens that may wait; None = no bound. A request is let into an empty queue whatever its size."""
    mode: AdmissionMode = AdmissionMode.QUEUE
    """What a predicted miss does."""

    def __post_init__(self) -> None:
        for key, value in (("max_waiting", self.max_waiting), ("max_waiting_tokens", self.max_waiting_tokens)):
            check_setting(value is None or value >= 1, key, "must be 1 or more")


class Admit(NamedTuple):
    """The request is taken in."""

    first_token_in_s: float
    """Predicted wait for its first token in seconds; inf if no end is in sight."""


class Reject(NamedTuple):
    """The request is refused."""

    status: int
    """HTTP status: 429 = the model's own queue is full, 503 = the pool would be late."""
    retry_after_s: int
    """Whole seconds, 1 to 60, for the Retry-After header."""
    reason: str
    """One line for the client, with numbers."""


class PrefillPredictor(Protocol):
    """Predicts prefills of one model: `policy.cost_model.CostModel`, or a simulator's costs."""

    def predict_prefill(self, tokens: int, /) -> float:
        """Seconds of one prefill."""


def first_token_in_s(view: ModelView, prompt_tokens: int, pool: PoolView, cost: PrefillPredictor) -> float:
    """Predicted seconds to the first token of a new request of `view`; inf if the running work leaves no time for it.

    Until it comes, at time w, the device must also do what waits elsewhere, and step every other model often enough:

        w = ready_in + prefill + prefill_new + sum over the others (prefill_k + max(0, w - lead_k) * step_k / tpot_k)

    lead_k are the seconds until model k's next token is due, 0 if it is late: a late model is not owed a catch-up.
    Copies of other weights are taken to hide behind steps. Models without an SLO claim no more than half the time in
    all: the others share with them. Solved exactly, O(models log models).

    Args:
        view: the request's model as it is now, with or without work.
        prompt_tokens: tokens to prefill for the new request.
        pool: the models with work; may be empty here.
        cost: of the request's model.
    """
    base_s = view.ready_in_s + view.prefill_s + cost.predict_prefill(prompt_tokens)
    claims = []
    shares = 1.0
    for other in pool.models:
        if other.model == view.model:
            continue
        base_s += other.prefill_s
        if other.num_running and other.tpot_s < math.inf:
            claims.append((max(0.0, other.next_due_s - pool.now_s), other.step_s / other.tpot_s))
        elif other.num_running:
            shares = 0.5
    claims.sort()
    # Between two leads w grows along a straight line; the first interval that holds its own solution has it.
    fixed_s, load = base_s / shares, 0.0
    for lead_s, share in claims:
        if load < 1 and fixed_s / (1 - load) <= lead_s:
            break
        load += share / shares
        fixed_s -= lead_s * share / shares
    return max(0.0, fixed_s / (1 - load)) if load < 1 else math.inf


class AdmissionPolicy:
    """Decides on new requests; `limits` by model, `default` for models that are not in it."""

    def __init__(
        self, limits: Mapping[str, AdmissionLimits] | None = None, default: AdmissionLimits | None = None
    ) -> None:
        self._limits = dict(limits or {})
        self._default = default or AdmissionLimits()

    def decide(self, view: ModelView, prompt_tokens: int, pool: PoolView, cost: PrefillPredictor) -> Admit | Reject:
        """Admit or refuse a request of `view`'s model; arguments as for `first_token_in_s`."""
        return judge(
            view.model,
            self._limits.get(view.model, self._default),
            num_waiting=view.num_waiting,
            waiting_tokens=view.waiting_tokens,
            prompt_tokens=prompt_tokens,
            wait_s=first_token_in_s(view, prompt_tokens, pool, cost),
            ttft_s=view.ttft_s,
        )


def judge(
    model: str,
    limits: AdmissionLimits,
    *,
    num_waiting: int,
    waiting_tokens: int,
    prompt_tokens: int,
    wait_s: float,
    ttft_s: float,
) -> Admit | Reject:
    """Admit or refuse a new request of `model` by what is known about it.

    Args:
        model: its name, for the reason.
        limits: the model's settings.
        num_waiting: requests of the model that wait for their first token.
        waiting_tokens: prompt tokens of those.
        prompt_tokens: of the new request; 0 where they are not known yet.
        wait_s: predicted seconds to its first token; inf if no end is in sight.
        ttft_s: seconds in which that token is due; inf without an SLO.
    """
    if limits.max_waiting is not None and num_waiting >= limits.max_waiting:
        reason = f"{num_waiting} requests wait for model {model!r}, its bound is {limits.max_waiting}"
        return Reject(429, _retry_after_s(wait_s), reason)
    total = waiting_tokens + prompt_tokens
    if limits.max_waiting_tokens is not None and num_waiting and total > limits.max_waiting_tokens:
        reason = f"{total} prompt tokens would wait for model {model!r}, its bound is {limits.max_waiting_tokens}"
        return Reject(429, _retry_after_s(wait_s), reason)
    if limits.mode is AdmissionMode.REJECT and wait_s > ttft_s:
        when = f"in {wait_s:.1f} s" if wait_s < math.inf else "at no foreseeable time"
        reason = f"the first token would come {when}, it is due in {ttft_s:g} s"
        return Reject(503, _retry_after_s(wait_s - ttft_s), reason)
    return Admit(wait_s)


def _retry_after_s(seconds: float) -> int:
    return _LONGEST_RETRY_S if seconds >= _LONGEST_RETRY_S else max(1, math.ceil(seconds))
