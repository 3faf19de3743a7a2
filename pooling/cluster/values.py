# SPDX-License-Identifier: Apache-2.0
"""What hosts, controller and frontends of a cluster say to each other: plain values, pickled by Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from tokenpool.config import Loading
from tokenpool.errors import PoolError
from tokenpool.policy.capacity import Role


class SeatState(StrEnum):
    """Where a model stands on one host."""

    LOADING = "loading"
    """Decided; the host is told to load it."""
    SERVING = "serving"
    """Loaded: frontends may have themselves attached, and send requests."""
    LEAVING = "leaving"
    """Frontends are asked to end what they have there."""
    REMOVING = "removing"
    """The host has been told to unload it."""


class Endpoints(NamedTuple):
    """ZMQ addresses that a frontend has bound for one engine."""

    input: str
    output: str
    server_key: bytes = b""
    """CURVE public key of the frontend, needed to connect; empty for Unix sockets."""


NOWHERE = Endpoints("", "")
"""Those of an engine that has no frontend yet."""

ALWAYS = Loading(at_start=True, unload_after_s=math.inf, keep=None, timeout_s=1800.0)
"""Loaded with the pool, and never unloaded by itself."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model that the pool is to serve."""

    name: str
    version: int
    """Revision of the pool that set it; the same name with another version is another model."""
    weight_bytes: int = 0
    """Size of its weights, 0 when not known."""
    priority: int = 0
    payload: bytes | None = field(default=b"", repr=False)
    """The pickled HostedModelSpec without addresses; only the host process opens it. None = nobody has made it yet: a
    server does, once requests wait for the model."""
    plan: bytes = field(default=b"", repr=False)
    """The pickled ModelPlan; only frontends open it."""
    details: dict[str, Any] = field(default_factory=dict)
    """What a policy may want to know: `ttft_s` and `tpot_s` of its SLO."""
    replicas: int | None = None
    """Hosts that serve it, at least; None = as for all models."""
    max_replicas: int | None = None
    """Hosts that may serve it, at most; None = as for all models."""
    hosts: tuple[str, ...] = ()
    """Labels of the hosts that it may be on; see `group_config.may_be_on`."""
    origin: str = ""
    """Drawn by who asked for it: a wish that is told once more, because no answer came, is the same one."""
    loading: Loading = ALWAYS
    """When it is loaded and unloaded."""


class Use(NamedTuple):
    """What one server has of a model; times are seconds before or after the moment at which it is told."""

    num_held: int = 0
    """Requests that wait for it to be loaded."""
    due_in_s: Mapping[str, float] = {}
    """In how many seconds the most urgent of each tenant's is due."""
    held_for_s: float = 0.0
    """For how long the first of them waits."""
    num_unfinished: int = 0
    """Requests that are being answered."""
    idle_for_s: float = math.inf
    """Since the last one began or ended."""
    rested: int = 0
    """The rest (`ModelView.rest`) in which this server has finished what it had; 0 = it has not."""


@dataclass(frozen=True, slots=True)
class HostedReport:
    """One model that is loaded on a host."""

    version: int
    load: dict[str, Any] = field(default_factory=dict)
    """What `host_load` and `host_state` said of it last; empty before they were asked."""


