# SPDX-License-Identifier: Apache-2.0
"""A seat of a cluster at a server with several frontends: what they say of it counts, for that seat and no other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.serve.frontends.shared_seats import SharedSeats, shared_seats
from tokenpool.cluster.values import SeatState
from tokenpool.errors import HostError
from tokenpool.serve.frontends import shared_cluster

pytestmark = pytest.mark.vllm

Test = Callable[[SharedSeats], Awaitable[None]]


@pytest.fixture
def seats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Test], None]:
    """Runs a test with a model that has no seat yet."""

    def run(test: Test) -> None:
        async def within_limit() -> None:
            async with asyncio.timeout(20), shared_seats(monkeypatch, tmp_path) as seats:
                await test(seats)

        asyncio.run(within_limit())

    return run


def test_it_serves_once_all_have_joined_and_is_left_once_all_have_left(seats: Callable[[Test], None]) -> None:
    async def test(s: SharedSeats) -> None:
        s.gates["join", 1].clear()
        s.see(SeatState.SERVING)
        await s.show()
        assert not s.model.is_served
        s.gates["join", 1].set()
        await s.until(lambda: s.model.is_served and s.told == ["joined"])
        s.gates["leave", 0].clear()
        s.see(SeatState.LEAVING)
        await s.show()
        assert s.told == ["joined"]
        s.gates["leave", 0].set()
        await s.until(lambda: s.told == ["joined", "left"])
        assert not s.model.is_served

    seats(test)


def test_hosts_that_forgot_the_server_are_joined_anew_whoever_sees_that_first(seats: Callable[[Test], None]) -> None:
    """Frontends may have joined again before the supervisor has the controller's next view."""

    async def test(s: SharedSeats) -> None:
        s.see(SeatState.SERVING)
        await s.show()
        await s.until(lambda: s.model.is_served)
        s.hosts.num_attachments += 1
        s.model.attach_anew()
        await s.show()
        s.see(SeatState.SERVING)
        await s.show()
        await s.until(lambda: s.model.is_served)
        assert [s.follower(index).num_joined for index in (0, 1)] == [2, 2]

    seats(test)


def test_attempts_that_took_too_long_are_no_reason_to_forget_who_has_joined(
    seats: Callable[[Test], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_cluster, "JOIN_LIMIT_S", 0.01)

    async def test(s: SharedSeats) -> None:
        s.gates["join", 1].clear()
        s.see(SeatState.SERVING)
        await s.show()
        await s.until(lambda: s.model.error is not None)
        s.gates["join", 1].set()
        await s.until(lambda: s.model.is_served)
        assert s.model.error is None

    seats(test)


def test_a_model_that_a_frontend_could_not_build_at_first_is_served_once_it_can(
    seats: Callable[[Test], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it takes; and losing its host later is no such fault."""
    monkeypatch.setattr(shared_cluster, "JOIN_LIMIT_S", 0.01)

    async def test(s: SharedSeats) -> None:
        s.gates["join", 1].clear()
        s.see(SeatState.SERVING)
        await s.show()
        s.model.give_up(HostError("no memory for its app"))
        await asyncio.sleep(0.05)
        s.gates["join", 1].set()
        await s.until(lambda: s.model.is_served)
        s.see(None)
        assert not s.model.is_served and s.model.error is None

    seats(test)


def test_a_late_word_counts_for_no_later_seat_at_that_host(seats: Callable[[Test], None]) -> None:
    async def test(s: SharedSeats) -> None:
        s.see(SeatState.SERVING)
        await s.show()
        await s.until(lambda: s.model.is_served)
        s.gates["say", 1].clear()
        s.see(SeatState.LEAVING)
        await s.show()
        s.see(None)
        await s.show(0)
        s.see(SeatState.SERVING)
        await s.show(0)
        s.gates["leave", 1].clear()
        s.see(SeatState.LEAVING)
        await s.show(0)
        s.gates["say", 1].set()  # it is the first seat that it has left
        await asyncio.sleep(0.01)
        assert "left" not in s.told
        s.gates["leave", 1].set()
        await s.show()
        await s.until(lambda: "left" in s.told)

    seats(test)


def test_a_seat_that_is_gone_is_left(seats: Callable[[Test], None]) -> None:
    """Nobody waits for a frontend that never was there to say so; the next seat at that host is left as any other."""

    async def test(s: SharedSeats) -> None:
        s.see(SeatState.SERVING)
        await s.show()
        await s.until(lambda: s.model.is_served)
        s.follower(1)._joining.clear()  # its successor, to which the seat is shown as one that is being removed
        s.see(SeatState.REMOVING)
        await s.show()
        s.see(None)
        await s.show()
        assert not s.model.is_served and not s.model._leaving
        s.see(SeatState.SERVING)
        await s.show()
        await s.until(lambda: s.model.is_served)
        s.told.clear()
        s.see(SeatState.LEAVING)
        await s.show()
        await s.until(lambda: s.told == ["left"])

    seats(test)
