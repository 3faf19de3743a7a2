# SPDX-License-Identifier: Apache-2.0
"""The pool file's `cluster` section: how a pool is spread over the nodes of a Ray cluster.

    cluster:
      hosts: 4              # engine hosts; auto = one per GPU of the cluster
      num_cpus_per_host: 2
      replicas: 2           # hosts per model, at least

`device_memory` and `host_memory` of the pool file are then the budgets of each host. Imports neither vllm nor ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

from tokenpool.errors import check_setting
from tokenpool.group_config import Groups
from tokenpool.sections import (
    Count,
    CountOrAuto,
    ExpandedText,
    Number,
    Seconds,
    Section,
    Text,
    above,
    at_least,
    between,
    matching,
    one_of,
)


@dataclass(frozen=True, slots=True)
class ClusterConfig(Section):
    """How many engine hosts there are, what each may use, and how models are put on them."""

    name: Annotated[Text, matching("[A-Za-z0-9_-]+", "{} is no cluster name: use letters, digits, _ and - only")] = (
        "tokenpool"
    )
    """Name of the pool in the Ray cluster: letters, digits, _ and -; two pools in one cluster need two names."""
    hosts: Annotated[CountOrAuto, at_least(1, "must be 1 or more, or auto")] = None
    """Engine hosts, one per device; auto = one per GPU of the cluster, also of nodes that join later, and one on a
    cluster without."""
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

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        if self.hosts is not None:
            problem = f"{self.replicas} replicas need as many hosts, there are {self.hosts}: lower it, or raise hosts"
            check_setting(self.replicas <= self.hosts, "replicas", problem)
            problem = f"must leave a host of {self.hosts} to decode: lower it, or raise hosts"
            check_setting(self.prefill_hosts < self.hosts, "prefill_hosts", problem)
        if self.max_replicas is not None:
            problem = f"must be replicas ({self.replicas}) or more"
            check_setting(self.max_replicas >= self.replicas, "max_replicas", problem)
        if self.capacity == "fixed":
            check_setting(self.max_replicas is None, "max_replicas", "needs capacity: live; fixed keeps to replicas")
            check_setting(self.prefill_hosts == 0, "prefill_hosts", "needs capacity: live")


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
            check_setting(cluster.hosts is None or count <= cluster.hosts, where, problem)
        fixed = cluster.capacity == "fixed" and model.max_replicas is not None
        problem = "needs cluster.capacity: live; fixed keeps to replicas"
        check_setting(not fixed, f"models[{i}].max_replicas", problem)
        least, most = model.replicas or cluster.replicas, model.max_replicas or cluster.max_replicas
        key = "replicas" if model.replicas is not None else "max_replicas"
        problem = f"at least {least} hosts and at most {most}: lower replicas, or raise max_replicas"
        check_setting(most is None or most >= least, f"models[{i}].{key}", problem)
