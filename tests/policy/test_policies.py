# SPDX-License-Identifier: Apache-2.0
"""What each policy decides in cases small enough to work out by hand."""

from __future__ import annotations

import math

import pytest

from tokenpool.policy.turns import Decision, ModelView, Phase, PoolView, Residency
from tokenpool.scheduler_plugins.aegaeon import Aegaeon
from tokenpool.scheduler_plugins.request_level import RequestLevel
from tokenpool.scheduler_plugins.round_robin import RoundRobin
from tokenpool.scheduler_plugins.slack import Slack

pytestmark = pytest.mark.cpu

WARM = dict(residency=Residency.IN_HOST, ready_in_s=0.5)


def running(name: str, index: int, next_due_s: float = math.inf, **fields: object) -> ModelView:
    """A model with one decoding request; 10 ms a step of 100."""
    tpot_s = 0.1 if next_due_s < math.inf else math.inf
    values = dict(num_running=1, next_due_s=next_due_s, tpot_s=tpot_s, step_s=0.01) | fields
    return ModelView(name, index, **values)


def waiting(name: str, index: int, arrival_s: float, count: int = 1, **fields: object) -> ModelView:
    """A model with requests that wait, due 10 s after their arrival; 50 ms of prefill."""
    values = dict(first_due_s=arrival_s + 10, ttft_s=10.0, tpot_s=0.1, step_s=0.01, prefill_s=0.05) | fields
    return ModelView(name, index, num_waiting=count, arrival_s=arrival_s, **values)


def pool(now_s: float, current: str | None, *views: ModelView, started_s: float = -10.0, prefetch: bool = True):
    return PoolView(now_s, current, views, started_s, prefetch)


# -- round robin and request level -----------------------------------------------------------------------


def test_round_robin_goes_round_by_index():
    """Each model with work steps once a round; one that has left or comes back keeps its place."""
    policy = RoundRobin()
    a, b, c = (running(name, i) for i, name in enumerate("abc"))
    sets = [(a, b, c), (a, b, c), (a, c), (a, b, c), (a, b), (c,), (b,)]
    assert ["a", "b", "c", "a", "b", "c", "b"] == [policy.decide(pool(0.0, None, *views)).run for views in sets]


def test_request_level_stays_until_idle_then_takes_the_oldest():
    """The current model keeps the device with any work at all."""
    policy = RequestLevel()
    a, b, c = waiting("a", 0, 3.0), waiting("b", 1, 1.0), waiting("c", 2, 2.0)
    assert "b" == policy.decide(pool(5.0, None, a, b, c)).run
    assert "a" == policy.decide(pool(5.0, "a", a, b, c)).run
    assert Decision("c", hold_s=math.inf) == policy.decide(pool(5.0, "b", a, c))


# -- aegaeon ---------------------------------------------------------------------------------------------


def test_aegaeon_prefills_groups_in_order_of_arrival():
    """Groups go first; the next group's model is prefetched."""
    a, b = waiting("a", 0, 2.0, **WARM), waiting("b", 1, 1.0)
    assert Decision("b", Phase.PREFILL, "a") == Aegaeon().decide(pool(3.0, None, a, b))


def test_aegaeon_closes_a_group_after_eight_requests():
    """A model that gets a request for each one executed loses the front after eight."""
    policy = Aegaeon(group_size=8, quota_max_s=1e9)
    runs = []
    for i in range(10):  # at each step one of a's requests is executed and another comes
        runs.append(policy.decide(pool(100.0 + i, None, waiting("a", 0, float(i)), waiting("b", 1, 50.0))).run)
    assert ["a"] * 8 + ["b"] * 2 == runs


def test_aegaeon_quotas_follow_the_formula():
    """Two models, n = 10 and 5, one switch of 0.5 s: alpha is the floor, q = c / (n * (alpha - sum 1/n))."""
    policy = Aegaeon()
    views = [running("a", 0, 1.0), running("b", 1, 1.0, step_s=0.02, **WARM)]
    quotas = policy._quotas(views)
    assert pytest.approx({"a": 0.5 / (10 * 0.2), "b": 0.5 / (5 * 0.2)}) == quotas
    # At full load alpha is c / (min n * QMAX) + sum 1/n, and every quota is QMAX * min n / n.
    heavy = [running("a", 0, 1.0, step_s=0.05, **WARM), running("b", 1, 1.0, step_s=0.1)]
    assert pytest.approx({"a": 2.0, "b": 4.0}) == policy._quotas(heavy)
    # Nothing to switch: the bound.
    assert pytest.approx({"a": 2.0, "b": 4.0}) == policy._quotas([v._replace(ready_in_s=0.0) for v in views])


