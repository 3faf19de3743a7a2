# SPDX-License-Identifier: Apache-2.0
"""Where decode capacity goes: what a controller knows of hosts and models, and what it may decide about them.

    policy.decide(CapacityView(now_s, hosts, models))  ->  [CapacityDecision(...), ...]

Pure: values and a time in, decisions out; the cluster's controller and the simulator run the same object. A *seat* is
one model on one host. Its weights are in the memory of that host, or on the device as well.
Imports neither vllm nor ray.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

from tokenpool.cluster_config import ClusterConfig
from tokenpool.policy.turns import Residency

_INF = math.inf
LINK_BYTES_PER_S = 16e9
"""Of copies from host memory to a device, where nobody has measured them; what Aegaeon's simulator takes, and half of
what PCIe 4.0 x16 does at best."""
LOAD_BYTES_PER_S = 2e9
"""At which weights come to a host, from disk or from another machine, where nobody has measured that."""


class Role(StrEnum):
    """Which work a host takes."""

    MIXED = "mixed"
    """Requests stay from the first to the last token."""
    PREFILL = "prefill"
    """Requests leave after their first token."""
    DECODE = "decode"
    """Requests come with their first token and their KV."""


class Windows(NamedTuple):
    """Over how many seconds a controller averages."""

    long_s: float
    """What is asked of models."""
    short_s: float
    """Arrivals, to see a rise or a fall."""
    seat_s: float
    """What seats and hosts report: it must be short, because nothing is believed of a host until it is over."""


def windows(long_s: float = ClusterConfig().capacity_window_s) -> Windows:
    """The windows that go with a long one, by default that of a pool file which says nothing."""
    return Windows(long_s, long_s / 6, long_s / 3)


class HostState(StrEnum):
    """Whether a host can be counted on."""

    UP = "up"
    DRAINING = "draining"
    """It serves what it has; its models are to be moved elsewhere, and nothing new comes."""
    LOST = "lost"
    """It is gone, with all that is on it."""


class Action(StrEnum):
    """What a decision does."""

    PLACE = "place"
    """Load a model on `to_host`, because it has too few seats."""
    REPLICATE = "replicate"
    """Load a model on `to_host` too, because its hosts have too much to do."""
    MOVE = "move"
    """Load a model on `to_host`; once it serves there, drain and unload it on `from_host`."""
    DROP = "drop"
    """Drain and unload a model on `from_host`."""
    ROLE = "role"
    """Give `to_host` the role `role`; what it has already it ends."""


@dataclass(frozen=True, slots=True)
class StepCosts:
    """What steps of a model take, on a host of speed 1; the coefficients of `policy.cost_model`.

    prefill   prefill_s + prefill_per_token_s * prompt tokens
    decode    step_s + step_per_request_s * requests + step_per_token_s * context tokens
    """

    step_s: float = 0.02
    step_per_request_s: float = 1e-4
    step_per_token_s: float = 0.0
    prefill_s: float = 0.02
    prefill_per_token_s: float = 1e-4


@dataclass(frozen=True, slots=True)
class CapacityModel:
    """A model that the pool is to serve, and what is asked of it in all hosts together."""

    model: str
    weight_bytes: int
    """Of its weights, in host memory and on the device."""
    min_kv_bytes: int = 0
    """What its longest request needs beside the weights: a smaller device cannot serve it."""
    ttft_s: float = _INF
    """SLO; inf = none."""
    tpot_s: float = _INF
    """SLO; inf = none."""
    priority: int = 0
    """Larger is more important."""
    arrivals_per_s: float = 0.0
    """Requests per second over the long window (`CapacityView.windows`)."""
    recent_arrivals_per_s: float | None = None
    """Over the short window; None = as over the long one."""
    input_tokens_per_s: float = 0.0
    """Prompt tokens asked for per second, over the long window."""
    output_tokens_per_s: float = 0.0
    """Tokens wanted per second, over the long window. Lengths of answers are not known in advance: take the arrivals
    per second times the mean length of recent answers, so that a backlog does not look like little demand."""
    costs: StepCosts = StepCosts()
    min_replicas: int = 1
    """Seats that it always has, at least 1."""
    max_replicas: int | None = None
    """Seats that it may have, one more where none of them decodes, or none prefills; None = any number."""
    pinned: tuple[str, ...] = ()
    """Hosts chosen by the operator: it gets a seat on each of them and nowhere else. () = the policy chooses."""
    allowed: frozenset[str] | None = None
    """Hosts that it may be on; None = any."""
    apart: frozenset[str] = frozenset()
    """Models that it shares no host with, as they share none with it."""
    since_move_s: float = _INF
    """Seconds since its last seat came or began to leave; inf = never."""


@dataclass(frozen=True, slots=True)
class CapacitySeat:
    """One model on one host; rates and shares are over the window of seats."""

    model: str
    residency: Residency = Residency.IN_HOST
    is_coming: bool = False
    """Its weights are on the way to the host's memory; it serves nothing yet, but its room is taken."""
    is_leaving: bool = False
    """It is to go: it takes new requests only while no other seat of its model serves, and is unloaded when those that
    it has are done. Its room is still taken. The seat that a MOVE comes from is leaving from the decision on."""
    num_running: int = 0
    """Requests that have KV and decode."""
    num_waiting: int = 0
    """Requests that still need a prefill."""
    tokens_per_s: float = 0.0
    """Tokens that fell due, or came before they were due, per second."""
    on_time_frac: float = 1.0
    """Share of these that came on time; 1 where nothing was due."""


