# SPDX-License-Identifier: Apache-2.0
"""What a pool needs hosts for, told to `Scaling`, and what follows for the others who decide. Plain Python."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import replace
from functools import partial

from tokenpool.cluster.deciding.host_demand import Rules, can_empty, copies_of, hosts_needed
from tokenpool.cluster.deciding.pool_state import TAKEN, PoolState
from tokenpool.cluster.deciding.scaling import Change, HostsKept, HostUse, Load, Need, Scaling
from tokenpool.cluster.placement import Loads, Placement, Situation, fits
from tokenpool.cluster.values import Deployment, HostReport
from tokenpool.cluster_config import ClusterConfig
from tokenpool.host_kinds import ANY, Kind, is_within, kind_of

_PERIOD_S = 0.5
_MAX_LOOKS = 8
"""Models without a seat that are looked at in one look: one without room is enough."""


class Elastic:
    """See the module; for a pool whose number of hosts follows the need."""

    def __init__(
        self,
        scaling: Scaling,
        placement: Placement,
        rules: Rules,
        *,
        max_replicas: int | None = None,
        max_loaded: int | None = None,
    ) -> None:
        """`max_replicas` is for models that have none of their own; None = as many as there are hosts."""
        self.scaling = scaling
        self._placement = placement
        self._rules = rules
        self._max_replicas = max_replicas
        self._max_loaded = max_loaded
        self._blank: HostReport | None = None
        self._looked_s = -math.inf

    def look(self, state: PoolState, now_s: float) -> list[Change]:
        """What is to be changed now; looks at most once in half a second."""
        for host in state.hosts.keys() - self.scaling.asked:
            self.scaling.adopt(host)
        if now_s - self._looked_s < _PERIOD_S:
            return []
        self._looked_s = now_s
        self._blank = next(iter(state.hosts.values()), self._blank)
        return self.scaling.decide(self._need(state, now_s))

    def may_come(self, model: Deployment, state: PoolState) -> bool:
        """Whether a model may be waited for because another host may come that could take it."""
        if not self._blank_takes(model):
            return False
        scaling, kind = self.scaling, kind_of(model.hosts)
        coming = any(is_within(scaling.kind(host), kind) for host in scaling.pending(state.hosts))
        if coming or scaling.may_grow:
            return True
        others = [name for name in state.lives.lasting() if name in state.models and name != model.name]
        situation = state.situation(math.inf, state.lives.awake)  # what is barred does not matter here
        labels = {host: report.labels for host, report in state.hosts.items()}

        def may_go(host: str) -> bool:
            return can_empty(host, set(others), situation, self._rules, set())

        return scaling.may_make_way(kind, self._kinds_of(others, state), labels, may_go)

    def stranded(self, state: PoolState, now_s: float) -> set[str]:
        """Models that stand only where hosts are to be given back, and have no room elsewhere."""
        if not self.scaling.leaving:
            return set()
        on_leaving = {name for host in self.scaling.leaving for name, _ in state.seats.on_host(host)}
        elsewhere = {name for name, host in state.seats if host not in self.scaling.leaving}
        only = sorted((on_leaving - elsewhere) & state.models.keys())
        situation = state.situation(now_s, {*state.lives.awake, *only})
        return {name for name in only if not self._placement.has_room(name, situation)}

    # -- what is needed --------------------------------------------------------------------------------

    def _need(self, state: PoolState, now_s: float) -> Need:
        situation = state.situation(now_s, state.lives.awake)
        needed = [name for name in state.lives.needed(now_s) if name not in state.models.retiring]
        loads = self._placement.loads(situation) if state.hosts else Loads()
        have_told = not state.lives.has_choice or state.lives.uses.have_told(state.peers.names)
        busy = state.lives.used_since(now_s - self.scaling.idle_after_s)

        def may_go(models: Set[str], host: str, leaving: Set[str]) -> bool:
            return can_empty(host, models, situation, self._rules, leaving)

        return Need(
            now_s,
            self._kinds_of(needed, state),
            self._num_useful(situation),
            Load(sum(loads.by_host.values()), loads.is_over, self._kind_for_load(loads, state)),
            self._homeless(needed, state, now_s),
            have_told and not state.peers.missing,
            self._uses(state.hosts, state, loads),
            frozenset(state.draining),
            partial(may_go, busy.union(needed)),
            partial(may_go, frozenset(needed)),
        )

    def _kinds_of(self, names: list[str], state: PoolState) -> list[Kind]:
        """The hosts on which those of these models fit that may be loaded at a time, and on which each may be."""
        known = [report.labels | {host} for host, report in state.hosts.items() if host not in state.emptied]
        models = self._by_turn(names, state)
        kinds = hosts_needed(models[: self._max_loaded], self._blank, self._rules, known)
        for kind in (kind_of(model.hosts) for model in models[self._max_loaded or len(models) :]):
            if not any(is_within(other, kind) for other in kinds):
                kinds.append(kind)
        return kinds

    def _by_turn(self, names: list[str], state: PoolState) -> list[Deployment]:
        """Those that are loaded come first, and then the largest."""
        awake = set(state.lives.awake)
        return sorted((state.models[n] for n in names), key=lambda m: (m.name not in awake, -m.weight_bytes, m.name))

    def _num_useful(self, situation: Situation) -> float:
        models = situation.models.values()
        return sum(max(m.max_replicas or self._max_replicas or math.inf, copies_of(m, self._rules)) for m in models)

    def _kind_for_load(self, loads: Loads, state: PoolState) -> Kind:
        """Of a host that could take something off the one with the most to do."""
        if not loads.by_host:
            return ANY
        busiest = max(sorted(loads.by_host), key=lambda host: loads.by_host[host])
        names = [name for name, _ in state.seats.on_host(busiest) if name in state.models]
        reported = state.hosts[busiest].models if busiest in state.hosts else {}

        def work(name: str) -> int:
            load = reported[name].load if name in reported else {}
            return load.get("running", 0) + load.get("waiting", 0)

        if any(not state.models[name].hosts for name in names):
            return ANY
        return kind_of(state.models[max(sorted(names), key=work)].hosts) if names else ANY

    def _homeless(self, needed: list[str], state: PoolState, now_s: float) -> Kind | None:
        """Kind of the hosts of a model that has no seat, no room, and would have room on one more of them."""
        if not state.hosts:
            return None
        seated = {name for (name, _), seat in state.seats.items() if seat.state in TAKEN}
        awake = set(state.lives.awake)
        is_full = self._max_loaded is not None and len(awake) >= self._max_loaded
        waiting = [state.models[n] for n in needed if n not in seated and (n in awake or not is_full)]
        for model in [m for m in waiting if self._blank_takes(m)][:_MAX_LOOKS]:
            situation = state.situation(now_s, {*awake, model.name})
            if not self._placement.has_room(model.name, replace(situation, leaving={}, going={})):
                return kind_of(model.hosts)
        return None

    def _blank_takes(self, model: Deployment) -> bool:
        return self._blank is None or fits(model, self._blank, [])

    def _uses(self, hosts: Mapping[str, HostReport], state: PoolState, loads: Loads) -> dict[str, HostUse]:
        on_node: dict[str, int] = {}
        for report in hosts.values():
            on_node[report.node] = on_node.get(report.node, 0) + 1
        return {
            host: HostUse(
                max(len(state.seats.on_host(host)), len(report.models)),
                sum(h.load.get("running", 0) + h.load.get("waiting", 0) for h in report.models.values()),
                loads.by_host.get(host, 0.0),
                on_node[report.node] - 1,
                report.labels,
            )
            for host, report in hosts.items()
        }


def elastic_of(config: ClusterConfig, placement: Placement, max_loaded: int | None, kept: HostsKept) -> Elastic | None:
    """For a pool whose section asks for it, which goes on with what a former controller has kept."""
    if (bounds := config.host_range) is None:
        return None
    rules = Rules(config.replicas, config.together, config.apart)
    scaling = Scaling(bounds, config.host_idle_after_s, *kept)
    return Elastic(scaling, placement, rules, max_replicas=config.max_replicas, max_loaded=max_loaded)
