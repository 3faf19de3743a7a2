# SPDX-License-Identifier: Apache-2.0
"""Limits in a table that several processes map are those of one process, and a dead one holds nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenpool.policy.leases import Lease
from tokenpool.policy.rate_limit import TokenBucket
from tokenpool.serve.access.shared_limits import SharedLimits, TenantRow
from tokenpool.serve.frontends.frontend_reports import merged_reports, used_only
from tokenpool.tenant_config import TenantConfig, hash_key

pytestmark = pytest.mark.cpu

TENANTS = [
    TenantConfig("a", (hash_key("tp-a-11111111"),), requests_per_minute=30, tokens_per_minute=600),
    TenantConfig("b", (hash_key("tp-b-22222222"),), requests_per_minute=7, max_concurrent=2),
]


@pytest.fixture
def table(tmp_path: Path) -> Callable[[], SharedLimits]:
    """Maps the same table again with each call, as another process does."""
    path = str(tmp_path / "limits")
    SharedLimits.create(path, TENANTS, 3)
    return lambda: SharedLimits(path, 3)


STEPS = st.lists(st.tuples(st.integers(0, 2), st.floats(0, 20), st.floats(-50, 200)), max_size=30)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(steps=STEPS)
def test_a_bucket_in_the_table_is_a_bucket(steps: list[tuple[int, float, float]], tmp_path: Path) -> None:
    """Whoever takes, and whenever, the level is that of one bucket that all had taken from."""
    path = tmp_path / "limits"
    path.unlink(missing_ok=True)
    SharedLimits.create(str(path), TENANTS, 3)
    shared = [TenantRow(SharedLimits(str(path), 3), 0, i).bucket("tokens", 600) for i in range(3)]
    now_s = shared[0]._limits.read(0, "tokens")[1]
    single = TokenBucket(600, now_s=now_s)
    for who, wait_s, amount in steps:
        now_s += wait_s
        shared[who].take(now_s, amount)
        single.take(now_s, amount)
        assert {bucket.level(now_s) for bucket in shared} == {single.level(now_s)}
        assert shared[who].ready_in_s(now_s, 5) == single.ready_in_s(now_s, 5)


def test_calls_are_counted_over_all_and_forgotten_with_their_frontend(table: Callable[[], SharedLimits]) -> None:
    rows = [TenantRow(table(), 1, i) for i in range(3)]
    other = TenantRow(table(), 0, 1)
    other.note_sequences(9)
    assert [row.note_sequences(count) for row, count in zip(rows, (2, 3, 4), strict=True)] == [2, 5, 9]
    table().forget(1)
    assert rows[0].note_sequences(1) == 5
    assert other.note_sequences(0) == 0


def test_a_table_of_a_server_among_several_keeps_to_its_leases(tmp_path: Path) -> None:
    """It has nothing before it is given something; then its part, as full as is said, at all frontends at once."""
    path = str(tmp_path / "limits")
    limits = SharedLimits.create(path, TENANTS, 3, is_leased=True)
    rows = [TenantRow(SharedLimits(path, 3), 1, i) for i in range(2)]
    buckets = [row.bucket("requests", 7) for row in rows]
    now_s = limits.read(1, "requests")[1] + 1.0
    assert ([row.lease for row in rows], buckets[0].level(now_s) < 0.01) == ([Lease(0.0, 0)] * 2, True)

    per_minute = {"requests": 7, "tokens": None}
    limits.set_lease(1, Lease(1.0, 2, 1.0), per_minute)
    assert [bucket.level(now_s) for bucket in buckets] == [pytest.approx(7, abs=1.1)] * 2
    limits.set_lease(1, Lease(0.5, 1), per_minute)
    assert [bucket.capacity for bucket in buckets if bucket.level(now_s)] == [3.5, 3.5]
    assert [row.lease for row in rows] == [Lease(0.5, 1)] * 2
    assert rows[0].note_sequences(2) == 2
    assert SharedLimits.create(str(tmp_path / "alone"), TENANTS, 1).lease(1) is None


def test_tenants_and_kinds_have_buckets_of_their_own(table: Callable[[], SharedLimits]) -> None:
    limits = table()
    requests, tokens = (TenantRow(limits, 0, 0).bucket(kind, n) for kind, n in (("requests", 30), ("tokens", 600)))
    others = TenantRow(limits, 1, 2).bucket("requests", 7)
    now_s = limits.read(0, "tokens")[1]
    tokens.take(now_s, 100)
    others.take(now_s, 2)
    assert (requests.level(now_s), tokens.level(now_s), others.level(now_s)) == (30, 500, 5)


def _take_and_die(path: str) -> None:
    limits = SharedLimits(path, 3)
    with limits.locked():
        TenantRow(limits, 0, 1).bucket("requests", 30).take(limits.read(0, "requests")[1], 10)
        os._exit(9)


def test_a_process_that_dies_with_the_lock_leaves_it_open(tmp_path: Path) -> None:
    path = str(tmp_path / "limits")
    limits = SharedLimits.create(path, TENANTS, 3)
    process = multiprocessing.get_context("fork").Process(target=_take_and_die, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 9
    bucket = TenantRow(limits, 0, 0).bucket("requests", 30)
    assert bucket.level(limits.read(0, "requests")[1]) == 20


def _take_and_stop(path: str) -> None:
    limits = SharedLimits(path, 3)
    with limits.locked():
        os.kill(os.getpid(), signal.SIGSTOP)


def test_one_that_is_stopped_with_the_lock_stops_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The others go on with what the table holds and say so once, and lock again when the lock is back."""
    path = str(tmp_path / "limits")
    limits = SharedLimits.create(path, TENANTS, 3)
    process = multiprocessing.get_context("fork").Process(target=_take_and_stop, args=(path,))
    process.start()
    assert process.pid is not None
    try:
        os.waitpid(process.pid, os.WUNTRACED)
        row = TenantRow(limits, 1, 0)
        assert [1, 2, 3] == [row.note_sequences(count) for count in (1, 2, 3)]
        bucket, now_s = row.bucket("requests", 7), limits.read(1, "requests")[1]
        bucket.take(now_s, 2)
        assert 5 == bucket.level(now_s)
        assert 1 == caplog.text.count("kept without it")
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    with limits.locked():
        assert limits._holds


def test_reports_add_up_and_a_dead_frontend_has_nothing_in_flight() -> None:
    def report(inflight: int, requests: int, left: int) -> dict:
        usage = {"m": {"requests": requests, "prompt_tokens": 5, "completion_tokens": 7}}
        tenant = {"limits": {"max_concurrent": 4}, "remaining": {"requests": left}, "inflight": inflight,
                  "usage": usage, "refused": {"queue": 1}, "held": {"m": inflight}}  # fmt: skip
        return {"inflight": {"m": inflight}, "tenants": {"t": tenant}}

    merged = merged_reports([report(2, 10, 3), report(1, 20, 4), used_only(report(5, 100, 9))])
    tenant = merged["tenants"]["t"]
    assert merged["inflight"] == {"m": 3}
    assert (tenant["inflight"], tenant["held"]) == (3, {"m": 3})
    assert tenant["usage"] == {"m": {"requests": 130, "prompt_tokens": 15, "completion_tokens": 21}}
    assert (tenant["refused"], tenant["remaining"], tenant["limits"]) == (
        {"queue": 3}, {"requests": 3}, {"max_concurrent": 4},
    )  # fmt: skip