@dataclass(frozen=True, slots=True)
class CapacityHost:
    """One host: a device, or a group of them that serves as one."""

    host: str
    node: str
    """Machine that it is on; what is on one machine is lost together."""
    device_bytes: int
    """Of device memory for weights and KV."""
    free_host_bytes: int
    """Of host memory for the weights of further models, those that are coming and leaving counted as there."""
    role: Role = Role.MIXED
    state: HostState = HostState.UP
    seats: Sequence[CapacitySeat] = ()
    busy_frac: float = 0.0
    """Share of its time in steps, over the window of seats."""
    speed: float = 1.0
    """How fast its steps are beside those that `CapacityModel.costs` tell of."""
    link_bytes_per_s: float = LINK_BYTES_PER_S
    """From host memory to the device."""
    load_bytes_per_s: float = LOAD_BYTES_PER_S
    """At which weights of a new seat come, from disk or from another machine."""
    num_copies: int = 0
    """Seats that are coming now."""
    since_role_s: float = _INF
    """Seconds since its role was changed; inf = never."""
    since_move_s: float = _INF
    """Seconds since a seat came here or began to leave; what was measured before that says little; inf = never."""


@dataclass(frozen=True, slots=True)
class CapacityView:
    """All that a capacity policy knows. Hosts and models are in a lasting order, which breaks ties."""

    now_s: float
    hosts: Sequence[CapacityHost]
    models: Sequence[CapacityModel]
    windows: Windows = windows()
    """Of the rates and shares in `hosts` and `models`."""


@dataclass(frozen=True, slots=True)
class CapacityDecision:
    """One thing to do. Decisions of one list are to be carried out in order; each holds after those before it."""

    action: Action
    reason: str
    """One line for humans."""
    model: str | None = None
    """None for ROLE."""
    from_host: str | None = None
    to_host: str | None = None
    role: Role | None = None
    """For ROLE."""
    copy_bytes: int = 0
    """That must come to the memory of `to_host`."""
    gain_tokens_per_s: float = 0.0
    """Predicted: tokens on time per second that this adds. 0 where it is not done for the gain."""


class CapacityPolicy(Protocol):
    """Decides what moves. Asked once per period, 1 to 10 s; keeps nothing between calls that a restart could lose."""

    def decide(self, view: CapacityView) -> list[CapacityDecision]:
        """What to do now, possibly nothing; the same for equal views."""
        ...
