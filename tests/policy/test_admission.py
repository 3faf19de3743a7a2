# SPDX-License-Identifier: Apache-2.0
"""Admission refuses for two reasons only: the model's own queue is full, or the pool would be late."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpool.errors import ConfigError
from tokenpool.policy.admission import AdmissionLimits, AdmissionMode, AdmissionPolicy, Admit, Reject, first_token_in_s
from tokenpool.policy.cost_model import CostModel
from tokenpool.policy.turns import ModelView, PoolView, Residency

pytestmark = pytest.mark.cpu

COST = CostModel(prefill_s=0.0, prefill_per_token_s=1e-3)
IDLE = ModelView("m", 0, ttft_s=2.0, tpot_s=0.1)


def busy(name: str, lead_s: float, load: float, **fields: float) -> ModelView:
    return ModelView(
        name, 1, num_running=1, next_due_s=100 + lead_s, ttft_s=2.0, tpot_s=0.1, step_s=0.1 * load, **fields
    )


def pool(*views: ModelView) -> PoolView:
    return PoolView(100.0, None, views)


def test_an_empty_pool_admits_at_the_price_of_the_prefill():
    """Nothing else waits: the wait is bringing the model in and its own prefill."""
    assert Admit(0.5) == AdmissionPolicy().decide(IDLE, 500, pool(), COST)
    out = IDLE._replace(residency=Residency.IN_HOST, ready_in_s=0.4, prefill_s=0.1, num_waiting=1)
    assert pytest.approx(1.0) == first_token_in_s(out, 500, pool(out), COST)


def test_running_work_stretches_the_wait():
    """A model that needs half the device from now on doubles it; one that is ahead only from its due time on."""
    assert pytest.approx(1.0) == first_token_in_s(IDLE, 500, pool(busy("a", 0.0, 0.5)), COST)
    assert pytest.approx(0.5) == first_token_in_s(IDLE, 500, pool(busy("a", 3.0, 0.5)), COST)
    assert pytest.approx(0.6) == first_token_in_s(IDLE, 500, pool(busy("a", 0.4, 0.5)), COST)
    assert pytest.approx(0.8) == first_token_in_s(IDLE, 500, pool(busy("a", 9.0, 0.5, prefill_s=0.3)), COST)
    assert math.inf == first_token_in_s(IDLE, 500, pool(busy("a", 0.0, 0.6), busy("b", 0.1, 0.5)), COST)
    assert pytest.approx(0.5) == first_token_in_s(IDLE, 500, pool(busy("a", 5.0, 0.9), busy("b", 5.0, 0.9)), COST)


def test_a_full_queue_is_429():
    """The bounds are the model's own; the other models and the mode do not matter."""
    policy = AdmissionPolicy({"m": AdmissionLimits(max_waiting=2, max_waiting_tokens=1000)})
    view = IDLE._replace(num_waiting=2, waiting_tokens=100)
    answer = policy.decide(view, 10, pool(view), COST)
    assert isinstance(answer, Reject) and (429, 1) == (answer.status, answer.retry_after_s)
    answer = policy.decide(IDLE._replace(num_waiting=1, waiting_tokens=900), 200, pool(), COST)
    assert isinstance(answer, Reject) and 429 == answer.status and "1100 prompt tokens" in answer.reason
    assert isinstance(policy.decide(IDLE, 5000, pool(), COST), Admit)  # an empty queue takes any size
    assert isinstance(policy.decide(view._replace(model="other"), 10, pool(), COST), Admit)


def test_a_predicted_miss_is_503_only_where_asked_for():
    """`reject` refuses what would be late, `queue` lets it wait."""
    late = pool(busy("a", 0.0, 0.875))  # 0.5 s of prefill take 4 s
    assert 4.0 == AdmissionPolicy().decide(IDLE, 500, late, COST).first_token_in_s
    strict = AdmissionPolicy(default=AdmissionLimits(mode=AdmissionMode.REJECT))
    answer = strict.decide(IDLE, 500, late, COST)
    assert isinstance(answer, Reject) and (503, 2) == (answer.status, answer.retry_after_s)
    answer = strict.decide(IDLE, 500, pool(busy("a", 0.0, 1.0)), COST)
    assert isinstance(answer, Reject) and (503, 60) == (answer.status, answer.retry_after_s)
    assert isinstance(strict.decide(IDLE._replace(ttft_s=math.inf), 500, late, COST), Admit)


def test_limits_are_checked():
    """A bound of 0 would close the model."""
    with pytest.raises(ConfigError, match="max_waiting: must be 1 or more"):
        AdmissionLimits(max_waiting=0)


@settings(deadline=None)
@given(
    others=st.lists(st.tuples(st.floats(-5, 20), st.floats(0, 1.5), st.floats(0, 2)), max_size=6),
    tokens=st.integers(1, 5000),
)
def test_the_predicted_wait_solves_its_equation(others, tokens):
    """The answer is the least solution: work done until then equals the time until then."""
    views = [busy(f"o{i}", lead, load, prefill_s=prefill) for i, (lead, load, prefill) in enumerate(others)]
    wait_s = first_token_in_s(IDLE, tokens, pool(*views), COST)

    def work_s(w: float) -> float:
        owed = sum(p + max(0.0, w - max(0.0, lead)) * load for lead, load, p in others)
        return tokens * 1e-3 + owed

    if wait_s == math.inf:
        assert all(work_s(w) > w for w in (0.1, 1.0, 10.0, 100.0, 1000.0))
    else:
        assert pytest.approx(wait_s, rel=1e-6, abs=1e-6) == work_s(wait_s)
