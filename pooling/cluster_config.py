# SPDX-License-Identifier: Apache-2.0
"""The pool file's `cluster` section: how a pool is spread over the nodes of a Ray cluster.

    cluster:
      hosts: 4              # engine hosts; auto = one per GPU of the cluster; {min: 0, max: 8} = as many as are needed
      num_cpus_per_host: 2
      replicas: 2           # hosts per model, at least

`device_memory` and `host_memory` of the pool file are then the budgets of each host. Imports neither vllm nor ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

from tokenpool.errors import check_setting, show
from tokenpool.group_config import Groups
from tokenpool.sections import (
    Count,
    ExpandedText,
    Number,
    Rule,
    Seconds,
    Section,
    Text,
    Written,
    above,
    at_least,
    between,
    matching,
    one_of,
)


@dataclass(frozen=True, slots=True)
class HostRange:
    """A number of engine hosts that follows what is asked of the pool; written `{min: 0, max: 8}`."""

    least: int
    """0 or more."""
    most: int
    """1 or more, and not below `least`."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a range that is none."""
        for key, value in (("min", self.least), ("max", self.most)):
            limit = 0 if key == "min" else max(self.least, 1)
            problem = f"must be a whole number, {limit} or more, not {show(value)}"
            check_setting(_is_count(value) and value >= limit, key, problem)

    def __str__(self) -> str:
        return f"{{min: {self.least}, max: {self.most}}}"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_hosts(value: object) -> object:
    if isinstance(value, dict):
        check_setting(value.keys() == {"min", "max"}, None, f"expected {{min: N, max: M}}, got {show(value)}")
        return HostRange(value["min"], value["max"])
    problem = f"expected a whole number, auto or {{min: N, max: M}}, got {show(value)}"
    check_setting(_is_count(value), None, problem)
    return value


_BOUNDS = {"min": {"type": "integer", "minimum": 0}, "max": {"type": "integer", "minimum": 1}}
_RANGE = {"type": "object", "properties": _BOUNDS, "required": ["min", "max"], "additionalProperties": False}
_Hosts = Annotated[
    int | HostRange | None,
    Written(
        _read_hosts,
        "whole number, or `{min: N, max: M}`",
        {"anyOf": [{"type": "integer", "minimum": 1}, _RANGE]},
        auto=True,
    ),
]
_some_hosts = Rule(lambda hosts: isinstance(hosts, HostRange) or hosts >= 1, "must be 1 or more, or auto", {})


