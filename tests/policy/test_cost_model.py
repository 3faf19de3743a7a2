# SPDX-License-Identifier: Apache-2.0
"""The cost model learns what steps and copies take, whatever its prior, and never predicts nonsense."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpool.policy.cost_model import CopyKind, CopyModel, CostModel

pytestmark = pytest.mark.cpu

SECONDS = st.floats(0, 100, allow_nan=False)
COUNTS = st.integers(0, 100_000)


def test_a_prior_is_used_until_something_is_observed():
    """A new model predicts by its prior."""
    model = CostModel(step_s=0.01, step_per_request_s=1e-3, step_per_token_s=1e-6, prefill_s=0.02)
    assert pytest.approx(0.01 + 4e-3 + 1e-3) == model.predict_step(4, 1000)
    assert pytest.approx(0.02 + 100 * 3e-5) == model.predict_prefill(100)
    assert pytest.approx(0.015 + 100 * 3e-5) == model.predict_step(4, 1000, 100)
    assert {} == model.errors()
    named = {"step_s": 0.01, "step_per_request_s": 1e-3, "step_per_token_s": 1e-6, "prefill_s": 0.02}
    assert named | {"prefill_per_token_s": 3e-5} == model.coefficients()


@pytest.mark.parametrize("prior", [0.001, 0.01, 1.0])
def test_steps_are_learnt_from_any_prior(prior):
    """Some hundred steps teach the true coefficients well enough to predict other batches."""
    model, rng = CostModel(step_s=prior, prefill_s=prior), random.Random(1)
    for _ in range(400):
        batch, tokens = rng.randint(1, 64), rng.randint(16, 4096)
        context = batch * rng.randint(100, 2000)
        model.observe_step(batch, context, 0, (0.007 + 1e-4 * batch + 3e-8 * context) * rng.uniform(0.95, 1.05))
        model.observe_step(0, 0, tokens, (0.008 + 2e-5 * tokens) * rng.uniform(0.95, 1.05))
    for batch, context in ((1, 100), (32, 32_000), (64, 120_000)):
        assert pytest.approx(0.007 + 1e-4 * batch + 3e-8 * context, rel=0.1) == model.predict_step(batch, context)
    assert pytest.approx(0.008 + 2e-5 * 2048, rel=0.1) == model.predict_prefill(2048)
    assert model.errors()["decode"] < 0.1 and model.errors()["prefill"] < 0.1


def test_mixed_steps_teach_the_price_of_prompt_tokens():
    """What a mixed step takes beyond its decodes is put down to its prompt tokens."""
    model = CostModel(step_s=0.01, step_per_request_s=0.0, step_per_token_s=0.0, prefill_per_token_s=1e-6)
    for i in range(100):
        model.observe_step(4, 0, 500 + i, 0.01 + 5e-5 * (500 + i))
    assert pytest.approx(0.01 + 5e-5 * 1000, rel=0.05) == model.predict_step(4, 0, 1000)


def test_outliers_hardly_count():
    """A step in fifty that takes thirty times as long does not move the prediction by a tenth."""
    model = CostModel()
    for i in range(500):
        model.observe_step(8, 8000, 0, 0.3 if i % 50 == 49 else 0.01)
    assert pytest.approx(0.01, rel=0.1) == model.predict_step(8, 8000)


@pytest.mark.parametrize("factor", [0.1, 0.5, 3, 100])
def test_a_lasting_change_is_followed(factor):
    """After some dozens of steps at another speed, that speed is predicted."""
    model = CostModel()
    for _ in range(300):
        model.observe_step(8, 8000, 0, 0.01)
    for _ in range(40):
        model.observe_step(8, 8000, 0, 0.01 * factor)
    assert pytest.approx(0.01 * factor, rel=0.1) == model.predict_step(8, 8000)


def test_copies_have_latency_and_bandwidth_by_kind():
    """Each direction is learnt by itself; models that share the copies of a device share what they learn."""
    copies = CopyModel(latency_s=0.01, bytes_per_s=1e9)
    one, two = CostModel(copies=copies), CostModel(copies=copies)
    for i in range(1, 100):
        one.observe_copy(CopyKind.TO_DEVICE, i << 20, 1e-3 + (i << 20) / 50e9)
    assert pytest.approx(1e-3 + (64 << 20) / 50e9, rel=0.1) == two.predict_copy(CopyKind.TO_DEVICE, 64 << 20)
    assert pytest.approx(0.01 + 1.0) == two.predict_copy(CopyKind.TO_HOST, 10**9)
    assert 0.0 == two.predict_copy(CopyKind.TO_DEVICE, 0)
    assert {"to_device"} == set(two.errors())
    assert pytest.approx((0.01, 1e9)) == copies.coefficients()["to_host"]


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 64), COUNTS, COUNTS, SECONDS), max_size=40),
    batch=st.integers(0, 64),
    context=COUNTS,
    tokens=COUNTS,
    more=COUNTS,
)
def test_predictions_are_never_negative_and_grow_with_tokens(steps, batch, context, tokens, more):
    """Whatever was observed, more tokens never take less time."""
    model = CostModel()
    for step in steps:
        model.observe_step(*step)
        model.observe_copy(CopyKind.TO_HOST, step[1], step[3])
    assert 0 <= model.predict_step(batch, context, tokens) <= model.predict_step(batch, context + more, tokens)
    assert model.predict_step(batch, context, tokens) <= model.predict_step(batch, context, tokens + more)
    assert 0 <= model.predict_prefill(tokens) <= model.predict_prefill(tokens + more)
    assert 0 <= model.predict_copy(CopyKind.TO_HOST, tokens) <= model.predict_copy(CopyKind.TO_HOST, tokens + more)


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -math.inf])
def test_what_is_no_time_is_left_out(seconds, caplog):
    """A measurement that is not finite is logged and teaches nothing; where there is no other, the prior stays."""
    model, taught, untaught = CostModel(), CostModel(), CostModel()
    for i in range(40):
        model.observe_step(4, 1000, 0, seconds)
        model.observe_step(0, 0, 500, seconds)
        model.observe_step(4, 1000, 500, seconds)
        model.observe_copy(CopyKind.TO_HOST, 1 << 20, seconds)
        if i == 20:
            assert untaught.coefficients() == model.coefficients() and {} == model.errors()
            assert untaught.copies.coefficients() == model.copies.coefficients()
        if i > 20:
            for each in (model, taught):
                each.observe_step(4 + i, 1000 * i, 0, 0.03 + 1e-3 * i)
                each.observe_step(0, 0, 500 + i, 0.05)
    assert 40 * 4 == sum("measurement left out" in line for line in caplog.messages)
    assert taught.coefficients() == model.coefficients() != untaught.coefficients()
    assert taught.errors() == model.errors()


def test_steps_far_below_the_prior_with_slow_ones_between_are_learnt():
    """Features that hardly differ and times of all sizes leave the fit little to go by; it stays finite."""
    for seed in range(100):
        rng, model, context = random.Random(seed), CostModel(), 20
        for _ in range(300):
            context = rng.choice((context + 1, context + 3, 0, context))
            model.observe_step(rng.choice((1, 3)), context, 0, rng.choice((7e-6, 7e-6, 2e-5, rng.uniform(3e-4, 0.03))))
            assert math.isfinite(model.predict_step(3, context))