def test_aegaeon_gives_each_model_its_quota():
    """A turn lasts its quota, without admissions; then comes the next of the round, prefetched meanwhile."""
    policy = Aegaeon()
    a, b = running("a", 0, 1.0), running("b", 1, 1.0, step_s=0.02, **WARM)
    decision = policy.decide(pool(0.0, None, a, b))
    assert Decision("a", Phase.DECODE, "b", hold_s=pytest.approx(0.25)) == decision
    assert "a" == policy.decide(pool(0.24, "a", a, b)).run
    assert "b" == policy.decide(pool(0.26, "a", a, b)).run


def test_aegaeon_lets_prefills_starve_no_decode():
    """After quota_max_s of prefills a decode turn comes, however much waits."""
    policy = Aegaeon(quota_max_s=1.0)
    a = running("a", 0, 1.0)
    for i in range(20):
        decision = policy.decide(pool(0.1 * i, "b", a, waiting("b", 1, float(i), count=5)))
        assert ("b" if i < 10 else "a") == decision.run
        if decision.run == "a":
            break


# -- slack -----------------------------------------------------------------------------------------------


def test_slack_runs_what_is_due_first():
    """Least slack first: due time less what it takes, for first and further tokens alike."""
    views = [running("a", 0, 5.0), waiting("b", 1, -6.0), running("c", 2, 4.5)]  # b: 10 - 6 - 0.05
    assert "b" == Slack().decide(pool(0.0, None, *views)).run
    assert "c" == Slack().decide(pool(0.0, None, views[0], views[2])).run


def test_slack_keeps_a_turn_for_min_turn():
    """The current model goes on for min_turn_s, even if another is late."""
    policy = Slack(min_turn_s=0.1)
    a, b = running("a", 0, 5.0), running("b", 1, 0.0)
    assert "a" == policy.decide(pool(0.0, None, a)).run
    assert "a" == policy.decide(pool(0.09, "a", a, b, started_s=0.0)).run
    assert "b" == policy.decide(pool(0.11, "a", a, b, started_s=0.0)).run


def test_slack_keeps_a_turn_for_a_tenth_of_the_time_that_an_urgent_model_has():
    """It says for how long: at that time the other one runs, and not before."""
    policy, b, slow = Slack(), running("b", 1, 4.01), running("c", 2, **WARM | dict(ready_in_s=2.0))

    def decide(now_s: float, *, due_s: float = math.inf) -> Decision:
        a = running("a", 0, due_s)
        return policy.decide(pool(now_s, "a", a, b, slow, started_s=0.0, prefetch=False))

    for due_s in (5.0, math.inf):
        assert "a" == decide(0.2, due_s=due_s).run
        assert decide(0.2, due_s=due_s).hold_s <= 0.364 - 0.2
        assert "a" == decide(0.363, due_s=due_s).run  # 0.1 * (4 - 0.363) = 0.3637
        assert "b" == decide(0.365, due_s=due_s).run


def test_slack_never_waits_for_weights_that_can_be_prefetched():
    """What is due first but out is brought in behind the steps of what is in; the model due last makes room."""
    policy = Slack()
    a, b, c = running("a", 0, 2.0), running("b", 1, 1.0, **WARM), running("c", 2, 9.0)
    decision = policy.decide(pool(0.0, "a", a, b, c))
    assert ("a", "b", "c") == (decision.run, decision.prefetch, decision.evict)
    loading = b._replace(residency=Residency.COPYING)
    decision = policy.decide(pool(0.1, "a", a, loading, c, prefetch=False))
    assert ("a", None) == (decision.run, decision.prefetch)


def test_slack_prefetches_nothing_that_is_due_after_all_residents():
    """A copy must pay: pushing out what is needed sooner would not."""
    a, b, c = running("a", 0, 2.0), running("b", 1, 1.0), running("c", 2, 9.0, **WARM)
    assert Slack().decide(pool(0.0, "a", a, b, c)).prefetch is None


def test_slack_blocks_only_after_a_turn_that_is_worth_the_switch():
    """With no room for a second model, a switch of 0.5 s comes after 0.5 / overhead_frac seconds."""
    policy = Slack(overhead_frac=0.25)
    a, b = running("a", 0, 9.0), running("b", 1, 1.0, **WARM)
    assert "a" == policy.decide(pool(1.9, "a", a, b, started_s=0.0, prefetch=False)).run
    assert "b" == policy.decide(pool(2.1, "a", a, b, started_s=0.0, prefetch=False)).run
    # Without work the turn is over at once.
    assert "b" == policy.decide(pool(0.1, "a", b, started_s=0.0, prefetch=False)).run


