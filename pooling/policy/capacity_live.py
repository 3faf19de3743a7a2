# SPDX-License-Identifier: Apache-2.0
"""The capacity policy of tokenpool: seats follow the traffic, where what a move wins is worth the bytes that it copies.

In this order: models of lost hosts and models without enough seats, hosts that drain, hosts with too much to do, seats
that nobody needs, roles. docs/capacity.md says why each constant is what it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tokenpool.errors import check_setting, show
from tokenpool.policy.capacity import Action, CapacityDecision, CapacityView, HostState
from tokenpool.policy.capacity_board import Board
from tokenpool.policy.capacity_roles import change_role
from tokenpool.policy.placement import best_home

_NUM_TARGETS = 64
_MODELS_PER_HOST = 8
_CHANGES_PER_HOST = 4
_MAX_LOOKS = 4000
"""Seats that are looked at for relief, so that a bad day does not take longer than a good one by much."""
_NEAR_FRAC = 0.95
"""What is nearly as good is taken if it copies less."""


@dataclass(frozen=True, slots=True)
class LiveCapacity:
    """The policy; its fields are its settings. A load of 1 = a host's whole time is needed to be on time."""

    full: float = 0.9
    """Load above which tokens are taken to come late; a host above it is relieved."""
    target_load: float = 0.8
    """A host that takes a seat to relieve another may reach this load, no more."""
    drop_load: float = 0.55
    """A seat is given up only if the others stay below this load."""
    target_frac: float = 0.97
    """Share of tokens on time that is good enough."""
    settle_s: float = 20.0
    """A model that moved within so many seconds does not move again to relieve a host."""
    quiet_s: float = 180.0
    """A model must have been where it is for so long before a seat of it is dropped."""
    role_s: float = 60.0
    """The least time between two changes of a host's role."""
    horizon_s: float = 120.0
    """A move must have paid by then."""
    copy_drag: float = 0.1
    """Share of the receiving host's tokens put at risk while weights come."""
    min_gain_frac: float = 0.02
    """The least gain, as a share of the tokens of the host that is relieved."""
    min_split: float = 0.3
    """A model is given a second seat only if it takes such a share of the host to be relieved; smaller ones move."""
    max_copies: int = 2
    """Seats that may be coming to one host at a time; twice as many for models that would have no seat."""
    max_decisions: int = 128
    """In one answer."""

    def __post_init__(self) -> None:
        ordered = 0 < self.drop_load < self.target_load < self.full <= 1
        check_setting(ordered, "full", f"needs 0 < drop_load < target_load < full <= 1, not {show(self.full)}")
        check_setting(self.max_copies >= 1, "max_copies", f"must be at least 1, not {show(self.max_copies)}")
        check_setting(self.max_decisions >= 1, "max_decisions", f"must be at least 1, not {show(self.max_decisions)}")

    def decide(self, view: CapacityView) -> list[CapacityDecision]:
        """See `CapacityPolicy`. O(hosts + models + seats), and O(hosts) more for each decision."""
        if not view.hosts:
            return []
        return _Deciding(self, view).run()


