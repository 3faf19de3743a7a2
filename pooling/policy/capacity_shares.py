# SPDX-License-Identifier: Apache-2.0
"""Parts of the turns on hosts that nothing can relieve: the more important models first."""

from __future__ import annotations

from collections.abc import Iterable

from tokenpool.policy.capacity import Action, CapacityDecision
from tokenpool.policy.capacity_board import Board

_MIN_SHARE = 0.02
_MIN_CHANGE = 0.1
"""Shares that change by less stay."""
_FREE_BELOW = 0.9
"""Shares are lifted when the load is below this part of what was too much."""


def change_shares(board: Board, still_over: Iterable[int]) -> list[CapacityDecision]:
    """Shares for hosts that stay overloaded and serve models of unequal priority; none elsewhere.

    With equal priorities the turn policy does at least as well alone. From the highest priority down, models get what
    they need; within the one that does not get all, what is left is split in proportion to need.
    """
    over, made = set(still_over), []
    for h, host in enumerate(board.view.hosts):
        if not board.is_up[h]:
            continue
        shares = _shares(board, h) if h in over else {}
        if not shares and board.load(h) > _FREE_BELOW * board.full:
            continue
        for seat in host.seats:
            m = board.model_of.get(seat.model)
            if m is None or m not in board.on_host[h] or seat.is_coming:
                continue
            new = shares.get(m)
            if new is None and seat.share is None:
                continue
            if new is not None and seat.share is not None and abs(new - seat.share) < _MIN_CHANGE:
                continue
            why = "free again" if new is None else f"{new:.0%} of the turns, load {board.load(h):.2f} stays"
            reason = f"{seat.model}: {why} on {host.host}"
            made.append(CapacityDecision(Action.SHARE, reason, seat.model, to_host=host.host, share=new))
    return made


def _shares(board: Board, h: int) -> dict[int, float]:
    models = board.view.models
    need: dict[int, dict[int, float]] = {}
    for m in board.on_host[h]:
        work = next(work for host, work, _, _ in board.parts(m, board.seats[m]) if host == h)
        need.setdefault(models[m].priority, {})[m] = board.scale[h] * work
    if len(need) < 2:
        return {}
    left, shares = 1.0, {}
    for priority in sorted(need, reverse=True):
        group = need[priority]
        part = min(1.0, left / max(1e-9, sum(group.values())))
        for m, work in group.items():
            shares[m] = max(_MIN_SHARE, part * work)
        left = max(0.0, left - sum(group.values()))
    total = sum(shares.values())
    return {m: round(share / total, 3) for m, share in shares.items()}
