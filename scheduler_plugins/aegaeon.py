# SPDX-License-Identifier: Apache-2.0
"""Aegaeon's two schedulers on one device: grouped first-come prefill and weighted round robin decode."""

from __future__ import annotations

import math

from tokenpool.errors import check_setting
from tokenpool.policy.turns import Decision, ModelView, Phase, PoolView


class _Group:
    """Prefills of one model that run without a switch between them."""

    __slots__ = ("model", "size", "left")

    def __init__(self, model: str) -> None:
        self.model = model
        self.size = 0  # requests ever put in: does not fall while the group executes
        self.left = 0


class Aegaeon:
    """A `TurnPolicy` after Aegaeon (SOSP'25, sections 4.2 and 4.3): the token-level baseline.

    Prefill. A waiting request joins the first group of its model that has taken fewer than `group_size` requests,
    else a new group at the tail. Groups execute in order. The size counts all requests ever put into a group, so a
    busy model cannot hold the front for ever.

    Decode. In a round each model with running requests has one turn of q_i seconds:

        n_i   = tpot_i / step_i                                   steps that fit between two dues
        c     = sum of the switch times of the round
        alpha = max(c / (min n * quota_max_s) + sum 1/n_k, 0.5)   round time over playback time gained
        q_i   = c / (n_i * (alpha - sum 1/n_k))

    so that each turn buys every model the same seconds of playback. With c = 0 (all resident) the quotient says
    nothing and q_i is its bound quota_max_s * min n / n_i. A model whose first request came after the round began waits
    for the next round. Without an SLO, n_i uses `default_tpot_s`.

    What is ours. The paper gives prefill and decode devices of their own. On one device the groups go first, between
    decode turns; they may take at most quota_max_s in a row, then a decode turn follows, so neither starves. Decode
    turns admit no prefill. While a group or turn runs, the model of the next one is prefetched, as in the paper.
    Executed prefills are counted from the queue lengths that the policy sees: at least one for each change of the
    oldest waiting request, which can close a group late by the requests admitted in the same step, never keep it open.

    `join` = 1 departs from the paper: decode turns admit what waits for their model, and groups are formed only for
    models with nothing to decode. On one device that saves most switches for prefills; with it, a quota_max_s near 0.5
    suits first tokens due in seconds better than the paper's 4.
    """

    def __init__(
        self,
        *,
        group_size: int = 8,
        quota_max_s: float = 4.0,
        default_tpot_s: float = 0.1,
        min_alpha: float = 0.5,
        join: int = 0,
    ) -> None:
        check_setting(group_size >= 1, "group_size", "must be 1 or more")
        check_setting(quota_max_s > 0, "quota_max_s", "must be above 0")
        check_setting(default_tpot_s > 0, "default_tpot_s", "must be above 0")
        check_setting(min_alpha > 0, "min_alpha", "must be above 0")
        check_setting(join in (0, 1), "join", "must be 0 or 1")
        self._join = bool(join)
        self._group_size = group_size
        self._quota_max_s = quota_max_s
        self._default_tpot_s = default_tpot_s
        self._min_alpha = min_alpha
        self._groups: list[_Group] = []
        self._oldest: dict[str, float] = {}  # arrival of the oldest waiting request at the last decision
        self._round: list[str] = []  # models whose decode turn is still to come; the first has it
        self._quotas_s: dict[str, float] = {}
        self._in_turn = False
        self._turn_ends_s = 0.0
        self._prefill_since_s: float | None = None
        self._ran_prefill: str | None = None

    def decide(self, pool: PoolView) -> Decision:
        """Go on with the present turn or group until its quota is used, then take the next."""
        views = {view.model: view for view in pool.models}
        self._regroup(views)
        if self._in_turn:
            view = views.get(self._round[0])
            if view is None or not view.num_running or pool.now_s >= self._turn_ends_s:
                self._in_turn = False
                del self._round[0]
        if not self._in_turn and self._groups and not self._prefilled_enough(views, pool.now_s):
            if self._prefill_since_s is None:
                # The wait for weights is no prefill time.
                self._prefill_since_s = pool.now_s + views[self._groups[0].model].ready_in_s
            name = self._ran_prefill = self._groups[0].model
            return Decision(name, Phase.MIXED if self._join else Phase.PREFILL, self._prefetch(pool, views, name))
        self._ran_prefill = None
        if not self._in_turn and not any(view.num_running for view in pool.models):
            return Decision(pool.models[0].model)  # only finished requests to clear away
        if not self._in_turn:
            self._begin_turn(views, pool.now_s)
        name = self._round[0]
        hold_s = max(0.0, self._turn_ends_s - pool.now_s)
        phase = Phase.MIXED if self._join else Phase.DECODE
        return Decision(name, phase, self._prefetch(pool, views, name), hold_s=hold_s)

    # -- prefill -------------------------------------------------------------------------------------

    def _regroup(self, views: dict[str, ModelView]) -> None:
        """Bring the groups up to what waits: new requests join, then executed and aborted ones leave."""
        left = self._left()
        gone = {}
        for name, known in left.items():
            view = views.get(name)
            gone[name] = max(0, known - (self._num_waiting(view) if view else 0))
            if view and name == self._ran_prefill and not gone[name] and view.arrival_s != self._oldest.get(name):
                gone[name] = 1  # as many came as were executed
        come = {name: self._num_waiting(v) - left.get(name, 0) + gone.get(name, 0) for name, v in views.items()}
        grown = [view for view in views.values() if come[view.model]]
        for view in sorted(grown, key=lambda view: (view.arrival_s, view.index)):
            for _ in range(come[view.model]):
                self._put(view.model)
        for group in self._groups:
            taken = min(gone.get(group.model, 0), group.left)
            if taken:
                group.left -= taken
                gone[group.model] -= taken
        self._groups = [group for group in self._groups if group.left]
        self._oldest = {name: view.arrival_s for name, view in views.items()}

    def _left(self) -> dict[str, int]:
        """Requests in groups that are still to be executed, by model."""
        left: dict[str, int] = {}
        for group in self._groups:
            left[group.model] = left.get(group.model, 0) + group.left
        return left

    def _num_waiting(self, view: ModelView) -> int:
        """Requests for groups."""
        return 0 if self._join and view.num_running else view.num_waiting

    def _put(self, model: str) -> None:
        for group in self._groups:
            if group.model == model and group.size < self._group_size:
                break
        else:
            group = _Group(model)
            self._groups.append(group)
        group.size += 1
        group.left += 1

    def _prefilled_enough(self, views: dict[str, ModelView], now_s: float) -> bool:
        """Whether a decode turn is due: prefills took their share, and something decodes."""
        if self._prefill_since_s is None or now_s - self._prefill_since_s < self._quota_max_s:
            return False
        return any(view.num_running for view in views.values())

    # -- decode --------------------------------------------------------------------------------------

    def _begin_turn(self, views: dict[str, ModelView], now_s: float) -> None:
        self._prefill_since_s = None
        self._round = [name for name in self._round if name in views and views[name].num_running]
        if not self._round:
            decoding = [view for view in views.values() if view.num_running]
            self._round = [view.model for view in decoding]
            self._quotas_s = self._quotas(decoding)
        view = views[self._round[0]]
        self._in_turn = True
        # At least one step; the switch comes before the turn.
        self._turn_ends_s = now_s + view.ready_in_s + max(self._quotas_s[view.model], view.step_s / 2)

    def _quotas(self, decoding: list[ModelView]) -> dict[str, float]:
        steps = {v.model: self._steps_per_due(v) for v in decoding}
        least = min(steps.values())
        load = sum(1 / n for n in steps.values())
        switch_s = sum(v.ready_in_s for v in decoding)
        alpha = max(switch_s / (least * self._quota_max_s) + load, self._min_alpha)
        bounds_s = {name: self._quota_max_s * least / n for name, n in steps.items()}
        if switch_s <= 0 or alpha <= load:
            return bounds_s
        return {name: min(bounds_s[name], switch_s / (n * (alpha - load))) for name, n in steps.items()}

    def _steps_per_due(self, view: ModelView) -> float:
        tpot_s = view.tpot_s if view.tpot_s < math.inf else self._default_tpot_s
        return tpot_s / view.step_s if view.step_s > 0 else 1.0

    def _prefetch(self, pool: PoolView, views: dict[str, ModelView], running: str) -> str | None:
        """The model of the next group or turn, that of the next round included, if its weights are out."""
        if not pool.can_prefetch:
            return None
        for group in self._groups:
            if group.model != running:
                return group.model if views[group.model].ready_in_s > 0 else None
        coming = [name for name in self._round if name != running and name in views]
        coming += [name for name, view in views.items() if view.num_running]  # the next round
        if coming and coming[0] != running and views[coming[0]].ready_in_s > 0:
            return coming[0]
        return None