def test_slack_gives_up_what_yields_least_in_an_overload():
    """Three models of 50 % load each: the one with the smallest batch is left aside, though it is due first."""
    half = dict(step_s=0.05)
    views = [
        running("a", 0, 1.0, num_running=4, **half),
        running("b", 1, 0.9, num_running=1, **half),
        running("c", 2, 1.1, num_running=4, **half),
    ]
    assert "a" == Slack().decide(pool(0.0, None, *views)).run
    assert "b" == Slack().decide(pool(0.0, None, *views[:2])).run  # two fit
    important = [view._replace(priority=int(view.model == "b")) for view in views]
    assert "b" == Slack().decide(pool(0.0, None, *important)).run


def test_slack_comes_back_to_what_it_gave_up():
    """Nobody waits much longer than max_wait_s, and such a turn is not the rule."""
    policy = Slack(max_wait_s=5.0, overdue_frac=0.1)
    half = dict(step_s=0.05)
    current, runs = None, []
    for i in range(400):  # 0.05 s each; a and c stay urgent, b hopeless
        now_s = 0.05 * i
        views = [
            running("a", 0, now_s + 0.3, num_running=4, **half),
            running("b", 1, -50.0, **half),
            running("c", 2, now_s + 0.4, num_running=4, **half),
        ]
        current = policy.decide(pool(now_s, current, *views)).run
        runs.append(current)
    turns_of_b = [i for i, run in enumerate(runs) if run == "b"]
    assert 3 <= len(turns_of_b) <= 40
    assert max(b - a for a, b in zip([0, *turns_of_b], turns_of_b, strict=False)) <= 110


def test_slack_gives_up_one_after_the_other():
    """Three models of 50 % load each: for a minute each of them is left aside in its turn."""
    policy = Slack(max_wait_s=1000.0)
    current, runs = None, []
    for i in range(600):
        now_s = 0.1 * i  # due first is what ran longest ago
        ages = [next((n for n, run in enumerate(reversed(runs)) if run == name), i) for name in "abc"]
        views = [
            running(name, k, now_s + 0.9 - 0.001 * ages[k], step_s=0.05, num_running=2 + (name == "a"))
            for k, name in enumerate("abc")
        ]
        current = policy.decide(pool(now_s, current, *views)).run
        runs.append(current)
    assert min(runs.count(name) for name in "abc") > 100


def test_slack_keeps_a_late_model_that_it_has_taken_in_again():
    """It may catch up, though by itself it yields least: else its weights came for nothing."""
    policy = Slack(max_wait_s=1000.0)
    half = dict(step_s=0.05)
    others = [running(name, k, 0.0, num_running=6, **half) for k, name in enumerate("ac")]
    current, runs = None, []
    for i in range(1200):
        now_s = 0.1 * i
        views = [view._replace(next_due_s=now_s + 0.3) for view in others]
        late = running("b", 2, now_s - 4.0, num_running=4, **half)
        current = policy.decide(pool(now_s, current, *views, late)).run
        runs.append(current)
    first = runs.index("b")
    assert 250 < runs[first : first + 300].count("b")


def test_slack_shares_the_rest_among_models_without_slo():
    """Nothing is due: the turns go round, longest wait first; a due token goes before them."""
    policy = Slack(min_turn_s=0.0)
    views = [running(name, i) for i, name in enumerate("abc")]
    current, runs = None, []
    for i in range(9):
        current = policy.decide(pool(0.1 * i, current, *views)).run
        runs.append(current)
    assert {"a": 3, "b": 3, "c": 3} == {name: runs.count(name) for name in "abc"}
    assert "d" == policy.decide(pool(1.0, "a", *views, running("d", 3, 1.05))).run


@pytest.mark.parametrize(
    ("first_due_s", "next_due_s", "phase"),
    [
        (9.0, 5.0, Phase.MIXED),  # time for both
        (9.0, 0.04, Phase.DECODE),  # the prefill of 50 ms would make a running token late
        (0.055, 5.0, Phase.PREFILL),  # the first token cannot wait for a step
        (-3.0, -2.0, Phase.MIXED),  # both are late: nothing to protect
        (-3.0, 0.04, Phase.MIXED),
    ],
)
def test_slack_splits_a_step_only_where_it_saves_a_token(first_due_s, next_due_s, phase):
    """Prefill and decode are apart when together one of them would be late."""
    view = running("a", 0, next_due_s, num_waiting=1, first_due_s=first_due_s, arrival_s=0.0, prefill_s=0.05)
    assert phase is Slack().decide(pool(0.0, "a", view)).phase


def test_slack_survives_a_clock_set_back():
    """Waits begin again; no pause lasts until the old time comes round."""
    policy = Slack()
    a, b = running("a", 0, math.inf), running("b", 1, math.inf, **WARM)
    assert "b" == policy.decide(pool(1e6, "a", a, b)).prefetch
    assert "b" == policy.decide(pool(1.0, "a", a, b)).prefetch