class _Deciding:
    """One call of `decide`."""

    def __init__(self, settings: LiveCapacity, view: CapacityView) -> None:
        self.settings, self.view = settings, view
        self.board = Board(view, settings.full, settings.target_frac)
        self.made: list[CapacityDecision] = []

    def run(self) -> list[CapacityDecision]:
        self._fill_up()
        self._empty_draining()
        self._relieve()
        self._drop()
        if self._has_room:
            self.made += change_role(self.board, self.settings.full, self.settings.role_s)
        return self.made

    @property
    def _has_room(self) -> bool:
        return len(self.made) < self.settings.max_decisions

    # -- seats that must be ----------------------------------------------------------------------------

    def _fill_up(self) -> None:
        """Give models the seats that they must have, those of lost hosts first."""
        board, models = self.board, self.view.models
        few = [m for m, model in enumerate(models) if model.pinned or board.num_kinds[m] < max(1, model.min_replicas)]
        missing = [m for m in few if self._lacks(m)]
        order = sorted(
            missing,
            key=lambda m: (
                m not in board.bereft,
                -models[m].priority,
                bool(board.seats[m]),
                -board.alone(m),
                m,
            ),
        )
        drained = {m: h for m, h in reversed(board.stranded) if not models[m].pinned}
        for m in order:
            while self._has_room:
                h = next((h for kind in self._lacks(m) if (h := self._home(m, kind)) is not None), None)
                if h is None:
                    break
                count, source = len(board.seats[m]), drained.pop(m, None)
                action = Action.PLACE if source is None else Action.MOVE
                if source is not None:
                    why = self._why_not_there(source)
                elif count:
                    why = f"{count} of {max(1, models[m].min_replicas)} replicas"
                else:
                    why = "its host is lost" if m in board.bereft else "has no seat yet"
                self._add(action, m, h, why, after=[*board.seats[m], h], source=source)
            if not self._has_room:
                return

    def _lacks(self, m: int) -> list[str]:
        """Kinds of seats that the model needs more of, what it has least of first: `pinned`, `entry`, `decode`."""
        model, seats = self.view.models[m], self.board.seats[m]
        if model.pinned:
            return ["pinned"] if len(seats) < len(model.pinned) else []
        counts, wanted = self.board.kinds(seats), max(1, model.min_replicas)
        if min(counts) >= wanted:
            return []
        return [kind for count, kind in sorted(zip(counts, ("entry", "decode"), strict=True)) if count < wanted]

    def _home(self, m: int, kind: str) -> int | None:
        """The host for a seat that must be; None if there is none with room."""
        board, model = self.board, self.view.models[m]
        mask = board.can_take(m, 2 * self.settings.max_copies)
        if kind == "pinned":
            allowed = np.zeros_like(mask)
            allowed[[board.host_of[name] for name in model.pinned if name in board.host_of]] = True
            mask &= allowed
        elif len(board.seats[m]) >= self._limit(m) and min(board.kinds(board.seats[m])):
            return None  # a model that could not be prefilled, or not be decoded, may have one more
        else:
            mask &= board.entry if kind == "entry" else board.decode
        mask[list(board.taken[m])] = False
        if not mask.any():
            return None
        _, work, _, _ = board.parts(m, [int(mask.argmax())])[0]
        seats = board.seats[m]
        is_near = np.isin(board.node, board.node[seats]) if seats else None
        return best_home(board.loads, work / (1 + len(seats)), board.free_bytes, mask, is_near, board.full)

    def _limit(self, m: int) -> int:
        """Seats that the model may have; one of each kind is needed where roles are split."""
        model = self.view.models[m]
        least = max(1, model.min_replicas) * (1 if (self.board.entry & self.board.decode).all() else 2)
        return len(self.view.hosts) if model.max_replicas is None else max(least, model.max_replicas)

    def _empty_draining(self) -> None:
        """Drop seats on hosts that drain where others serve the model; those that must move have been moved."""
        board, models = self.board, self.view.models
        moved = {(decision.model, decision.from_host) for decision in self.made}
        for m, h in board.stranded:
            model, name = models[m], self.view.hosts[h].host
            if not self._has_room:
                return
            if (model.model, name) in moved or name in model.pinned or self._may_get(m, self._lacks(m)):
                continue  # what is pinned stays until the operator says otherwise
            reason = f"{model.model}: {self._why_not_there(h)}, {len(board.seats[m])} other hosts have it"
            self.made.append(CapacityDecision(Action.DROP, reason, model.model, name))

    def _may_get(self, m: int, kinds: Sequence[str]) -> bool:
        """Whether a host that the model may be on has one of the kinds of seats that it lacks."""
        board, allowed = self.board, self.view.models[m].allowed
        if not board.seats[m] or allowed is None:
            return bool(kinds)
        may = board.is_up & np.fromiter((host.host in allowed for host in self.view.hosts), bool, len(self.view.hosts))
        return any((may & (board.decode if kind == "decode" else board.entry)).any() for kind in kinds)

    def _why_not_there(self, h: int) -> str:
        host = self.view.hosts[h]
        return f"{host.host} is draining" if host.state is HostState.DRAINING else f"it may not be on {host.host}"

    # -- seats that are worth it -----------------------------------------------------------------------

    def _relieve(self) -> None:
        """Move or replicate models of hosts with too much to do."""
        board = self.board
        loads = board.loads.tolist()
        over = [int(h) for h in np.flatnonzero(board.is_up & (board.loads > board.limit))]
        over.sort(key=lambda h: (-board.lost(loads[h], float(board.tokens[h])), h))
        calm = [int(h) for h in np.argsort(board.loads, kind="stable") if board.is_up[h] and loads[h] < board.full]
        targets = calm[:_NUM_TARGETS]
        budget = _MAX_LOOKS
        for h in over:
            for _ in range(_CHANGES_PER_HOST):
                if not self._has_room or budget <= 0 or not targets or board.load(h) <= board.full:
                    break
                tried = self._movable(h)
                budget -= sum([len(board.seats[m]) + 1 for m in tried])
                if not self._relieve_once(h, tried, targets):
                    break
                targets.sort(key=lambda g: (board.load(g), g))

    def _movable(self, h: int) -> list[int]:
        """Models of a host that may move, those with the most work first."""
        board, models = self.board, self.view.models
        found = [
            m
            for m in board.on_host[h]
            if not models[m].pinned
            and (models[m].since_move_s >= self.settings.settle_s)
            and board.tokens_per_s[m] > 0
            and not board.fades[m]
        ]
        found.sort(key=lambda m: (-board.n[m] / len(board.seats[m]), m))
        return found[:_MODELS_PER_HOST]

    def _relieve_once(self, h: int, models: Iterable[int], targets: list[int]) -> bool:
        board, settings = self.board, self.settings
        best = None
        for m in models:
            g = self._target(m, h, targets)
            if g is None:
                continue
            seats = board.seats[m]
            options = []
            if all(board.loads[s] > settings.target_load for s in seats):  # else the router can relieve the host
                options.append((Action.MOVE, [*(s for s in seats if s != h), g]))
            part = board.share_of(m, h)
            if len(seats) < self._limit(m) and part >= settings.min_split:
                options.append((Action.REPLICATE, [*seats, g]))
            copy_s = self.view.models[m].weight_bytes / self.view.hosts[g].load_bytes_per_s
            for action, after in options:
                gain = board.gain(m, after)
                if gain <= 0 or gain < settings.min_gain_frac * board.tokens[h]:
                    continue
                limit = settings.target_load
                if action is Action.REPLICATE and part > limit:  # a model may be too much for two hosts as well
                    limit = max(limit, board.load(h))
                if board.loads_after(m, after)[g] + board.doubt[g] > limit:
                    continue
                net = gain * (settings.horizon_s - copy_s) - copy_s * settings.copy_drag * board.tokens[g]
                if net > 0 and (best is None or net * _NEAR_FRAC > best[0]):
                    best = net, action, m, g, after, gain
        if best is None:
            return False
        _, action, m, g, after, gain = best
        self._add(action, m, g, self._why(m, h, g), after=after, source=h, gain=gain)
        return True

    def _target(self, m: int, h: int, targets: list[int]) -> int | None:
        """The least loaded host that can take a seat of the model in the place of `h` or beside it."""
        board, model = self.board, self.view.models[m]
        for g in targets:
            if (
                g not in board.taken[m]
                and board.may_be_on(m, g)
                and board.free_bytes[g] >= model.weight_bytes
                and board.device_bytes[g] >= model.weight_bytes + model.min_kv_bytes
                and board.num_copies[g] < self.settings.max_copies
                and (board.entry[g] or not board.entry[h])
                and (board.decode[g] or not board.decode[h])
            ):
                return g
        return None

    def _why(self, m: int, h: int, g: int) -> str:
        view, board = self.view, self.board
        seat = next((s for s in view.hosts[h].seats if s.model == view.models[m].model), None)
        on_time = f"{100 * seat.on_time_frac:.0f} % on time on" if seat is not None else "on"
        idle = max(0.0, 1 - board.load(g))
        return f"{on_time} {view.hosts[h].host} (load {board.load(h):.2f}), {view.hosts[g].host} has {idle:.0%} idle"

    def _drop(self) -> None:
        """Give up seats that the others make up for, after a quiet spell."""
        board, models, settings = self.board, self.view.models, self.settings
        changed = {decision.model for decision in self.made}
        for m, seats in enumerate(board.seats):
            if not self._has_room:
                return
            model = models[m]
            if len(seats) <= max(1, model.min_replicas) or model.pinned or model.model in changed:
                continue
            if model.since_move_s < settings.quiet_s or board.rise[m] > 1:
                continue
            # The busiest host first; with roles, the busiest that leaves enough of both kinds.
            for h in sorted(seats, key=lambda h: (-board.loads[h], h)):
                after = [s for s in seats if s != h]
                if self._enough(m, after):
                    worst = max(board.loads_after(m, after).values())
                    if worst < settings.drop_load:
                        name, count = self.view.hosts[h].host, len(seats)
                        reason = f"{model.model}: the other {count - 1} of {count} hosts need {worst:.0%} of their time"
                        self.made.append(CapacityDecision(Action.DROP, reason, model.model, name))
                        board.set_seats(m, after)
                    break

    def _enough(self, m: int, seats: list[int]) -> bool:
        return min(self.board.kinds(seats)) >= max(1, self.view.models[m].min_replicas)

    def _add(
        self,
        action: Action,
        m: int,
        h: int,
        why: str,
        *,
        after: list[int],
        source: int | None = None,
        gain: float = 0.0,
    ) -> None:
        model, hosts = self.view.models[m], self.view.hosts
        copied = model.weight_bytes
        reason = f"{model.model}: {why}; copies {copied / 2**30:.3g} GiB once"
        from_host = None if source is None else hosts[source].host
        made = CapacityDecision(
            action, reason, model.model, from_host, hosts[h].host, copy_bytes=copied, gain_tokens_per_s=gain
        )
        self.made.append(made)
        self.board.set_seats(m, after)
