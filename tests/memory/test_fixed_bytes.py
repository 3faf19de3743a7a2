# SPDX-License-Identifier: Apache-2.0
"""What stays on the device of movable models is in the page ledger: as one sum, rounded up once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.devices.weight_rig import Rig
from tokenpool.errors import CapacityError
from tokenpool.memory.fixed_bytes import FIXED_OWNER, UNCOUNTED_SHARE, FixedBytes
from tokenpool.memory.ledger import PageLedger, PageUse

pytestmark = pytest.mark.cpu

PAGE = 64 << 10
PAGES = 8


def book() -> tuple[PageLedger, FixedBytes]:
    ledger = PageLedger(PAGES, PAGE)
    return ledger, FixedBytes(ledger)


def add(fixed: FixedBytes, owner: str, nbytes: int) -> None:
    fixed.add(owner, nbytes, lambda pages: None)


def test_small_models_cost_no_page_alone_and_one_together():
    """Up to 1/16 of a page in the whole pool is not counted; then there is one page for all."""
    ledger, fixed = book()
    share = PAGE // UNCOUNTED_SHARE
    for number in range(8):
        add(fixed, str(number), share // 8)
    assert (0, PAGES) == (fixed.num_pages, ledger.num_free)
    add(fixed, "one more", 1)
    assert (1, PAGES - 1) == (fixed.num_pages, ledger.num_free)
    assert {"weights": {FIXED_OWNER: 1}} == ledger.snapshot().held
    add(fixed, "large", PAGE - 1)
    assert 1 == fixed.num_pages
    add(fixed, "last", 1)
    assert 2 == fixed.num_pages
    assert (PAGE - 1, 0) == (fixed.of("large"), fixed.of("nobody"))
    fixed.check()


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 3 * PAGE)), max_size=12))
def test_pages_follow_the_sum(steps):
    """Whoever comes and goes, the pages are within 1/16 of one of the bytes, and all come back."""
    ledger, fixed = book()
    held: dict[str, int] = {}
    for owner, nbytes in steps:
        if owner in held:
            fixed.remove(owner)
            del held[owner]
        else:
            try:
                add(fixed, owner, nbytes)
                held[owner] = nbytes
            except CapacityError:
                assert 0 == fixed.of(owner)
        fixed.check()
        ledger.check()
        assert -PAGE < sum(held.values()) - fixed.num_pages * PAGE <= PAGE // UNCOUNTED_SHARE
    for owner in held:
        fixed.remove(owner)
    assert PAGES == ledger.num_free


def test_room_is_made_for_what_is_missing_only():
    """As many pages as the sum grows by; a failure changes nothing."""
    ledger, fixed = book()
    ballast = ledger.take("others", PageUse.KV, PAGES - 1)
    add(fixed, "a", PAGE)
    asked = []

    def make_room(pages: int) -> None:
        asked.append(pages)
        ledger.give("others", PageUse.KV, [ballast.pop() for _ in range(pages)])

    fixed.add("b", 2 * PAGE, make_room)
    assert [2] == asked
    with pytest.raises(CapacityError):
        add(fixed, "c", PAGE)
    fixed.check()
    assert 0 == fixed.of("c")
    add(fixed, "c", 0)


def test_a_model_that_is_removed_takes_its_fixed_bytes_with_it():
    """The weight store has the book, and its check looks at it."""
    rig = Rig()
    rig.store.adopt("a", [])
    rig.store.fixed.add("a", 2 * rig.store.ledger.page_size, rig.store.make_room)
    rig.store.check()
    assert 2 == rig.store.fixed.num_pages
    rig.store.remove("a")
    rig.store.check()
    rig.store.close()
    rig.assert_empty()
