# SPDX-License-Identifier: Apache-2.0
"""Policies are found by name, and their options are checked like any setting."""

from __future__ import annotations

import pytest

from tokenpool.errors import ConfigError
from tokenpool.policy.turns import ModelView, PoolView, Residency, load_turn_policy

pytestmark = pytest.mark.cpu

POLICIES = ["aegaeon", "request_level", "round_robin", "slack"]


@pytest.mark.parametrize("queues", [dict(num_waiting=1, arrival_s=0.0), dict(num_running=1), {}])
@pytest.mark.parametrize("name", POLICIES)
def test_policies_are_registered(name, queues):
    """Every policy of the project has an entry point, and runs a model that is the only one, whatever its work."""
    policy = load_turn_policy(name)
    for now_s in (0.0, 0.1, 99.0):
        decision = policy.decide(PoolView(now_s, None, [ModelView("m", 3, **queues)], can_prefetch=True))
        assert ("m", None) == (decision.run, decision.prefetch)


def test_an_unknown_policy_is_refused():
    """The error names the known ones."""
    with pytest.raises(ConfigError, match=r"scheduling\.policy: no policy 'fifo'; known: aegaeon, request_level, "):
        load_turn_policy("fifo")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("slack", {"horizon": 1}, "horizon: policy 'slack' has no such option; known: min_turn_s, overhead_frac"),
        ("round_robin", {"x": 1}, "x: policy 'round_robin' has no such option; it has none"),
        ("slack", {"max_wait_s": "30"}, "max_wait_s: expected a finite number, got '30'"),
        ("slack", {"max_wait_s": float("nan")}, "max_wait_s: expected a finite number, got nan"),
        ("slack", {"copy_frac": 0}, "copy_frac: must be above 0 and at most 1"),
        ("aegaeon", {"group_size": 0}, "group_size: must be 1 or more"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    """The error names the key as it stands in the pool file."""
    with pytest.raises(ConfigError) as caught:
        load_turn_policy(name, options)
    assert str(caught.value).startswith(f"scheduling.options.{message}")


def test_options_reach_the_policy():
    """An option that is given replaces the default: here the shortest turn."""
    views = [ModelView("a", 0, num_running=1, next_due_s=9.0), ModelView("b", 1, num_running=1, next_due_s=1.0)]
    for min_turn_s, run in ((0.5, "a"), (0.0, "b")):
        policy = load_turn_policy("slack", {"min_turn_s": min_turn_s})
        policy.decide(PoolView(0.0, None, views[:1]))
        assert run == policy.decide(PoolView(0.1, "a", views, turn_started_s=0.0)).run


def test_residency_reads_like_text():
    """Values go into metrics and state as they are."""
    assert ["on disk", "copying", "in host memory", "on device"] == [str(residency) for residency in Residency]
