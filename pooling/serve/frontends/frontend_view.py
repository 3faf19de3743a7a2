# SPDX-License-Identifier: Apache-2.0
"""What each of several frontends is told: its settings, and by its supervisor the host and the models on it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from tokenpool.cluster.values import ModelView
from tokenpool.config import PoolConfig
from tokenpool.errors import PoolError
from tokenpool.model_life import Life
from tokenpool.policy.capacity import Role
from tokenpool.serve.launch.model_plan import ModelPlan


@dataclass(frozen=True, slots=True)
class FrontendSettings:
    """What a frontend is given; the same for all but for the index."""

    index: int
    config: PoolConfig
    plans: list[ModelPlan]
    """Those of the start; what is served now the supervisor tells."""
    folder: str
    """Where the supervisor's socket, the table of limits and the frontends' sockets lie."""
    key: bytes = field(repr=False)
    """Of the sockets for calls."""
    address: str = ""
    """Of this node in a cluster; empty without one."""
    first_index: int = 0
    """Of the indexes by which engines know the frontends of this server."""
    life: int = 0
    """Which of all frontends that the supervisor has started this is; an index or a pid comes again."""
    supervisor_pid: int = field(default_factory=os.getpid)
    """With it the frontend ends, however it ends."""

    @property
    def client_index(self) -> int:
        """The index by which engines know this frontend."""
        return self.first_index + self.index

    @property
    def supervisor(self) -> str:
        """The supervisor's socket."""
        return os.path.join(self.folder, "supervisor")

    def own_socket(self, life: int) -> str:
        """The socket at which the frontend of this life answers."""
        return os.path.join(self.folder, f"frontend-{life}")

    @property
    def limits(self) -> str:
        """The table of the tenants' limits."""
        return os.path.join(self.folder, "limits")


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

    plan: ModelPlan | None
    """None = the one of its name in the settings: a large catalogue is not sent with each view."""
    state: Life
    drain_s: float
    """While it drains: how long its requests may take."""
    drain: int = 0
    """With which number frontends say that they have drained it: another one for each time that they are to."""
    engine: int = 0
    """With which number frontends say that they have joined its engine on the host: another one for each load; 0 while
    there is none, or there are several hosts."""
    reason: str = ""
    """Why it is `failed`."""
    is_given_up: bool = False
    """Whether nobody will load it any more: what waits for it ends with the reason."""
    number: int = 0
    """Which model this is of all that the supervisor has known, of this name, too."""
    version: int = 0
    """In a cluster: the revision of the pool that set it."""
    is_resting: bool = False
    """While it drains: whether it gets cold then."""
    birth: int = 0
    """Another one for each time that it was loaded after it was cold; 0 while nothing of it is built."""


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
    numbers: dict[str, dict[str, int]] = field(default_factory=dict)
    """By model and engine, see `name_of`: with which number frontends say that they have joined it, or left it. Another
    one for each seat there, and when hosts were found to have forgotten this server; none = nothing to do yet."""
    num_servers: int = 1
    """Servers of the pool, each of which keeps a part of each queue."""


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
    is_alive: bool = True
    """Whether a host is there and its pulse is not overdue."""
    cluster: ClusterSeats | None = None
    """With hosts on a cluster; `host` is None then."""


def sendable(error: Exception) -> PoolError:
    """The error as one that every process of the pool can read."""
    return error if isinstance(error, PoolError) else PoolError(f"{type(error).__name__}: {error}")