@dataclass(frozen=True, slots=True)
class HostReport:
    """What a host's supervisor says of its host."""

    host: str
    """Name of the supervisor's actor, which survives restarts."""
    life: str
    """Changes with every start of the host process; empty while there is none."""
    epoch: int
    """Largest epoch of a controller whose order it took; 0 = none yet."""
    controller: str = ""
    """The controller of that epoch."""
    changes: int = 0
    """Orders carried out in this life."""
    number: int = 0
    """Grows with each report; of two reports from one node the one with the larger number holds."""
    generation: int = 0
    """Larger for a later actor of that name: while a node is cut off, Ray may start another one elsewhere."""
    node: str = ""
    address: str = ""
    """IP address of its node."""
    machine: str = ""
    """Equal for processes that can reach each other by Unix sockets."""
    pid: int = 0
    actor_pid: int = 0
    device_memory: int = 0
    host_memory: int = 0
    page_size: int = 1
    kv_floor_pages: int = 1
    """Pages of KV that it promises to each model."""
    movable: bool = False
    """Whether weights may leave the device, so that more models fit than the device holds."""
    models: dict[str, HostedReport] = field(default_factory=dict)
    free_pages: int | None = None
    """Device pages nobody held when the host was asked last; None = never asked."""
    labels: frozenset[str] = frozenset()
    """By which a model may ask for it: of its Ray node, `key` and `key=value`, its name, the address of its node."""
    overdue: str = ""
    """Why nobody should count on the host now, such as a pulse that does not come; empty for one that is alive."""
    building: tuple[str, int] | None = None
    """Name and version of the model that it loads now, whoever ordered that."""


class Order(NamedTuple):
    """What the controller tells a host to do."""

    epoch: int
    controller: str
    """Tells controllers of equal epoch apart."""
    host: str
    life: str
    action: str
    """`add` or `remove`."""
    deployment: Deployment


class Peer(NamedTuple):
    """One server of the pool, with one frontend process or several."""

    name: str
    first_index: int
    """The engines know its frontends by this index and those that follow."""
    num_indexes: int
    address: str = ""
    """IP address of its node."""
    pid: int = 0
    machine: str = ""
    """See HostReport."""
    folders: tuple[str, ...] = ()
    """Its temporary folders, which are removed for it if it could not do so itself."""


class SeatView(NamedTuple):
    """One model on one host, as frontends see it."""

    life: str
    state: SeatState
    version: int
    address: str
    machine: str


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model, as frontends see it."""

    version: int
    seats: dict[str, SeatView]
    """By host."""
    error: PoolError | None = None
    """Why the last attempt to load it failed; None once it is served."""
    is_cold: bool = False
    """Whether nothing of it is built, nor is to be built before requests wait for it."""
    rest: int = 0
    """Not 0 while servers are to finish what they have of it, and to hold what comes, because it is to get cold; each
    time another number."""
    silent: frozenset[str] = frozenset()
    """Hosts that were lost because nothing was heard of them: their requests are not to blame."""


class HostCount(NamedTuple):
    """The hosts of a pool that may have more or fewer."""

    least: int
    most: int
    pending: tuple[str, ...]
    """Hosts that Ray was asked for, and that are not there."""
    leaving: tuple[str, ...]
    """Hosts that are emptied, because fewer are enough."""


@dataclass(frozen=True, slots=True)
class ClusterView:
    """All that frontends act on; `epoch` and `version` tell two views apart."""

    epoch: int
    version: int
    revision: int
    models: dict[str, ModelView]
    hosts: dict[str, str]
    """Life of each host that is there."""
    roles: dict[str, Role] = field(default_factory=dict)
    """Of hosts that do not do everything."""
    num_decisions: dict[str, int] = field(default_factory=dict)
    """Decisions of this controller so far, by action."""
    overdue: frozenset[str] = frozenset()
    """Hosts that nobody should count on now; see HostReport."""
    draining: frozenset[str] = frozenset()
    """Hosts that are to be empty: the operator wants it, or nobody needs them."""
    retiring: dict[str, float] = field(default_factory=dict)
    """Models that are removed once all frontends have drained them, with the seconds that their requests may take."""
    peers: tuple[Peer, ...] = ()
    """The servers that are there, eldest first; the eldest follows the pool file."""
    is_ending: bool = False
    """Whether the pool ends: all its servers are to finish what they have, and end."""
    host_count: HostCount | None = None
    """None = the pool always has the same number of hosts."""


class StaleEpochError(PoolError):
    """An order of a controller that has been replaced; the host did nothing."""
