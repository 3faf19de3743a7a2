# SPDX-License-Identifier: Apache-2.0
"""Roles of hosts follow the mix of work, in a pool where prefill and decode are split.

With P and D hosts' worth of prefill and decode, and p, d and x hosts for prefill, decode and both, the busiest part of
the pool is busy for max(P / (p + x), D / (d + x), (P + D) / (p + d + x)) of its time. A host changes its role if that
makes this clearly less.
"""

from __future__ import annotations

from tokenpool.policy.capacity import Action, CapacityDecision, Role
from tokenpool.policy.capacity_board import Board

_MIN_BETTER = 0.1
"""By how much the busiest part must become less busy."""
_NEAR = 0.05


def change_role(board: Board, full: float, role_s: float) -> list[CapacityDecision]:
    """At most one change, of a host without which every model is still served; none in a pool of mixed hosts.

    A pool that changed a role less than `role_s / 3` ago waits, so that the change shows in what is measured.
    """
    hosts = board.view.hosts
    ups = [h for h in range(len(hosts)) if board.is_up[h]]
    split = [h for h in ups if hosts[h].role is not Role.MIXED]
    if not split or min([hosts[h].since_role_s for h in ups]) < role_s / 3:
        return []
    prefill, decode = _demand(board)
    counts = {role: sum([hosts[h].role is role for h in ups]) for role in Role}
    before = _busiest(prefill, decode, counts)
    if before <= full:
        return []
    options = []
    for old in (Role.PREFILL, Role.DECODE):
        # A whole host for the other work goes before one for both: that is what the operator split roles for.
        for rank, new in enumerate((Role.DECODE if old is Role.PREFILL else Role.PREFILL, Role.MIXED)):
            after = _busiest(prefill, decode, {**counts, old: counts[old] - 1, new: counts[new] + 1})
            if counts[old] and after <= before - _MIN_BETTER:
                options.append((after + rank * _NEAR, old, new, after))
    for _, old, new, after in sorted(options, key=lambda option: option[0]):
        fit = [h for h in split if hosts[h].role is old and hosts[h].since_role_s >= role_s and _spared(board, h, new)]
        if fit:
            h = min(fit, key=lambda h: (board.load(h), h))
            reason = (
                f"{hosts[h].host}: {old} -> {new}; prefill needs {prefill:.1f} hosts and decode {decode:.1f}, "
                f"the busiest part goes from {before:.0%} to {after:.0%}"
            )
            board.set_role(h, new)
            return [CapacityDecision(Action.ROLE, reason, to_host=hosts[h].host, role=new)]
    return []


def _demand(board: Board) -> tuple[float, float]:
    """Hosts' worth of prefill and of decode, with the seats as they are."""
    hosts = board.view.hosts
    prefill = decode = 0.0
    for h, host in enumerate(hosts):
        if not board.is_up[h]:
            continue
        if host.role is Role.PREFILL:
            prefill += board.load(h)
        elif host.role is Role.DECODE:
            decode += board.load(h)
        else:
            first = sum([board.prefill[m] / max(1, board.kinds(board.seats[m])[0]) for m in board.on_host[h]])
            part = min(board.load(h), board.scale[h] * first / host.speed)
            prefill += part
            decode += board.load(h) - part
    return prefill, decode


def _busiest(prefill: float, decode: float, counts: dict[Role, int]) -> float:
    mixed = counts[Role.MIXED]
    parts = ((prefill, counts[Role.PREFILL] + mixed), (decode, counts[Role.DECODE] + mixed))
    worst = (prefill + decode) / max(1, sum(counts.values()))
    for demand, count in parts:
        if not count:
            return float("inf")
        worst = max(worst, demand / count)
    return worst


def _spared(board: Board, h: int, new: Role) -> bool:
    """Whether all models of the host still have enough seats of both kinds with the role `new`."""
    for m in board.on_host[h]:
        others = [s for s in board.seats[m] if s != h]
        num_entry, num_decode = board.kinds(others)
        if min(num_entry + (new is not Role.DECODE), num_decode + (new is not Role.PREFILL)) < max(
            1, board.view.models[m].min_replicas
        ):
            return False
    return True
