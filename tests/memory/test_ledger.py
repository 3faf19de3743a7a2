# SPDX-License-Identifier: Apache-2.0
"""The ledger against a dict of page -> holder: no page is lost, doubled or given back by a stranger."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tokenpool.errors import CapacityError
from tokenpool.memory.ledger import PageLedger, PageUse

pytestmark = pytest.mark.cpu

PAGE = 64 << 10
OWNERS = st.sampled_from(["a", "b", "c"])
USES = st.sampled_from(list(PageUse))


class LedgerMachine(RuleBasedStateMachine):
    """Random takes and gives; `held` is the model."""

    @initialize(num_pages=st.integers(1, 12))
    def start(self, num_pages: int) -> None:
        self.ledger = PageLedger(num_pages, PAGE)
        self.held: dict[int, tuple[str, PageUse]] = {}

    @rule(owner=OWNERS, use=USES, count=st.integers(0, 13))
    def take(self, owner: str, use: PageUse, count: int) -> None:
        free = self.ledger.num_pages - len(self.held)
        if count > free:
            with pytest.raises(CapacityError, match=f"needs {count} pages .* {free} of") as caught:
                self.ledger.take(owner, use, count)
            assert (count, free) == (caught.value.needed_pages, caught.value.free_pages)
            assert len(self.held) == sum(caught.value.holders.values())
            return
        pages = self.ledger.take(owner, use, count)
        assert count == len(set(pages))
        assert not self.held.keys() & set(pages)
        self.held.update(dict.fromkeys(pages, (owner, use)))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        owner, use = data.draw(st.sampled_from(sorted(set(self.held.values()))))
        mine = sorted(page for page, holder in self.held.items() if holder == (owner, use))
        pages = data.draw(st.lists(st.sampled_from(mine), unique=True))
        self.ledger.give(owner, use, pages)
        for page in pages:
            del self.held[page]

    @rule(owner=OWNERS, use=USES, page=st.integers(0, 11))
    def give_of_another(self, owner: str, use: PageUse, page: int) -> None:
        if self.held.get(page) != (owner, use):
            with pytest.raises(AssertionError, match=f"page {page} is held by"):
                self.ledger.give(owner, use, [page])

    @invariant()
    def agrees(self) -> None:
        ledger = self.ledger
        ledger.check()
        assert len(self.held) == ledger.num_pages - ledger.num_free
        assert self.held == {p: h for p in range(ledger.num_pages) if (h := ledger.holder(p)) is not None}
        counts = Counter(self.held.values())
        snapshot = ledger.snapshot()
        assert counts == {(o, PageUse(u)): n for u, owners in snapshot.held.items() for o, n in owners.items()}
        assert (ledger.num_pages, ledger.num_free) == (snapshot.num_pages, snapshot.num_free)
        for use in PageUse:
            assert sum(n for (_, u), n in counts.items() if u is use) == ledger.total(use)
            for owner in "abc":
                assert counts[owner, use] == ledger.held(owner, use)


class TestLedger(LedgerMachine.TestCase):
    """Any history of takes and gives leaves free + held == total, one holder a page."""

    settings = settings(max_examples=60, stateful_step_count=25, deadline=None, derandomize=True)


def test_a_ledger_without_pages_is_refused():
    """Memory smaller than a page is a CapacityError that names both settings."""
    with pytest.raises(CapacityError, match="raise device_memory or lower page_size"):
        PageLedger(0, PAGE)


def test_the_page_given_back_last_is_handed_out_first():
    """Free pages are a stack."""
    ledger = PageLedger(4, PAGE)
    pages = ledger.take("a", PageUse.KV, 3)
    ledger.give("a", PageUse.KV, [pages[1]])
    assert [pages[1]] == ledger.take("b", PageUse.KV)


def test_check_notices_a_lost_page():
    """The self-check is no tautology: a page dropped from the free list is noticed."""
    ledger = PageLedger(4, PAGE)
    ledger._free.pop()
    with pytest.raises(AssertionError, match="a page is lost"):
        ledger.check()
