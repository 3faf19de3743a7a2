# SPDX-License-Identifier: Apache-2.0
"""Memory and link of a simulated device: bytes add up, and what waits for a copy waits for the right one."""

from __future__ import annotations

import pytest

from tokenpool.config import SLO
from tokenpool.policy.turns import Residency
from tokenpool.sim.device_memory import DeviceMemory
from tokenpool.sim.device_spec import DeviceSpec
from tokenpool.sim.seat import Seat
from tokenpool.sim.timeline import Timeline
from tokenpool.sim.workload import ModelCosts, SimRequest

pytestmark = pytest.mark.cpu

GIB = 1 << 30
COSTS = ModelCosts(GIB, GIB / 1000, 0.1, 0.0, 0.0, 0.01, 0.0, 0.0)
"""1 GiB of weights, and as much KV for a thousand tokens: a second over the link each."""


def memory(capacity_gib: float, *names: str, **fields) -> tuple[DeviceMemory, dict[str, Seat]]:
    seats = {name: Seat(name, index, COSTS) for index, name in enumerate(names)}
    return DeviceMemory(DeviceSpec(int(capacity_gib * GIB), GIB, **fields), seats), seats


def idle(seat: Seat, spare: str | None) -> float:
    return 0.1


def test_loads_come_one_after_the_other():
    """The second copy of weights begins when the first has ended."""
    device, seats = memory(4, "a", "b")
    ready = [device.load(seats[name], 0.0, idle, keep=frozenset()) for name in "ab"]

    assert [1.0, 2.0] == ready
    assert 0.5 == device.ready_in_s(seats["a"], 0.5)
    device.settle(1.0)
    assert (Residency.ON_DEVICE, Residency.COPYING) == (seats["a"].residency, seats["b"].residency)
    assert 2 * GIB == device.free_bytes


def test_kv_overtakes_weights_on_their_way():
    """KV of a model that may run is not held up by a prefetch, which comes later by as much."""
    device, seats = memory(4, "a", "b")
    device.load(seats["a"], 0.0, idle, keep=frozenset())
    device.settle(1.0)
    device.load(seats["b"], 1.0, idle, keep=frozenset())
    request = Timeline(SimRequest(0.0, "a", 99, 10), SLO(1.0, 1.0))
    request.deliver(0.5, 0.1, 1)
    seats["a"].resume(request)

    assert 1.3 == pytest.approx(device.load(seats["a"], 1.2, idle, keep=frozenset("a")))
    assert 2.1 == pytest.approx(seats["b"].ready_at_s)
    assert [request] == seats["a"].running and 0.0 == seats["a"].kv_out_bytes


def test_what_cannot_be_had_changes_nothing():
    """A load that others leave no room for is refused and leaves all as it was."""
    device, seats = memory(1.5, "a", "b")
    device.load(seats["a"], 0.0, idle, keep=frozenset())
    device.settle(1.0)
    free = device.free_bytes

    assert device.try_load(seats["b"], 1.0, idle, keep=frozenset("ab")) is None
    assert (free, Residency.IN_HOST) == (device.free_bytes, seats["b"].residency)
    with pytest.raises(MemoryError, match="b does not fit"):
        device.load(seats["b"], 1.0, idle, keep=frozenset("ab"))


def test_the_number_of_resident_models_is_kept():
    """With room for more, `max_resident` lets the one least likely needed go."""
    device, seats = memory(8, "a", "b", "c", max_resident=2)
    for time_s, name in enumerate("abc"):
        device.settle(time_s)
        device.load(seats[name], time_s, lambda seat, spare: 0.9 if seat.name == "a" else 0.1, keep=frozenset(name))

    assert Residency.IN_HOST is seats["b"].residency
    assert 1 == device.evictions
