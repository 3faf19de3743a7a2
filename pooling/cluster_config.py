# SPDX-License-Identifier: Apache-2.0
"""The pool file's `cluster` section: how a pool is spread over the nodes of a Ray cluster.

    cluster:
      hosts: 4              # engine hosts; auto = one per GPU of the cluster
      num_cpus_per_host: 2
      replicas: 2           # hosts per model, at least

`device_memory` and `host_memory` of the pool file are then the budgets of each host. Imports neither vllm nor ray.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tokenpool import units
from tokenpool.errors import ConfigError, check_setting, show

CAPACITIES = ("live", "fixed")
TRANSPORTS = ("auto", "tcp")
_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """How many engine hosts there are, what each may use, and how models are put on them."""

    name: str = "tokenpool"
    """Name of the pool in the Ray cluster: letters, digits, _ and -; two pools in one cluster need two names."""
    hosts: int | None = None
    """Engine hosts, one per device; None (YAML: auto) = one per GPU of the cluster, and one on a cluster without."""
    num_cpus_per_host: float = 1.0
    """CPUs that Ray sets aside for each host, above 0; on CPU devices also its OpenMP threads, rounded down."""
    replicas: int = 1
    """Hosts that serve each model, at least; 1 = a model whose host dies waits until another one has loaded it."""
    max_replicas: int | None = None
    """Hosts that may serve one model, at most; None = all of them."""
    capacity: str = "live"
    """`live` = the controller moves models to hosts that have time for them and gives them further hosts; `fixed` =
    each model has `replicas` hosts, and moves only when one is lost."""
    capacity_window_s: float = 60.0
    """Seconds of traffic that `live` decides on, 6 to 3600; what it waits between two changes grows with it."""
    prefill_hosts: int = 0
    """Hosts that only prefill to begin with; the others then only decode. `live` changes roles by the load. 0 = all
    hosts do both, always."""
    reconcile_period_s: float = 0.5
    """Seconds between two looks at what is wanted and what is there, 0.05 to 60; deaths are acted on at once."""
    host_timeout_s: float = 10.0
    """Seconds without a word from a host's supervisor until it counts as lost, above 1; YAML: `host_timeout: 10s`.
    Deaths of processes and nodes are noticed through Ray, mostly within 2 s; this is for nodes that hang."""
    transport: str = "auto"
    """How tokens travel between frontend and hosts: `auto` = Unix sockets within a machine and TCP between machines,
    `tcp` = always TCP. TCP is encrypted, with a key that only the hosts of the pool are told."""
    state_dir: str | None = None
    """Folder in which the controller makes one of its own for its snapshot; None = the temporary folder."""

    def __post_init__(self) -> None:
        good = _NAME.fullmatch(self.name) is not None
        check_setting(good, "name", f"{show(self.name)} is no cluster name: use letters, digits, _ and - only")
        check_setting(self.hosts is None or self.hosts >= 1, "hosts", "must be 1 or more, or auto")
        check_setting(self.num_cpus_per_host > 0, "num_cpus_per_host", "must be above 0, such as 1")
        check_setting(self.replicas >= 1, "replicas", "must be 1 or more")
        if self.hosts is not None:
            problem = f"{self.replicas} replicas need as many hosts, there are {self.hosts}: lower it, or raise hosts"
            check_setting(self.replicas <= self.hosts, "replicas", problem)
        if self.max_replicas is not None:
            problem = f"must be replicas ({self.replicas}) or more"
            check_setting(self.max_replicas >= self.replicas, "max_replicas", problem)
        check_setting(self.capacity in CAPACITIES, "capacity", f"must be live or fixed, got {show(self.capacity)}")
        check_setting(6 <= self.capacity_window_s <= 3600, "capacity_window", "must be 6s to 1h, such as 60s")
        check_setting(self.prefill_hosts >= 0, "prefill_hosts", "must be 0 or more")
        if self.capacity == "fixed":
            check_setting(self.max_replicas is None, "max_replicas", "needs capacity: live; fixed keeps to replicas")
            check_setting(self.prefill_hosts == 0, "prefill_hosts", "needs capacity: live")
        if self.hosts is not None:
            problem = f"must leave a host of {self.hosts} to decode: lower it, or raise hosts"
            check_setting(self.prefill_hosts < self.hosts, "prefill_hosts", problem)
        check_setting(0.05 <= self.reconcile_period_s <= 60, "reconcile_period", "must be 50ms to 60s, such as 0.5s")
        check_setting(self.host_timeout_s > 1, "host_timeout", "must be above 1s, such as 10s")
        problem = f"must be one of {', '.join(TRANSPORTS)}, got {show(self.transport)}"
        check_setting(self.transport in TRANSPORTS, "transport", problem)


class _Replicated(Protocol):
    """What is asked here of a model of the pool file."""

    @property
    def name(self) -> str: ...
    @property
    def replicas(self) -> int | None: ...
    @property
    def max_replicas(self) -> int | None: ...


def check_replicas(cluster: ClusterConfig, models: Sequence[_Replicated]) -> None:
    """Raise ConfigError if a model's own `replicas` and `max_replicas` do not go with the cluster's."""
    for i, model in enumerate(models):
        own = (("replicas", model.replicas), ("max_replicas", model.max_replicas))
        for key, count in [(key, count) for key, count in own if count is not None]:
            where = f"models[{i}].{key}"
            check_setting(count >= 1, where, "must be 1 or more")
            problem = f"{count} hosts are asked for, cluster.hosts is {cluster.hosts}: lower it, or raise that"
            check_setting(cluster.hosts is None or count <= cluster.hosts, where, problem)
        fixed = cluster.capacity == "fixed" and model.max_replicas is not None
        problem = "needs cluster.capacity: live; fixed keeps to replicas"
        check_setting(not fixed, f"models[{i}].max_replicas", problem)
        least, most = model.replicas or cluster.replicas, model.max_replicas or cluster.max_replicas
        key = "replicas" if model.replicas is not None else "max_replicas"
        problem = f"at least {least} hosts and at most {most}: lower replicas, or raise max_replicas"
        check_setting(most is None or most >= least, f"models[{i}].{key}", problem)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"expected a number, got {show(value)}")
    return float(value)


CLUSTER_PARSERS: Mapping[str, Callable[[Any], Any]] = {
    "name": units.parse_text,
    "hosts": lambda value: None if value == "auto" else units.parse_int(value),
    "num_cpus_per_host": _number,
    "replicas": units.parse_int,
    "max_replicas": units.optional(units.parse_int),
    "capacity": units.parse_text,
    "capacity_window": units.parse_seconds,
    "prefill_hosts": units.parse_int,
    "reconcile_period": units.parse_seconds,
    "host_timeout": units.parse_seconds,
    "transport": units.parse_text,
    "state_dir": units.optional(lambda value: units.expand_env(units.parse_text(value))),
}
"""Parser of each key of the section."""
