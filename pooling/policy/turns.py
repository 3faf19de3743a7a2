# SPDX-License-Identifier: Apache-2.0
"""Turn policies: whose engine takes the next step, with which work, and whose weights are brought in meanwhile.

Pure values in, a decision out. A policy reads no clock (time is `PoolView.now_s`) and draws no random numbers, so
the host and a simulator run the same object. Imports neither vllm nor ray.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import NamedTuple, Protocol

from tokenpool.errors import ConfigError, check_setting, config_errors_under, show

ENTRY_POINT_GROUP = "tokenpool.turn_policies"

_INF = math.inf


class Residency(StrEnum):
    """Where a model's weights are."""

    ON_DISK = "on disk"
    """On disk only."""
    COPYING = "copying"
    """Being copied to the device now."""
    IN_HOST = "in host memory"
    """In host memory."""
    ON_DEVICE = "on device"
    """On the device."""


class Phase(StrEnum):
    """Which requests of the chosen model take part in its next step."""

    MIXED = "mixed"
    """vLLM's scheduler decides: running requests decode, waiting ones are admitted as they fit."""
    PREFILL = "prefill"
    """Waiting requests are prefilled; running ones may pause for this step."""
    DECODE = "decode"
    """Running requests decode; no waiting request is admitted in this step."""


class ModelView(NamedTuple):
    """One model with work, as a turn policy sees it. Times ending in `_s` that are dues are on the clock of `now_s`."""

    model: str
    """Name in the pool."""
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    """Place of the model in the order in which models were added; unique."""
    priority: int = 0
    """Larger is more important, as in the pool file."""
    num_running: int = 0
    """Requests that have KV and decode."""
    num_waiting: int = 0
    """Requests that still need a prefill, or part of one."""
    waiting_tokens: int = 0
    """Prompt tokens of the waiting requests that are still to be computed."""
    arrival_s: float = _INF
    """Arrival of the oldest waiting request; inf without one."""
    first_due_s: float = _INF
    """Earliest due time of the next token of a waiting request that is not lost (see `policy.slo.lost_s`); inf without
    such a request, or without an SLO."""
    next_due_s: float = _INF
    """Earliest due time of the next token of a running request that is not lost; inf without one, or without an SLO."""
    ttft_s: float = _INF
    """Seconds from arrival in which the first token is due; inf without an SLO."""
    tpot_s: float = _INF
    """Seconds in which each further token is due; inf without an SLO."""
    residency: Residency = Residency.ON_DEVICE
    """Where the weights are."""
    kv_out: bool = False
    """Whether KV of paused requests lies in host memory and must come back before they decode."""
    ready_in_s: float = 0.0
    """Predicted seconds until the model could step if it were brought in now; 0 if weights and KV are in."""
    step_s: float = 0.0
    """Predicted seconds of one decode step of the present batch; 0 = not known."""
    prefill_s: float = 0.0
    """Predicted seconds to prefill all that waits; 0 = not known."""
    weight_bytes: int = 0
    """Size of the weights on the device."""


class PoolView(NamedTuple):
    """All that a turn policy may know before a step."""

    now_s: float
    """The present, in seconds of a clock that never goes back."""
    current: str | None
    """Model whose turn it is, with or without work; None before the first turn."""
    models: Sequence[ModelView]
    """The models that have work and can step or be brought in, in order of index; never empty."""
    turn_started_s: float = 0.0
    """When the present turn began; the switch that brought it about lies before it."""
    can_prefetch: bool = False
    """Whether a copy of weights to the device may start now."""
    copy_drag: float = 0.0
    """Seconds of steps lost per second of copy beside them: about 0 where a copy engine does the work, as on a GPU;
    near 1 where copies and steps share cores and memory, as on a CPU."""


class Decision(NamedTuple):
    """What to do until the policy is asked again, which is after one step of `run`, or after `hold_s`."""

    run: str
    """Model that steps next. If it is not resident, the host switches to it first and waits for that."""
    phase: Phase = Phase.MIXED
    """Which of its requests take part."""
    prefetch: str | None = None
    """Model whose weights should be brought in while `run` runs; the host may refuse."""
    evict: str | None = None
    """Busy model that the policy can spare longest: its weights go first if room is needed and no idle model's
    weights give it. None = the host's choice."""
    hold_s: float = 0.0
    """How long the answer stays the same if no request comes or ends and no copy ends meanwhile: `run` may take steps
    for so long without asking again. 0 = ask after each step."""


class TurnPolicy(Protocol):
    """Decides turns; one instance per device. Constructor keywords with defaults are the policy's options.

    The policy is asked after every step, so `decide` should cost microseconds: one pass over the models.
    """

    def decide(self, pool: PoolView) -> Decision:
        """Choose what steps next; `run` is one of `pool.models`."""


@cache
def _registered() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}


def load_turn_policy(name: str, options: Mapping[str, float] | None = None) -> TurnPolicy:
    """Instantiate the policy registered as `name` with its `options`; raises ConfigError naming the known ones."""
    known = _registered()
    if name not in known:
        problem = f"no policy {name!r}; known: {', '.join(sorted(known))}"
        raise ConfigError(problem, key="scheduling.policy")
    factory = known[name].load()
    with config_errors_under("scheduling.options"):
        check_options(name, factory, options or {})
        return factory(**(options or {}))


def check_options(name: str, factory: type, options: Mapping[str, float]) -> None:
    """Raise ConfigError unless each option is a keyword of `factory` and a finite number; ranges are its own."""
    parameters = inspect.signature(factory).parameters
    for key, value in options.items():
        names = f"known: {', '.join(parameters)}" if parameters else "it has none"
        check_setting(key in parameters, str(key), f"policy {name!r} has no such option; {names}")
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        check_setting(number, key, f"expected a finite number, got {show(value)}")
