# SPDX-License-Identifier: Apache-2.0
"""What the supervisor of several frontends tells each of them: the host that is there and the models on it."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenpool.cluster.values import ModelView
from tokenpool.policy.capacity import Role
from tokenpool.serve.launch_plan import ModelPlan


@dataclass(frozen=True, slots=True)
class HostAddress:
    """Where a host answers calls."""

    name: str
    pid: int
    control: str
    """Path of its Unix socket."""
    key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ModelStanding:
    """One model, as the supervisor sees it."""

    plan: ModelPlan
    state: str
    """A ModelState of the router."""
    drain_s: float
    """While it drains: how long its requests may take."""
    host_pid: int = 0
    """The host process whose engine the frontends are to join; 0 while there is none, or there are several hosts."""
    reason: str = ""
    """Why it is `failed`."""
    is_given_up: bool = False
    """Whether nobody will load it any more: what waits for it ends with the reason."""
    version: int = 0
    """In a cluster: the revision of the pool that set it."""


@dataclass(frozen=True, slots=True)
class ClusterSeats:
    """Which host of a cluster serves which model."""

    models: dict[str, ModelView]
    lives: dict[str, str]
    """Of each host that is there."""
    roles: dict[str, Role]
    """Of hosts that do not do everything."""
    overdue: frozenset[str] = frozenset()
    """Hosts that nobody should count on now."""


@dataclass(frozen=True, slots=True)
class SupervisorView:
    """A whole view; each replaces the one before."""

    version: int
    host: HostAddress | None
    host_restarts: int
    host_was_blamed: bool
    """Whether the requests that the last dead host had may have killed it."""
    has_started: bool
    """Whether all models were ready once: a frontend that comes now answers when it is ready, too."""
    models: dict[str, ModelStanding]
    frontend_pids: dict[int, int]
    """Frontends that are there, by index."""
    cluster: ClusterSeats | None = None
    """With hosts on a cluster; `host` is None then."""
