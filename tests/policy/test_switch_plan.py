# SPDX-License-Identifier: Apache-2.0
"""A switch plan frees before it maps, copies what it says, and moves weights one way only."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpool.policy.cost_model import CopyKind, CopyModel, CostModel
from tokenpool.policy.eviction import EvictionKind
from tokenpool.policy.switch_plan import SwitchKind, SwitchStep, Victim, plan_switch

pytestmark = pytest.mark.cpu

MIB = 1 << 20
COST = CostModel(copies=CopyModel(0.001, {CopyKind.TO_DEVICE: 10e9, CopyKind.TO_HOST: 5e9}))


def test_a_full_switch():
    """Drain, KV out, weights out, map, weights in, KV in; seconds and bytes add up."""
    victims = [
        Victim("old", EvictionKind.PAUSED_KV, 3, kv_bytes=5_000_000, drain_s=0.02),
        Victim("old", EvictionKind.WEIGHTS, 10, drain_s=0.01),
        Victim("idle", EvictionKind.CACHED_KV, 2),
    ]
    plan = plan_switch(
        "new",
        weights_bytes_missing=300 * MIB,
        kv_bytes_out_at_host=33 * MIB,
        victims=victims,
        cost=COST,
        page_size=32 * MIB,
        map_page_s=0.001,
    )
    assert [
        SwitchStep(SwitchKind.DRAIN, "old", seconds=0.02),
        SwitchStep(SwitchKind.KV_OUT, "old", 5_000_000, 3, pytest.approx(0.002)),
        SwitchStep(SwitchKind.WEIGHTS_OUT, "old", 0, 10),
        SwitchStep(SwitchKind.KV_OUT, "idle", 0, 2),
        SwitchStep(SwitchKind.MAP, "new", 0, 12, pytest.approx(0.012)),
        SwitchStep(SwitchKind.WEIGHTS_IN, "new", 300 * MIB, 0, pytest.approx(0.001 + 300 * MIB / 10e9)),
        SwitchStep(SwitchKind.KV_IN, "new", 33 * MIB, 0, pytest.approx(0.001 + 33 * MIB / 10e9)),
    ] == list(plan.steps)
    copies_s = 0.002 + 0.002 + 333 * MIB / 10e9
    assert pytest.approx(0.032 + copies_s) == plan.predicted_s == plan.visible_s()
    assert pytest.approx(0.032) == plan.visible_s(overlap_s=10.0)
    assert pytest.approx(plan.predicted_s - 0.01) == plan.visible_s(overlap_s=0.01)
    assert 15 == plan.pages_freed
    assert 300 * MIB == plan.bytes_by_kind[SwitchKind.WEIGHTS_IN]


def test_a_resident_target_needs_nothing():
    """With weights and KV in place the plan is empty."""
    plan = plan_switch(
        "new", weights_bytes_missing=0, kv_bytes_out_at_host=0, victims=[], cost=COST, page_size=32 * MIB
    )
    assert ((), 0.0, {}) == (plan.steps, plan.predicted_s, plan.bytes_by_kind)


@settings(deadline=None)
@given(
    missing=st.integers(0, 10**9),
    kv=st.integers(0, 10**9),
    victims=st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(EvictionKind), st.integers(1, 9), st.integers(0, 10**8)),
        max_size=6,
    ),
)
def test_pages_come_free_before_any_is_mapped(missing, kv, victims):
    """Order holds for any victims, bytes are those asked for, and no weights ever go to the host."""
    given_up = [Victim(m, k, p, 0 if k is EvictionKind.WEIGHTS else b, 0.01 * p) for m, k, p, b in victims]
    plan = plan_switch(
        "new", weights_bytes_missing=missing, kv_bytes_out_at_host=kv, victims=given_up, cost=COST, page_size=MIB
    )
    kinds = list(SwitchKind)
    stages = [{SwitchKind.WEIGHTS_OUT: 1}.get(step.kind, kinds.index(step.kind)) for step in plan.steps]
    assert sorted(stages) == stages
    moved = plan.bytes_by_kind
    assert (missing, kv) == (moved.get(SwitchKind.WEIGHTS_IN, 0), moved.get(SwitchKind.KV_IN, 0))
    assert sum(victim.kv_bytes for victim in given_up) == moved.get(SwitchKind.KV_OUT, 0)
    assert 0 == moved.get(SwitchKind.WEIGHTS_OUT, 0)
    assert sum(victim.pages for victim in given_up) == plan.pages_freed
    assert 0 <= plan.visible_s(1e9) <= plan.predicted_s + 1e-9
