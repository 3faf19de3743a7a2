# SPDX-License-Identifier: Apache-2.0
"""What decisions do to a view, and the laws that every view keeps: for tests, and for trying a policy out on paper."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from tokenpool.policy.capacity import (
    Action,
    CapacityDecision,
    CapacityHost,
    CapacityModel,
    CapacitySeat,
    CapacityView,
    HostState,
    Role,
)
from tokenpool.policy.turns import Residency


def apply(view: CapacityView, decision: CapacityDecision) -> CapacityView:
    """`apply_all` for one decision."""
    return apply_all(view, [decision])


def apply_all(view: CapacityView, decisions: Iterable[CapacityDecision]) -> CapacityView:
    """The view right after decisions, carried out in order: new seats are coming, left ones are leaving.

    Raises ValueError if a decision breaks a law: no such host or seat, no room, a second seat on one host.
    """
    hosts = {host.host: host for host in view.hosts}
    models = {model.model: model for model in view.models}
    for decision in decisions:
        _apply(hosts, models, decision)
    return replace(view, hosts=tuple(hosts.values()), models=tuple(models.values()))


def _apply(hosts: dict[str, CapacityHost], models: dict[str, CapacityModel], decision: CapacityDecision) -> None:
    action = decision.action
    if action is Action.ROLE:
        host = _host(hosts, decision.to_host)
        hosts[host.host] = replace(host, role=decision.role or Role.MIXED, since_role_s=0.0)
        return
    model = models.get(decision.model or "")
    if model is None:
        raise ValueError(f"there is no model {decision.model!r}")
    if action in (Action.PLACE, Action.REPLICATE, Action.MOVE):
        hosts[decision.to_host or ""] = _with_seat(_host(hosts, decision.to_host), model, decision.copy_bytes)
    if action in (Action.DROP, Action.MOVE):
        host = _host(hosts, decision.from_host)
        if not any(seat.model == model.model and not seat.is_leaving for seat in host.seats):
            raise ValueError(f"{model.model} is not on {host.host}")
        seats = tuple(replace(s, is_leaving=True) if s.model == model.model else s for s in host.seats)
        hosts[host.host] = replace(host, seats=seats, since_move_s=0.0)
    models[model.model] = replace(model, since_move_s=0.0)


def _with_seat(host: CapacityHost, model: CapacityModel, copy_bytes: int) -> CapacityHost:
    if host.state is not HostState.UP:
        raise ValueError(f"{host.host} is {host.state}")
    if any(seat.model == model.model for seat in host.seats):
        raise ValueError(f"{model.model} is on {host.host} already")
    if model.weight_bytes > host.free_host_bytes or model.weight_bytes + model.min_kv_bytes > host.device_bytes:
        raise ValueError(f"{model.model} does not fit on {host.host}")
    if copy_bytes != model.weight_bytes:
        raise ValueError(f"{model.model} has {model.weight_bytes} bytes, not {copy_bytes}")
    return replace(
        host,
        seats=(*host.seats, CapacitySeat(model.model, Residency.ON_DISK, is_coming=True)),
        free_host_bytes=host.free_host_bytes - model.weight_bytes,
        num_copies=host.num_copies + 1,
        since_move_s=0.0,
    )


def finish(view: CapacityView) -> CapacityView:
    """The view when all copies have ended, what was leaving is unloaded and what was on lost hosts is forgotten."""
    sizes = {model.model: model.weight_bytes for model in view.models}
    hosts = []
    for host in view.hosts:
        if host.state is HostState.LOST:
            hosts.append(replace(host, seats=()))
            continue
        freed = sum([sizes.get(seat.model, 0) for seat in host.seats if seat.is_leaving])
        seats = tuple(
            replace(seat, is_coming=False, residency=Residency.IN_HOST if seat.is_coming else seat.residency)
            for seat in host.seats
            if not seat.is_leaving
        )
        hosts.append(replace(host, seats=seats, free_host_bytes=host.free_host_bytes + freed, num_copies=0))
    return replace(view, hosts=tuple(hosts))


def check(view: CapacityView) -> None:
    """Raise ValueError if a host holds more than its memory, a model twice, or what comes may not be there."""
    pinned = {model.model: model.pinned for model in view.models if model.pinned}
    models = {model.model: model for model in view.models}
    for host in view.hosts:
        names = [seat.model for seat in host.seats]
        if host.free_host_bytes < 0:
            raise ValueError(f"{host.host} holds {-host.free_host_bytes} bytes too many")
        if len(set(names)) != len(names):
            raise ValueError(f"{host.host} has a model twice")
        for seat in host.seats:
            if seat.is_coming and host.host not in pinned.get(seat.model, (host.host,)):
                raise ValueError(f"{seat.model} is pinned elsewhere than {host.host}")
            model = models.get(seat.model)
            if seat.is_coming and model and model.allowed is not None and host.host not in model.allowed:
                raise ValueError(f"{seat.model} may not be on {host.host}")
            if seat.is_coming and model and (met := model.apart & set(names)):
                raise ValueError(f"{seat.model} meets {', '.join(met)} on {host.host}")


def _host(hosts: dict[str, CapacityHost], name: str | None) -> CapacityHost:
    if name not in hosts:
        raise ValueError(f"there is no host {name!r}")
    return hosts[name]
