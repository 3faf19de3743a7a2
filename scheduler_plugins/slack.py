# SPDX-License-Identifier: Apache-2.0
"""Deadline slack: the model whose tokens are due next runs, and weights come in behind the steps of others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from tokenpool.errors import check_setting
from tokenpool.policy.turns import Decision, ModelView, Phase, PoolView, Residency

_INF = math.inf
_OVERDUE, _URGENT, _REST, _GIVEN_UP = -1e9, 0.0, 1e9, 2e9
"""Offsets of the tiers in a rank: further apart than any slack or wait."""
_OVERDUE_BELOW, _URGENT_BELOW = -5e8, 5e8
_ON_DEVICE, _OUT = Residency.ON_DEVICE, (Residency.IN_HOST, Residency.ON_DISK)
_SELECT_EVERY_S = 0.1
"""Age at which the choice of who is given up is made anew."""
_SELECT_CALM_S, _CALM_FRAC = 0.5, 0.5
"""That age, where less than such a share of the horizon is taken up: nobody is given up then for a while."""
_EASE, _EASE_S = 0.1, 0.5
"""Share of the slack of the model that comes next that the present turn may last, and the most if that is urgent."""
_URGENT_ROUNDS, _URGENT_S = 3, 1.0
"""Tokens due within so many rounds of the pool, or so many seconds, are urgent."""
_FORGET_S = 60.0
"""Time constant with which it is forgotten that a model was given up."""
_LEAST_GAIN_FRAC = 0.1
"""Share of the horizon that counts as gain even of a model that cannot catch up in it."""
_SAFE_S, _SAFE_SLACK_S, _SAFE_WEIGHT = 30.0, 2.0, 1e3
"""A late model that is taken in again stays for so many seconds, or until it has so much slack: with such a weight."""


_new = tuple.__new__
"""Of a named tuple, in half the time: this is the innermost loop of a decision."""


class _Ranked(NamedTuple):
    rank: float
    """Seconds of slack, or less wait, plus the offset of the tier; the lowest comes first."""
    slack_s: float
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    view: ModelView


class Slack:
    """A `TurnPolicy` for several resident models: least slack first, no waiting for weights, losses cut early.

    Slack. Seconds that model i can wait until its next token comes late. Tokens ahead of schedule count: their
    requests' next due times lie far off. Requests that are lost (`policy.slo.lost_s`) have no due time.

        slack_i = min(first_due_i - prefill_i, next_due_i - step_i) - ready_in_i - now

    Tiers, the first with a model that can run decides:

        overdue   waited longer than max_wait_s. Longest wait first. These turns take at most `overdue_frac` of the
                  time, so k models wait at most about max_wait_s + k * turn / overdue_frac.
        urgent    slack_i < max(1 s, 3 * sum over models (min_turn_s + ready_in)). Least slack first.
        rest      without an SLO, or far ahead of schedule. Longest wait first, then least slack.
        given up  longest wait first.

    Giving up. Earliest deadline first makes everything late once there is too much to do. To keep model i on time over
    the next H = horizon_s costs, and yields at most,

        load_i = step_i / tpot_i
        cost_i = (H - slack_i) * load_i + ready_in_i + prefill_i                    seconds of the device
        gain_i = (running_i + waiting_i) / tpot_i
                 * (H - max(0, slack_i) - max(0, -slack_i) * load_i / (1 - load_i)) tokens on time

    where the last term is the time to catch up. If the costs exceed H, models are given up for now, lowest priority
    first and then lowest gain/cost, until they do not.

    All take their part. The gain of a model grows by the factor exp(g/2H), where g counts the seconds in which it was
    given up lately, and it gathers requests: so it is taken in again, and others have their turn to wait. A late model
    that is taken in stays until it has caught up, or for 30 s: else its copy would be for nothing.

    Copies. Only resident models run; of the others the first in rank is prefetched if a resident one ranks behind it,
    and that one is offered for eviction. Waiting for weights would leave the device idle without making the copy
    faster. Copies take at most `copy_frac` of the time. Where nothing can be prefetched, a switch that must be waited
    for comes only after a turn of ready_in / overhead_frac, unless the present model has no work left.

    Drag. A device that copies by itself does not slow its steps; where steps and copies share cores, they take
    1 + drag times as long. A copy of c seconds is then followed by no other for c * drag / overhead_frac, and the turn
    that it was for lasts as long.

    Turns last at least min_turn_s, and a tenth of the slack of an urgent model that comes next: each change costs time,
    and requests gather meanwhile. A step is PREFILL if a first token must come before anything else of its model,
    DECODE if admitting the waiting would make a running token late, else MIXED.

    Source: own. The parts are known: least slack first and moments of overload from real-time scheduling, choice by
    gain per cost from the knapsack problem.
    """

    def __init__(
        self,
        *,
        min_turn_s: float = 0.05,
        overhead_frac: float = 0.25,
        copy_frac: float = 0.8,
        horizon_s: float = 15.0,
        max_wait_s: float = 30.0,
        overdue_frac: float = 0.1,
    ) -> None:
        check_setting(min_turn_s >= 0, "min_turn_s", "must be 0 or more")
        check_setting(horizon_s > 0, "horizon_s", "must be above 0")
        check_setting(max_wait_s > 0, "max_wait_s", "must be above 0")
        fractions = dict(overhead_frac=overhead_frac, copy_frac=copy_frac, overdue_frac=overdue_frac)
        for key, value in fractions.items():
            check_setting(0 < value <= 1, key, "must be above 0 and at most 1")
        self._min_turn_s = min_turn_s
        self._overhead_frac = overhead_frac
        self._copy_frac = copy_frac
        self._horizon_s = horizon_s
        self._max_wait_s = max_wait_s
        self._overdue_frac = overdue_frac
        self._since_s: dict[str, float] = {}  # when each model with work stepped last, or got work
        self._now_s = -_INF
        self._overload = _Overload(horizon_s)
        self._select_at_s = -_INF
        self._next_copy_s = -_INF
        self._next_overdue_s = -_INF
        self._copied_s: dict[str, float] = {}  # what bringing in a model took that has not had a turn since
        self._turn_s = min_turn_s

    def decide(self, pool: PoolView) -> Decision:
        """Rank the models; run the first that can run, bring in the first that cannot."""
        now_s = pool.now_s
        self._note_waits(pool)
        if now_s >= self._select_at_s:
            calm = self._overload.select(pool.models, now_s) < _CALM_FRAC * self._horizon_s
            self._select_at_s = now_s + (_SELECT_CALM_S if calm else _SELECT_EVERY_S)
        ranked = self._ranked(pool.models, now_s)
        ready: list[_Ranked] = []
        out: _Ranked | None = None
        for item in ranked:
            residency = item.view.residency
            if residency is _ON_DEVICE:
                ready.append(item)
            elif out is None and residency in _OUT:
                out = item
        run = self._choose(pool, ranked, ready, out)
        if run.view.model != pool.current:
            self._begin_turn(run, now_s, pool.copy_drag)
        spare = None
        if ready:
            spare = ready[-1] if ready[-1] is not run else ready[-2] if len(ready) > 1 else None
        prefetch = None
        may_copy = pool.can_prefetch and now_s >= self._next_copy_s
        if may_copy and out is not None and out is not run and (spare is None or out.rank < spare.rank):
            prefetch, copy_s = out.view.model, out.view.ready_in_s
            self._copied_s[prefetch] = copy_s
            self._next_copy_s = now_s + copy_s * max(1 / self._copy_frac, pool.copy_drag / self._overhead_frac)
        makes_room = prefetch is not None or run.view.residency is not _ON_DEVICE
        evict = spare.view.model if spare is not None and makes_room else None
        hold_s = self._hold_s(pool, ranked, run) if prefetch is None else 0.0
        return Decision(run.view.model, _phase(run.view, now_s), prefetch, evict, hold_s)

    def _hold_s(self, pool: PoolView, ranked: list[_Ranked], run: _Ranked) -> float:
        """Seconds in which the ranks that decide do not change: up to the next look for overload, at most."""
        now_s, view = pool.now_s, run.view
        until_s = self._select_at_s
        if self._next_copy_s > now_s:
            until_s = min(until_s, self._next_copy_s)
        turn_started_s = pool.turn_started_s if view.model == pool.current else now_s
        rival = ranked[0] if ranked[0] is not run else ranked[1] if len(ranked) > 1 else None
        keeps_s = turn_started_s + self._turn_s - now_s
        if rival:  # its slack falls while the turn lasts
            keeps_s = max(keeps_s, (turn_started_s + self._ease_s(rival) - now_s) / (1 + _EASE))
        if ranked[0] is run and run.rank < _REST:
            # The slack of others falls as time passes; that of the one that runs grows by tpot for each step.
            gap_s = rival.rank - run.rank if rival else _INF
            speed = view.tpot_s / view.step_s if 0 < view.step_s < view.tpot_s < _INF else 1.0
            keeps_s = max(keeps_s, gap_s / speed)
        return max(0.0, min(until_s - now_s, keeps_s))

    def _note_waits(self, pool: PoolView) -> None:
        if pool.now_s < self._now_s:  # the host's clock was set back: waits and pauses begin again
            self._since_s = {}
            self._overload = _Overload(self._horizon_s)
            self._select_at_s = self._next_copy_s = self._next_overdue_s = -_INF
        self._now_s = pool.now_s
        since_s, now_s = self._since_s, pool.now_s
        for view in pool.models:
            if view.model not in since_s:
                since_s[view.model] = now_s
        if pool.current in since_s:
            since_s[pool.current] = now_s
        if len(since_s) > len(pool.models):  # a model has no work any more: its next wait starts anew
            self._since_s = {view.model: since_s[view.model] for view in pool.models}

    def _ranked(self, models: Sequence[ModelView], now_s: float) -> list[_Ranked]:
        urgent_s = max(_URGENT_S, _URGENT_ROUNDS * sum([self._min_turn_s + view.ready_in_s for view in models]))
        overdue_s = self._max_wait_s if now_s >= self._next_overdue_s else _INF
        ranked, given_up, since_s = [], self._overload.given_up, self._since_s
        for view in models:
            model, ready_in_s = view.model, view.ready_in_s
            wait_s = now_s - since_s[model]
            first_s, next_s = view.first_due_s - view.prefill_s, view.next_due_s - view.step_s  # as in `_slack_s`
            slack_s = (first_s if first_s < next_s else next_s) - ready_in_s - now_s
            if wait_s + ready_in_s > overdue_s:
                rank = _OVERDUE - wait_s
            elif model in given_up:
                rank = _GIVEN_UP - wait_s
            elif slack_s < urgent_s:
                rank = _URGENT + slack_s
            else:
                rank = _REST - wait_s
            ranked.append(_new(_Ranked, (rank, slack_s, view.index, view)))
        ranked.sort()
        return ranked

    def _choose(self, pool: PoolView, ranked: list[_Ranked], ready: list[_Ranked], out: _Ranked | None) -> _Ranked:
        mine, current = None, pool.current
        for item in ready:
            if item.view.model == current:
                mine = item
                break
        if mine is None:
            return ready[0] if ready else min(ranked, key=_soonest)
        if ready[0].rank < mine.rank:
            other = ready[0]
        elif out is not None and out.rank < mine.rank and not self._comes_by_prefetch(pool, ranked, out):
            other = out
        else:
            return mine
        hold_s = max(self._turn_s, other.view.ready_in_s / self._overhead_frac, self._ease_s(other))
        return other if pool.now_s - pool.turn_started_s >= hold_s else mine

    def _ease_s(self, other: _Ranked) -> float:
        """Least turn before `other`, if it is urgent and not late, or far ahead and its work has just come."""
        if _OVERDUE_BELOW < other.rank < _URGENT_BELOW:
            return max(0.0, min(_EASE * other.slack_s, _EASE_S))
        has_just_come = _REST <= other.rank < _GIVEN_UP - 1e8  # no wait yet
        return _EASE * min(other.slack_s, self._horizon_s) if has_just_come else 0.0

    def _comes_by_prefetch(self, pool: PoolView, ranked: list[_Ranked], out: _Ranked) -> bool:
        if any(item.view.residency is Residency.COPYING for item in ranked):
            return True
        # The host may refuse every prefetch, for want of pages: nobody waits for that for ever.
        return pool.can_prefetch and _OVERDUE - out.rank < 2 * self._max_wait_s

    def _begin_turn(self, run: _Ranked, now_s: float, copy_drag: float) -> None:
        copied_s = max(self._copied_s.pop(run.view.model, 0.0), run.view.ready_in_s)
        # Where copies slow the steps beside them, a turn must be worth its copy.
        self._turn_s = max(self._min_turn_s, copied_s * copy_drag / self._overhead_frac)
        if run.rank < _OVERDUE_BELOW:
            self._turn_s = max(self._turn_s, copied_s)  # worth its copy, whoever is urgent
            self._next_overdue_s = now_s + self._turn_s / self._overdue_frac


def _soonest(item: _Ranked) -> tuple[bool, float, float]:
    """Order in which to wait for a model when none can run: overdue ones, then by time to a tenth of a second."""
    return item.rank >= _OVERDUE_BELOW, round(item.view.ready_in_s, 1), item.rank


def _slack_s(view: ModelView, now_s: float) -> float:
    first_s = view.first_due_s - view.prefill_s
    next_s = view.next_due_s - view.step_s
    return (first_s if first_s < next_s else next_s) - view.ready_in_s - now_s


def _phase(view: ModelView, now_s: float) -> Phase:
    if not (view.num_waiting and view.num_running):
        return Phase.MIXED
    first_s = view.first_due_s - view.prefill_s - now_s
    next_s = view.next_due_s - view.step_s - now_s
    # Requests that are late anyway hold up nobody.
    if 0 <= next_s < view.prefill_s and next_s < first_s:
        return Phase.DECODE
    if 0 <= first_s < view.step_s and first_s < next_s:
        return Phase.PREFILL
    return Phase.MIXED


class _Overload:
    """Which models are left aside so that the others can be kept on time; see `Slack`."""

    def __init__(self, horizon_s: float) -> None:
        self.given_up: frozenset[str] = frozenset()
        """None, unless there is too much to do."""
        self._horizon_s, self._at_s = horizon_s, -_INF
        self._left_s: dict[str, float] = {}  # seconds in which each was given up, the older the less
        self._safe_until_s: dict[str, float] = {}  # late models that were taken in again

    def select(self, models: Sequence[ModelView], now_s: float) -> float:
        """Choose anew; returns the seconds that all models need within the horizon."""
        horizon_s = self._horizon_s
        needed_s = 0.0
        offers = []
        for view in models:
            slack_s = _slack_s(view, now_s)
            if slack_s < horizon_s:  # not those without an SLO
                cost_s = (horizon_s - slack_s) * _load(view) + view.ready_in_s + view.prefill_s
                offers.append((view, slack_s, cost_s))
                needed_s += cost_s
        before, self.given_up = self.given_up, frozenset()
        if before or needed_s > horizon_s:
            self._count(before, now_s)
            self.given_up = self._chosen(offers, needed_s)
            self._keep_safe(offers, before, now_s)
        elif self._left_s or self._safe_until_s:
            self._left_s, self._safe_until_s = {}, {}
        self._at_s = now_s
        return needed_s

    def _chosen(self, offers: list[tuple[ModelView, float, float]], needed_s: float) -> frozenset[str]:
        given_up, left_s = [], needed_s
        for _, _, _, cost_s, model in sorted([self._order(*offer) for offer in offers]):
            if left_s <= self._horizon_s:
                break
            left_s -= cost_s
            given_up.append(model)
        return frozenset(given_up)

    def _order(self, view: ModelView, slack_s: float, cost_s: float) -> tuple[int, float, int, float, str]:
        """The model that sorts first is given up first."""
        horizon_s, load = self._horizon_s, _load(view)
        on_time_s = horizon_s - slack_s if slack_s > 0 else horizon_s + slack_s * load / (1 - load)
        least_s = _LEAST_GAIN_FRAC * horizon_s
        gain = (view.num_running + view.num_waiting) * (on_time_s if on_time_s > least_s else least_s) / view.tpot_s
        weight = math.exp(self._left_s.get(view.model, 0.0) / (2 * horizon_s))
        if view.model in self._safe_until_s:
            weight *= _SAFE_WEIGHT
        return view.priority, gain * weight / (cost_s or 1e-9), -view.index, cost_s, view.model

    def _count(self, given_up: frozenset[str], now_s: float) -> None:
        """The models were given up since the last choice."""
        passed_s = min(now_s - self._at_s, 1.0)
        kept = math.exp(-passed_s / _FORGET_S)
        left_s = {model: value * kept for model, value in self._left_s.items() if value > 0.01}
        for model in given_up:
            left_s[model] = left_s.get(model, 0.0) + passed_s
        self._left_s = left_s

    def _keep_safe(self, offers: list[tuple[ModelView, float, float]], before: frozenset[str], now_s: float) -> None:
        safe, given_up, kept = self._safe_until_s, self.given_up, {}
        for view, slack_s, _ in offers:
            model = view.model
            if model in given_up:
                continue
            if model in safe:
                if slack_s <= _SAFE_SLACK_S and now_s <= safe[model]:
                    kept[model] = safe[model]
            elif model in before and slack_s < 0:
                kept[model] = now_s + _SAFE_S
        self._safe_until_s = kept


def _load(view: ModelView) -> float:
    load = view.step_s / view.tpot_s
    return load if load < 0.99 else 0.99
