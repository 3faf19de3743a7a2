# SPDX-License-Identifier: Apache-2.0
"""The host ledger counts every byte once and never exceeds its budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenpool.errors import CapacityError
from tokenpool.memory.host_ledger import HostLedger, HostUse

pytestmark = pytest.mark.cpu

MOVES = st.lists(st.tuples(st.booleans(), st.sampled_from("ab"), st.sampled_from(HostUse), st.integers(0, 40)))


@given(MOVES)
def test_books_equal_a_plain_dict(moves):
    """Whatever is taken and given, the ledger agrees with a dict; what does not fit is refused and changes nothing."""
    ledger, model = HostLedger(100), {}
    for take, owner, use, nbytes in moves:
        held = model.get((owner, use), 0)
        if take and sum(model.values()) + nbytes > 100:
            with pytest.raises(CapacityError, match="raise host_memory"):
                ledger.take(owner, use, nbytes)
        elif take:
            ledger.take(owner, use, nbytes)
            model[owner, use] = held + nbytes
        elif nbytes > held:
            with pytest.raises(AssertionError):
                ledger.give(owner, use, nbytes)
        else:
            ledger.give(owner, use, nbytes)
            model[owner, use] = held - nbytes
        ledger.check()
        assert ledger.free_bytes == 100 - sum(model.values())
        assert {k: ledger.held(*k) for k in model} == model


def test_asks_for_room_before_it_refuses():
    """`make_room` hears how much is missing; what it frees is handed out."""
    ledger, asked = HostLedger(10), []
    ledger.take("a", HostUse.CACHED_KV, 8)

    def make_room(nbytes):
        asked.append(nbytes)
        ledger.give("a", HostUse.CACHED_KV, 8)

    ledger.make_room = make_room
    ledger.take("b", HostUse.WEIGHTS, 9)

    assert asked == [7]
    assert ledger.snapshot() == {"weights": {"b": 9}}