@dataclass(frozen=True, slots=True)
class ClusterConfig(Section):
    """How many engine hosts there are, what each may use, and how models are put on them."""

    name: Annotated[Text, matching("[A-Za-z0-9_-]+", "{} is no cluster name: use letters, digits, _ and - only")] = (
        "tokenpool"
    )
    """Name of the pool in the Ray cluster: letters, digits, _ and -; two pools in one cluster need two names."""
    hosts: Annotated[_Hosts, _some_hosts] = None
    """Engine hosts, one per device; auto = one per GPU of the cluster, also of nodes that join later, and one on a
    cluster without. `{min: 0, max: 8}` = as many as are needed, for which Ray's autoscaler is asked; needs `capacity:
    live`."""
    num_cpus_per_host: Annotated[Number, above(0, "must be above 0, such as 1")] = 1.0
    """CPUs that Ray sets aside for each host, above 0; on CPU devices also its OpenMP threads, rounded down."""
    replicas: Annotated[Count, at_least(1)] = 1
    """Hosts that serve each model, at least; 1 = a model whose host dies waits until another one has loaded it."""
    max_replicas: Annotated[Count, at_least(1)] | None = None
    """Hosts that may serve one model, at most; none = all of them. Needs `capacity: live`."""
    capacity: Annotated[Text, one_of("live", "fixed")] = "live"
    """`live` = the controller moves models to hosts that have time for them and gives them further hosts; `fixed` =
    each model has `replicas` hosts, and moves only when one is lost."""
    capacity_window_s: Annotated[Seconds, between(6, 3600, "must be 6s to 1h, such as 60s")] = 60.0
    """The traffic that `live` decides on, 6s to 1h. It answers to a change within about one window; what it waits
    between two changes grows with it."""
    prefill_hosts: Annotated[Count, at_least(0)] = 0
    """Hosts that only prefill to begin with; the others then only decode. `live`, which it needs, changes roles by
    the load. 0 = all hosts do both, always."""
    reconcile_period_s: Annotated[Seconds, between(0.05, 60, "must be 50ms to 60s, such as 0.5s")] = 0.5
    """Time between two looks at what is wanted and what is there, 50ms to 60s; deaths are acted on at once."""
    host_timeout_s: Annotated[Seconds, above(1, "must be above 1s, such as 10s")] = 10.0
    """Time without a word from a host's supervisor until it counts as lost, above 1s. Deaths of processes and nodes are
    noticed through Ray, mostly within 2 s; this is for nodes that hang. A host process that hangs is killed by its
    supervisor at the pool's own `host_timeout`."""
    frontend_timeout_s: Annotated[Seconds, above(1, "must be above 1s, such as 10s")] = 10.0
    """Time without a word from a server of the pool until it counts as lost, above 1s: hosts then drop its requests."""
    orphan_timeout_s: Annotated[Seconds, at_least(0, "must be 0s or more, such as 10m")] = 600.0
    """How long hosts and controller live without any server; then the pool ends. With `--cluster local` it always ends
    with its server."""
    transport: Annotated[Text, one_of("auto", "tcp")] = "auto"
    """How tokens travel between frontend and hosts: `auto` = Unix sockets within a machine and TCP between machines,
    `tcp` = always TCP. TCP is encrypted, with a key that only the hosts of the pool are told."""
    state_dir: ExpandedText | None = None
    """Folder in which the controller makes one for its snapshot, `tokenpool-state-UID` of mode 0700; one that is not
    the user's own, or open to others, is not used. none = the temporary folder."""
    together: Groups = ()
    """Models that are placed and kept as one, such as `[chat, embed]`, or a list of such groups: where one of them is
    the others are."""
    apart: Groups = ()
    """Models of which no two share a host, such as `[chat, code]`, or a list of such groups."""
    host_idle_after_s: Annotated[Seconds, at_least(1, "must be 1s or more, such as 5m")] = 300.0
    """With `hosts: {min: N, max: M}`: time after which a host that nobody needs is emptied and given back, 1s or more.
    Models that are loaded on demand and not used need none."""

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        if (most := self.most_hosts) is not None:
            problem = f"{self.replicas} replicas need as many hosts, there are {most}: lower it, or raise hosts"
            check_setting(self.replicas <= most, "replicas", problem)
            problem = f"must leave a host of {most} to decode: lower it, or raise hosts"
            check_setting(self.prefill_hosts < most, "prefill_hosts", problem)
        if self.host_range is not None:
            problem = f"hosts: {self.hosts} needs live, which knows what hosts have to do"
            check_setting(self.capacity == "live", "capacity", problem)
            problem = f"is not there with hosts: {self.hosts}: give a number of hosts, or remove it"
            check_setting(self.prefill_hosts == 0, "prefill_hosts", problem)
        if self.max_replicas is not None:
            problem = f"must be replicas ({self.replicas}) or more"
            check_setting(self.max_replicas >= self.replicas, "max_replicas", problem)
        if self.capacity == "fixed":
            check_setting(self.max_replicas is None, "max_replicas", "needs capacity: live; fixed keeps to replicas")
            check_setting(self.prefill_hosts == 0, "prefill_hosts", "needs capacity: live")

    @property
    def host_range(self) -> HostRange | None:
        """Bounds of a number of hosts that follows the need; None = it does not."""
        return self.hosts if isinstance(self.hosts, HostRange) else None

    @property
    def most_hosts(self) -> int | None:
        """Hosts that there may be; None = one per GPU of the cluster."""
        return self.hosts.most if isinstance(self.hosts, HostRange) else self.hosts


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
            problem = f"{count} hosts are asked for, cluster.hosts is {cluster.hosts}: lower it, or raise that"
            check_setting(cluster.most_hosts is None or count <= cluster.most_hosts, where, problem)
        fixed = cluster.capacity == "fixed" and model.max_replicas is not None
        problem = "needs cluster.capacity: live; fixed keeps to replicas"
        check_setting(not fixed, f"models[{i}].max_replicas", problem)
        least, most = model.replicas or cluster.replicas, model.max_replicas or cluster.max_replicas
        key = "replicas" if model.replicas is not None else "max_replicas"
        problem = f"at least {least} hosts and at most {most}: lower replicas, or raise max_replicas"
        check_setting(most is None or most >= least, f"models[{i}].{key}", problem)
