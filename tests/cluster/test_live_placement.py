# SPDX-License-Identifier: Apache-2.0
"""The capacity policy behind the controller: what it sees of reports, and what becomes of its decisions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tokenpool.cluster.live_placement import LivePlacement, placement_of
from tokenpool.cluster.placement import KeepReplicas, Move, Situation
from tokenpool.cluster.values import Deployment, HostedReport, HostReport
from tokenpool.cluster_config import ClusterConfig
from tokenpool.policy.capacity import Action, CapacityDecision, CapacityView, Role
from tokenpool.policy.capacity_live import LiveCapacity

pytestmark = pytest.mark.cpu

MIB = 1 << 20
MODELS = {
    name: Deployment(name, 1, weight_bytes=4 * MIB, details={"ttft_s": 1.0, "tpot_s": 0.05}) for name in ("a", "b")
}


class Script:
    """A policy that says what the test wants, and keeps what it saw."""

    def __init__(self, *answers: list[CapacityDecision]) -> None:
        self.answers = list(answers)
        self.seen: list[CapacityView] = []

    def decide(self, view: CapacityView) -> list[CapacityDecision]:
        self.seen.append(view)
        return self.answers.pop(0) if self.answers else []


def loaded(
    second: float, *, tokens_per_s: float, late_frac: float, busy_frac: float, requests: int = 4
) -> HostedReport:
    """What a host says of a model whose totals grew at these rates for `second` seconds."""
    tokens = int(tokens_per_s * second)
    load = {
        "state": "on device", "running": requests, "waiting": 0, "tokens": tokens,
        "tokens_on_time": int(tokens * (1 - late_frac)), "step_seconds": busy_frac * second,
        "requests": tokens // 100, "prompt_tokens": tokens // 2, "finished": tokens // 100,
        "costs": {"coefficients": {
            "step_s": 0.04, "step_per_request_s": 0.001, "step_per_token_s": 0.0, "prefill_s": 0.02,
            "prefill_per_token_s": 1e-4,
        }},
    }  # fmt: skip
    return HostedReport(1, load)


def host(name: str, **models: HostedReport) -> HostReport:
    return HostReport(
        name, f"{name}-1", 1, node=name, device_memory=64 * MIB, host_memory=64 * MIB, page_size=MIB, movable=True,
        models=models,
    )  # fmt: skip


def situation(now_s: float, *hosts: HostReport, roles: dict[str, Role] | None = None, **placed: set[str]) -> Situation:
    by_name = {h.host: h for h in hosts}
    return Situation(MODELS, by_name, {"a": set(), "b": set()} | placed, {}, set(), now_s, roles or {})


def test_models_without_a_seat_get_one():
    """The real policy places both models; nothing is left for the fallback."""
    moves = LivePlacement(LiveCapacity(), replicas=1).decide(situation(0.0, host("h0"), host("h1")))

    assert sorted((move.action, move.model) for move in moves) == [("add", "a"), ("add", "b")]
    assert all(move.reason.startswith("place: ") for move in moves)


def test_a_host_with_too_much_to_do_is_relieved():
    """Two late models on one host, an idle host beside it: one of them gets a seat there."""
    placement, moves = LivePlacement(LiveCapacity(), replicas=1), []
    for second in range(40):
        busy = loaded(second, tokens_per_s=80, late_frac=0.6, busy_frac=0.5)
        moves += placement.decide(situation(float(second), host("h0", a=busy, b=busy), host("h1"), a={"h0"}, b={"h0"}))

    assert {(move.action, move.host) for move in moves} == {("add", "h1")}


def test_nothing_moves_without_load():
    """An idle pool stays as it is."""
    placement, moves = LivePlacement(LiveCapacity(), replicas=1), []
    for second in range(300):
        idle = loaded(second, tokens_per_s=0, late_frac=0, busy_frac=0, requests=0)
        moves += placement.decide(situation(float(second), host("h0", a=idle, b=idle), host("h1"), a={"h0"}, b={"h0"}))

    assert moves == []


def test_rates_are_differences_of_totals():
    """The policy sees tokens, arrivals and busy time per second, not totals since the host began."""
    policy = Script()
    placement = LivePlacement(policy, replicas=1)
    for second in (1000, 1010, 1020):
        busy = loaded(second, tokens_per_s=50, late_frac=0.2, busy_frac=0.25)
        placement.decide(situation(float(second), host("h0", a=busy), a={"h0"}, b={"h0"}))

    model, seat = policy.seen[-1].models[0], policy.seen[-1].hosts[0].seats[0]
    assert (model.output_tokens_per_s, seat.tokens_per_s) == pytest.approx((50, 50))
    assert model.arrivals_per_s == pytest.approx(0.5)
    assert model.input_tokens_per_s == pytest.approx(25)
    assert seat.on_time_frac == pytest.approx(0.8)
    assert policy.seen[-1].hosts[0].busy_frac == pytest.approx(0.25)
    assert model.costs.step_s == 0.04


def test_a_move_removes_only_once_the_model_serves_there():
    """The old seat goes when the new one is loaded, not before."""
    here = host("h0", a=HostedReport(1), b=HostedReport(1))
    move = CapacityDecision(Action.MOVE, "why", "a", "h0", "h1")
    policy = Script([move])
    placement = LivePlacement(policy, replicas=1)
    first = placement.decide(situation(0.0, here, host("h1"), a={"h0"}, b={"h0"}))
    second = placement.decide(situation(1.0, here, host("h1"), a={"h0", "h1"}, b={"h0"}))
    there = host("h1", a=HostedReport(1))
    third = placement.decide(situation(1.5, here, there, a={"h0", "h1"}, b={"h0"}))

    assert first == [Move("add", "a", "h1", "move: why")]
    assert second == []
    assert [move[:3] for move in third] == [("remove", "a", "h0")]
    seats = {(h.host, seat.model): seat for h in policy.seen[-1].hosts for seat in h.seats}
    assert seats["h0", "a"].is_leaving and seats["h1", "a"].is_coming and not seats["h0", "b"].is_leaving


def test_a_move_whose_new_host_died_leaves_the_old_seat():
    """Without the new seat the model stays where it is."""
    here = host("h0", a=HostedReport(1), b=HostedReport(1))
    placement = LivePlacement(Script([CapacityDecision(Action.MOVE, "why", "a", "h0", "h1")]), replicas=1)
    placement.decide(situation(0.0, here, host("h1"), a={"h0"}, b={"h0"}))

    assert placement.decide(situation(1.0, here, a={"h0"}, b={"h0"})) == []


def test_what_the_policy_wants_on_a_barred_host_goes_elsewhere():
    """A host that has just failed to load a model does not get it again at once."""
    place = CapacityDecision(Action.PLACE, "why", "a", to_host="h0")
    asked = replace(situation(0.0, host("h0"), host("h1"), b={"h0"}), barred={("a", "h0")})
    moves = LivePlacement(Script([place]), replicas=1).decide(asked)

    assert [move[:3] for move in moves] == [("add", "a", "h1")]


def test_a_pool_without_roles_gets_none():
    """Without `prefill_hosts` every host does everything."""
    moves = LivePlacement(LiveCapacity(), replicas=1).decide(situation(0.0, host("h0"), host("h1")))

    assert [move for move in moves if move.action == "role"] == []


def test_split_hosts_get_roles_before_models_and_each_model_gets_a_seat_of_both_kinds():
    """One host prefills, the other one decodes: both need every model."""
    placement = LivePlacement(LiveCapacity(), replicas=1, num_prefill=1)
    roles = {move.host: move.role for move in placement.decide(situation(0.0, host("h1"), host("h0")))}
    moves = placement.decide(situation(0.5, host("h0"), host("h1"), roles=roles))

    assert roles == {"h0": Role.PREFILL, "h1": Role.DECODE}
    assert sorted(move[:3] for move in moves) == [("add", m, h) for m in ("a", "b") for h in ("h0", "h1")]


def test_a_host_that_joins_a_split_pool_decodes_unless_prefill_hosts_are_missing():
    """Roles that are there stay."""
    placement = LivePlacement(Script(), replicas=1, num_prefill=1)
    joined = placement.decide(situation(0.0, host("h0"), host("h2"), roles={"h0": Role.PREFILL}))
    replaced = placement.decide(situation(1.0, host("h2"), host("h3"), roles={"h0": Role.PREFILL, "h2": Role.DECODE}))

    assert [(move.host, move.role) for move in joined] == [("h2", Role.DECODE)]
    assert [(move.host, move.role) for move in replaced] == [("h3", Role.PREFILL)]


def test_a_role_that_the_policy_gives_is_a_move():
    """With its reason; the policy then learns how long ago that was."""
    policy = Script([CapacityDecision(Action.ROLE, "why", to_host="h1", role=Role.MIXED)])
    placement = LivePlacement(policy, replicas=1)
    moves = placement.decide(situation(0.0, host("h0"), host("h1"), a={"h0"}, b={"h0"}, roles={"h1": Role.DECODE}))
    placement.decide(situation(7.0, host("h0"), host("h1"), a={"h0"}, b={"h0"}))

    assert moves == [Move("role", "", "h1", "role: why", Role.MIXED)]
    assert [h.role for h in policy.seen[0].hosts] == [Role.MIXED, Role.DECODE]
    assert policy.seen[1].hosts[1].since_role_s == 7.0


def test_the_config_chooses_the_placement():
    """Fixed keeps replicas; a shorter window shortens what the policy waits, and the default changes nothing."""
    fixed = placement_of(ClusterConfig(capacity="fixed", replicas=2))
    usual, short = placement_of(ClusterConfig()), placement_of(ClusterConfig(capacity_window_s=30.0))

    assert isinstance(fixed, KeepReplicas) and fixed.replicas == 2
    assert isinstance(usual, LivePlacement) and usual.policy == LiveCapacity()
    assert isinstance(short, LivePlacement) and short.policy.quiet_s == LiveCapacity().quiet_s / 2


def test_a_host_holds_as_many_models_as_its_pages_do():
    """Weights that stay take pages, so do the KV floor of each and null blocks; those that move need only one's."""

    def placed(pages: int, kv_floor_pages: int, *, movable: bool) -> int:
        one = replace(host("h0"), device_memory=pages * MIB, kv_floor_pages=kv_floor_pages, movable=movable)
        return len(KeepReplicas(1).decide(situation(0.0, one)))

    assert [2, 1, 1, 0] == [placed(pages, 1, movable=False) for pages in (11, 10, 6, 5)]
    assert [2, 1, 1, 0] == [placed(pages, 3, movable=False) for pages in (15, 14, 8, 7)]
    assert [2, 0] == [placed(pages, 3, movable=True) for pages in (8, 7)]


def test_a_model_may_have_its_own_number_of_hosts():
    """Its replicas come before the cluster's, for both policies and where a barred host is made up for."""
    own = {"a": replace(MODELS["a"], replicas=3, max_replicas=3), "b": MODELS["b"]}
    empty = replace(situation(0.0, *(host(f"h{i}") for i in range(4))), models=own)

    def added(moves: list[Move]) -> list[str]:
        return sorted(move.model for move in moves if move.action == "add")

    assert added(KeepReplicas(1).decide(empty)) == ["a", "a", "a", "b"]
    live, placed, total = LivePlacement(LiveCapacity(), replicas=1), empty, []
    for second in range(5):
        moves = live.decide(replace(placed, now_s=float(second)))
        total += added(moves)
        hosts = {name: set(where) for name, where in placed.placed.items()}
        for move in moves:
            hosts[move.model].add(move.host)
        placed = replace(placed, placed=hosts)
    assert sorted(total) == ["a", "a", "a", "b"]

    policy = Script()
    LivePlacement(policy, replicas=1, max_replicas=2).decide(empty)
    seen = {model.model: (model.min_replicas, model.max_replicas) for model in policy.seen[-1].models}
    assert seen == {"a": (3, 3), "b": (1, 2)}
