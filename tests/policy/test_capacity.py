# SPDX-License-Identifier: Apache-2.0
"""The capacity policy: its laws on random pools, and what it does in plain situations."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpool.errors import ConfigError
from tokenpool.policy.capacity import (
    Action,
    CapacityDecision,
    CapacityHost,
    CapacityModel,
    CapacitySeat,
    CapacityView,
    HostState,
    Role,
    StepCosts,
)
from tokenpool.policy.capacity_laws import apply, apply_all, check, finish
from tokenpool.policy.capacity_live import LiveCapacity

pytestmark = pytest.mark.cpu

GB = 1 << 30
POLICY = LiveCapacity()
COSTS = StepCosts(0.01, 5e-4, 0.0, 0.01, 1e-4)


def model(name: str, rate: float = 0.0, gib: int = 10, **fields) -> CapacityModel:
    """A request is 500 tokens of prompt and 200 of answer: at 10 per second it needs 0.1 + 1.0 + 0.6 of a host."""
    traffic = {"arrivals_per_s": rate, "input_tokens_per_s": 500 * rate, "output_tokens_per_s": 200 * rate}
    return CapacityModel(name, gib * GB, GB, 10.0, 0.1, costs=COSTS, **{**traffic, **fields})


def host(name: str, *seats: str | CapacitySeat, free: int = 100, **fields) -> CapacityHost:
    made = tuple(CapacitySeat(seat) if isinstance(seat, str) else seat for seat in seats)
    return CapacityHost(name, fields.pop("node", name), 70 * GB, free * GB, seats=made, **fields)


def view(hosts, models) -> CapacityView:
    return CapacityView(100.0, tuple(hosts), tuple(models))


def settled(start: CapacityView, calls: int = 40) -> tuple[CapacityView, list[CapacityDecision]]:
    """Decide and carry out until nothing more is decided, with much time between; fails if it never ends."""
    made = []
    for _ in range(calls):
        decisions = POLICY.decide(start)
        if not decisions:
            return start, made
        made += decisions
        start = finish(apply_all(start, decisions))
        start = replace(
            start,
            hosts=tuple(replace(h, since_move_s=math.inf, since_role_s=math.inf) for h in start.hosts),
            models=tuple(replace(m, since_move_s=math.inf) for m in start.models),
        )
    pytest.fail(f"still deciding: {made[-3:]}")


def places(seen: CapacityView, name: str) -> list[str]:
    return [h.host for h in seen.hosts for s in h.seats if s.model == name and not s.is_leaving]


@st.composite
def pools(draw) -> CapacityView:
    roles = draw(st.sampled_from([[Role.MIXED], list(Role)]))
    count = draw(st.integers(1, 6))
    hosts = [
        CapacityHost(
            f"h{i}",
            f"n{i // 2}",
            draw(st.integers(5, 70)) * GB,
            draw(st.integers(0, 80)) * GB,
            draw(st.sampled_from(roles)),
            draw(st.sampled_from([HostState.UP] * 4 + [HostState.DRAINING, HostState.LOST])),
            busy_frac=draw(st.floats(0, 1)),
        )
        for i in range(count)
    ]
    models, seats = [], {h.host: [] for h in hosts}
    for i in range(draw(st.integers(1, 8))):
        pinned = draw(st.sampled_from([(), (), (), tuple(h.host for h in hosts[: 1 + i % 2])]))
        made = model(
            f"m{i}",
            draw(st.sampled_from([0.0, 0.1, 1.0, 10.0, 60.0])),
            draw(st.integers(1, 20)),
            priority=draw(st.integers(0, 2)),
            min_replicas=draw(st.integers(1, 2)),
            max_replicas=draw(st.sampled_from([None, 2, 3])),
            pinned=pinned,
            since_move_s=draw(st.sampled_from([0.0, 40.0, 1000.0])),
        )
        models.append(made)
        for name in draw(st.sets(st.sampled_from(sorted(seats)), max_size=3)):
            if not pinned or name in pinned:
                on_time = draw(st.sampled_from([1.0, 0.9, 0.3]))
                seats[name].append(
                    CapacitySeat(
                        made.model, tokens_per_s=draw(st.floats(0, 500)), on_time_frac=on_time,
                        is_leaving=draw(st.integers(0, 5)) == 0,
                    )
                )  # fmt: skip
    return view([replace(h, seats=tuple(seats[h.host])) for h in hosts], models)


@settings(max_examples=40, deadline=None)
@given(pools())
def test_decisions_keep_the_laws_one_by_one(pool):
    """No host beyond its memory, no model twice on one, none that is pinned moved or dropped, reasons of one line."""
    pinned = {m.model for m in pool.models if m.pinned}
    made = POLICY.decide(pool)
    assert made == POLICY.decide(pool)
    for decision in made:
        assert decision.reason and "\n" not in decision.reason
        if decision.model in pinned:
            assert decision.action is Action.PLACE
        pool = apply(pool, decision)  # raises where a law is broken
        check(pool)


@settings(max_examples=40, deadline=None)
@given(pools())
def test_who_has_a_host_with_room_is_served(pool):
    """After one call: a model is served, unless too few hosts have room for it."""
    limit = 2 * POLICY.max_copies
    after = apply_all(pool, [d for d in POLICY.decide(pool) if d.action is not Action.ROLE])
    for m in after.models:
        if m.pinned:
            continue
        up = [h for h in after.hosts if h.state is HostState.UP]
        has = [h.role for h in up for s in h.seats if s.model == m.model and not s.is_leaving]
        can = [
            h.role
            for h in up
            if h.free_host_bytes >= m.weight_bytes
            and h.device_bytes >= m.weight_bytes + m.min_kv_bytes
            and h.num_copies < limit
            and all(s.model != m.model for s in h.seats)
        ]
        could = all(any(role is not other for role in has + can) for other in (Role.DECODE, Role.PREFILL))
        is_served = all(any(role is not other for role in has) for other in (Role.DECODE, Role.PREFILL))
        assert is_served or not could


@settings(max_examples=25, deadline=None)
@given(pools())
def test_it_comes_to_rest(pool):
    """With the same traffic a pool is done after a few calls, and stays so."""
    rest, _ = settled(replace(pool, hosts=tuple(replace(h, busy_frac=0.0) for h in pool.hosts)))

    assert [] == POLICY.decide(rest)


def test_models_of_a_lost_host_come_first():
    """Before one that never had a seat, whatever its traffic."""
    hosts = [host("h0", "a", state=HostState.LOST), host("h1"), host("h2")]
    made = POLICY.decide(view(hosts, [model("new", 2.0), model("a", 0.1)]))

    assert [("a", Action.PLACE), ("new", Action.PLACE)] == [(d.model, d.action) for d in made]
    assert "lost" in made[0].reason


def test_a_draining_host_is_emptied():
    """The only seat moves; one that others make up for is dropped."""
    hosts = [host("h0", "a", "b", state=HostState.DRAINING), host("h1", "b"), host("h2")]
    made = POLICY.decide(view(hosts, [model("a", 0.1), model("b", 0.1)]))

    assert [(Action.MOVE, "a", "h0"), (Action.DROP, "b", "h0")] == [(d.action, d.model, d.from_host) for d in made]


def test_a_host_with_too_much_to_do_is_relieved():
    """Two models that are too much together are separated; the reason names the share on time and the bytes."""
    late = [CapacitySeat(name, tokens_per_s=600.0, on_time_frac=0.71) for name in ("a", "b")]
    hosts = [host("h0", *late, busy_frac=1.0), host("h1")]
    made = POLICY.decide(view(hosts, [model("a", 3.0), model("b", 3.0)]))

    assert [(Action.MOVE, "h0", "h1", 10 * GB)] == [(d.action, d.from_host, d.to_host, d.copy_bytes) for d in made]
    assert made[0].gain_tokens_per_s > 0
    assert "71 % on time on h0" in made[0].reason and "copies 10 GiB once" in made[0].reason


def test_a_model_too_large_for_one_host_gets_further_ones():
    """And gives them up again when its traffic has gone, but not at once."""
    busy = model("a", 20.0)
    rest, made = settled(view([host("h0", "a"), host("h1"), host("h2"), host("h3")], [busy]))
    assert 3 <= len(places(rest, "a"))
    assert {Action.REPLICATE} == {d.action for d in made}

    quiet = replace(rest, models=(model("a", 0.5, since_move_s=60.0),))
    assert [] == POLICY.decide(quiet)
    rest, made = settled(replace(rest, models=(model("a", 0.5),)))
    assert 1 == len(places(rest, "a"))
    assert {Action.DROP} == {d.action for d in made}


def test_evidence_goes_before_prediction():
    """A host whose tokens are on time is left alone, whatever is predicted for it, until its traffic has risen."""
    fine = CapacitySeat("a", tokens_per_s=4000.0, on_time_frac=0.99)
    hosts = [host("h0", fine, busy_frac=0.9), host("h1")]
    assert [] == POLICY.decide(view(hosts, [model("a", 8.0)]))
    made = POLICY.decide(view(hosts, [model("a", 8.0, recent_arrivals_per_s=20.0)]))
    assert [Action.REPLICATE] == [d.action for d in made]


def test_evidence_counts_for_the_link_too():
    """Weights that do not fit together load the link, by prediction; if all tokens are on time nothing moves."""
    names = [f"m{i}" for i in range(10)]
    fine = [CapacitySeat(name, tokens_per_s=100.0, on_time_frac=1.0) for name in names]
    models = [model(name, 0.3, 15) for name in names]
    hosts = [host("h0", *fine, busy_frac=0.9, since_move_s=60.0), host("h1")]
    assert [] == POLICY.decide(view(hosts, models))
    late = [replace(seat, on_time_frac=0.6) for seat in fine]
    made = POLICY.decide(view([replace(hosts[0], seats=tuple(late)), hosts[1]], models))
    assert {Action.MOVE} == {d.action for d in made}


@pytest.mark.parametrize(("rate", "moves"), [(3.0, False), (5.0, True)])
def test_prediction_alone_must_be_far_beyond(rate: float, moves: bool):
    """Two models that came just now and may be somewhat too much together stay; if they must be, one moves."""
    hosts = [host("h0", "a", "b", since_move_s=1.0), host("h1")]
    made = POLICY.decide(view(hosts, [model("a", rate), model("b", rate)]))
    assert moves == bool(made)


def test_a_seat_more_does_not_overload_another_host():
    """A model is not spread over hosts that would then be late themselves, unless it alone is more than one can do."""
    late = [CapacitySeat(name, tokens_per_s=600.0, on_time_frac=0.6) for name in ("a", "b")]
    hosts = [host("h0", *late, busy_frac=1.0, since_move_s=60.0), host("h1", "c", since_move_s=60.0)]
    models = [model("a", 3.0), model("b", 3.0), model("c", 3.5)]
    assert [] == POLICY.decide(view(hosts, models))


def test_first_seats_go_to_the_most_demanding_first():
    """Loads of hosts come out alike, whatever the order of the models."""
    models = [model(f"s{i}", 1.2) for i in range(6)] + [model(f"l{i}", 1.0, 30) for i in range(4)]
    rest, _ = settled(view([host(f"h{i}", free=500) for i in range(4)], models))
    assert [1] * 4 == [sum(seat.model.startswith("l") for seat in h.seats) for h in rest.hosts]
    assert [2, 2, 3, 3] == sorted(len(h.seats) for h in rest.hosts)


def test_a_move_must_be_worth_its_bytes():
    """Where the copy takes longer than the horizon nothing moves."""
    late = [CapacitySeat(name, tokens_per_s=600.0, on_time_frac=0.5) for name in ("a", "b")]
    hosts = [host("h0", *late, busy_frac=1.0), host("h1", load_bytes_per_s=10 * GB / 130)]
    assert [] == POLICY.decide(view(hosts, [model("a", 3.0), model("b", 3.0)]))


def test_copies_to_one_host_are_few_at_a_time():
    """A host that gets two seats already takes none for relief."""
    late = [CapacitySeat(name, tokens_per_s=600.0, on_time_frac=0.5) for name in ("a", "b")]
    hosts = [host("h0", *late, busy_frac=1.0), host("h1", num_copies=2)]
    assert [] == POLICY.decide(view(hosts, [model("a", 3.0), model("b", 3.0)]))


def test_roles_follow_the_mix_of_work():
    """Prefill hosts with nothing to do become decode hosts where decoding needs more, one at a time."""
    names = [f"m{i}" for i in range(4)]
    hosts = [host(f"h{i}", *names, role=Role.PREFILL if i < 4 else Role.DECODE) for i in range(6)]
    models = [model(name, 6.0, input_tokens_per_s=60.0) for name in names]
    made = [d for d in POLICY.decide(view(hosts, models)) if d.action is Action.ROLE]

    assert [Role.DECODE] == [d.role for d in made]
    assert "prefill -> decode" in made[0].reason
    hosts = [replace(h, since_role_s=5.0) for h in hosts]
    assert [] == [d for d in POLICY.decide(view(hosts, models)) if d.action is Action.ROLE]


def test_settings_that_cannot_be_are_refused():
    """Thresholds must be in order: else seats would come and go."""
    with pytest.raises(ConfigError, match="drop_load < target_load"):
        LiveCapacity(drop_load=0.85)
