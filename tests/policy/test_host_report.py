# SPDX-License-Identifier: Apache-2.0
"""What a host tells frontends of a model: its load, and what one request more would add."""

from __future__ import annotations

import math

import pytest

from tokenpool.policy.host_report import host_load, report_model, usual_prompt_tokens
from tokenpool.policy.turns import ModelView, PoolView, Residency

pytestmark = pytest.mark.cpu


class Costs:
    """10 ms a step, 1 ms more for each request, 1 ms a prompt token."""

    def predict_step(self, batch: int, context_tokens: int) -> float:
        return 0.01 + 0.001 * batch if batch else 0.0

    def predict_prefill(self, tokens: int) -> float:
        return 0.001 * tokens


BUSY = ModelView("a", 0, num_running=10, num_waiting=2, ttft_s=10.0, tpot_s=0.1, step_s=0.02, prefill_s=1.0)
IDLE = ModelView("b", 1, ttft_s=5.0, tpot_s=0.1, residency=Residency.IN_HOST, ready_in_s=1.0)
NO_SLO = ModelView("c", 2, num_running=3, step_s=0.05)
POOL = PoolView(0.0, None, [BUSY, NO_SLO])


def test_the_load_of_a_host_is_what_falls_due():
    """20 ms of every 100 ms and one second of ten; a model without an SLO has nothing due."""
    assert 0.2 + 0.1 == pytest.approx(host_load(POOL))
    assert 0.0 == host_load(PoolView(0.0, None, []))


def test_a_running_model_takes_one_more_for_little():
    report = report_model(BUSY, 100, POOL, Costs(), load=0.3, num_places=16)

    assert (10, 2, 4, "on device") == tuple(report[key] for key in ("running", "waiting", "places", "residency"))
    assert (0.0, 0.1 / 10 + 0.001 / 0.1) == pytest.approx((report["first_load"], report["request_load"]))


def test_the_first_request_brings_steps_and_a_copy():
    """11 ms of every 100 ms, and one second of link in five."""
    report = report_model(IDLE, 100, POOL, Costs(), load=0.3, num_places=16)

    assert 0.011 / 0.1 + 1.0 / 5 == pytest.approx(report["first_load"])
    assert (16, 0.3) == (report["places"], report["load"])
    assert report["first_token_in_s"] > 1.0 + 0.1


def test_without_an_slo_no_step_is_due():
    report = report_model(NO_SLO, 100, POOL, Costs(), load=0.3, num_places=16)
    assert math.isfinite(report["request_load"])
    assert 0.0 == report["first_load"]


@pytest.mark.parametrize(("counts", "tokens"), [((2, 300, 5, 9000), 150), ((0, 0, 5, 1000), 200), ((0, 0, 0, 0), 256)])
def test_a_usual_prompt_is_like_those_that_are_there(counts, tokens):
    assert tokens == usual_prompt_tokens(*counts)
