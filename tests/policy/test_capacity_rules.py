# SPDX-License-Identifier: Apache-2.0
"""Which hosts a model may be on, and which models it shares none with: laws on random pools, and plain situations."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.policy.test_capacity import POLICY, host, model, places, pools, settled, view
from tokenpool.policy.capacity import Action, CapacityView, HostState, Role
from tokenpool.policy.capacity_laws import apply, check

pytestmark = pytest.mark.cpu


@st.composite
def ruled(draw, *, is_empty: bool = False) -> CapacityView:
    """A pool in which some models may be on some hosts only, and some share none."""
    pool = draw(pools())
    hosts, names = [h.host for h in pool.hosts], [m.model for m in pool.models]
    pairs = draw(st.sets(st.tuples(st.sampled_from(names), st.sampled_from(names)), max_size=4))
    apart = {name: {b for a, b in pairs if a == name} | {a for a, b in pairs if b == name} for name in names}
    models = [
        replace(
            m,
            pinned=(),
            allowed=draw(st.none() | st.frozensets(st.sampled_from(hosts))),
            apart=frozenset(apart[m.model] - {m.model}),
        )
        for m in pool.models
    ]
    emptied = [replace(h, seats=()) for h in pool.hosts] if is_empty else pool.hosts
    return replace(pool, hosts=tuple(emptied), models=tuple(models))


def violations(pool: CapacityView) -> list[str]:
    """Seats that are where they may not be, of hosts that are up."""
    models, found = {m.model: m for m in pool.models}, []
    for h in pool.hosts:
        names = {s.model for s in h.seats if not s.is_leaving}
        for m in (models[name] for name in sorted(names) if h.state is HostState.UP):
            if m.allowed is not None and h.host not in m.allowed:
                found.append(f"{m.model} on {h.host}")
            found += [f"{m.model} with {other} on {h.host}" for other in sorted(m.apart & names)]
    return found


@settings(max_examples=150, deadline=None)
@given(ruled())
def test_no_decision_breaks_a_rule(pool):
    """Nothing comes to where it may not be, whatever is there already; the same for equal views."""
    made = POLICY.decide(pool)
    assert made == POLICY.decide(pool)
    for decision in made:
        pool = apply(pool, decision)
        check(pool)


@settings(max_examples=60, deadline=None)
@given(ruled(is_empty=True))
def test_a_pool_that_begins_empty_keeps_all_rules(pool):
    """At rest, and a model without a seat has no host that could take it."""
    after, _ = settled(pool)
    assert violations(after) == []
    seats = {h.host: {s.model for s in h.seats} for h in after.hosts}
    for m in after.models:
        free = [
            h.host
            for h in after.hosts
            if h.state is HostState.UP
            and (m.allowed is None or h.host in m.allowed)
            and not m.apart & seats[h.host]
            and h.free_host_bytes >= m.weight_bytes
            and h.device_bytes >= m.weight_bytes + m.min_kv_bytes
        ]
        assert places(after, m.model) or not free


@settings(max_examples=60, deadline=None)
@given(ruled())
def test_what_is_wrong_is_put_right_where_it_can_be(pool):
    """From any beginning it comes to rest, and no seat that is wrong could be given up or moved elsewhere."""
    after, _ = settled(pool)
    for h in after.hosts:
        here = {seat.model for seat in h.seats if not seat.is_leaving}
        for m in (m for m in after.models if h.state is HostState.UP and m.model in here):
            if m.allowed is not None and h.host not in m.allowed:
                up = [g.host for g in after.hosts if g.state is HostState.UP and g.host in m.allowed]
                fit = set(up) & set(places(after, m.model))
                assert len(fit) < max(1, m.min_replicas), f"{m.model} is on {h.host} for nothing"


def test_a_model_moves_off_a_host_that_it_may_not_be_on():
    """It is loaded where it may be first, and the reason says why."""
    pool = view([host("h0", "a"), host("h1"), host("h2")], [model("a", allowed=frozenset({"h2"}))])
    (decision,) = POLICY.decide(pool)
    assert (decision.action, decision.from_host, decision.to_host) == (Action.MOVE, "h0", "h2")
    assert "it may not be on h0" in decision.reason


def test_a_model_leaves_hosts_that_it_may_not_be_on_also_if_none_that_it_may_be_on_decodes():
    """A host serves whole requests where no other one does the rest."""
    hosts = [host("h0", "a"), host("h1", "a"), host("h2", role=Role.PREFILL)]
    after, _ = settled(view(hosts, [model("a", allowed=frozenset({"h2"}))]))
    assert places(after, "a") == ["h2"]


def test_models_that_are_apart_get_hosts_of_their_own():
    apart = {"a": frozenset("b"), "b": frozenset("a")}
    after, _ = settled(
        view([host("h0"), host("h1")], [model(name, apart=apart.get(name, frozenset())) for name in "abc"])
    )
    assert not set(places(after, "a")) & set(places(after, "b")) and places(after, "c")


def test_a_model_waits_rather_than_break_a_rule():
    """It stays without a seat where the only host has its opposite."""
    models = [model("a", apart=frozenset("b")), model("b", apart=frozenset("a"))]
    after, _ = settled(view([host("h0")], models))
    assert sorted([len(places(after, "a")), len(places(after, "b"))]) == [0, 1]


def test_what_stands_in_the_wrong_place_stays_while_nobody_else_can_have_it():
    """A request would have nowhere to go."""
    pool = view([host("h0", "a"), host("h1", free=1)], [model("a", allowed=frozenset({"h1"}))])
    after, made = settled(pool)
    assert places(after, "a") == ["h0"] and not made


def test_a_busy_model_is_not_relieved_on_to_a_host_it_may_not_be_on():
    """Of two idle hosts the allowed one gets the seat."""
    pool = view(
        [host("h0", "a", "b"), host("h1"), host("h2")],
        [model("a", 6.0, allowed=frozenset({"h0", "h2"})), model("b", 6.0, allowed=frozenset({"h0"}))],
    )
    _, made = settled(pool)
    assert made and {d.to_host for d in made if d.to_host} == {"h2"}
