# SPDX-License-Identifier: Apache-2.0
"""The book of what stays on the device of models whose weights move: their sum, in pages of the ledger."""

from __future__ import annotations

from collections.abc import Callable

from tokenpool.memory.ledger import PageLedger, PageUse
from tokenpool.memory.page_counts import pages_for

FIXED_OWNER = "fixed tensors"
"""Who holds the pages in the ledger: all models together."""
UNCOUNTED_SHARE = 16
"""Of the sum, the last 1/16 of a page is not counted: the scales of small models do not cost a page."""


class FixedBytes:
    """Bytes by model, rounded up to pages once for all: each of many models has a few hundred, or a few megabytes."""

    def __init__(self, ledger: PageLedger) -> None:
        self._ledger = ledger
        self._bytes: dict[str, int] = {}
        self._pages: list[int] = []

    @property
    def num_pages(self) -> int:
        """Pages that no model can have, whatever leaves the device."""
        return len(self._pages)

    def of(self, owner: str) -> int:
        """Bytes of `owner` that stay on the device; 0 for a model that is not known."""
        return self._bytes.get(owner, 0)

    def add(self, owner: str, nbytes: int, make_room: Callable[[int], None]) -> None:
        """Account `nbytes` more; `make_room` frees the pages that are missing for it.

        Raises CapacityError and changes nothing if it cannot.
        """
        missing = self._pages_for(sum(self._bytes.values()) + nbytes) - len(self._pages)
        if missing > 0:
            make_room(missing)
            self._pages += self._ledger.take(FIXED_OWNER, PageUse.WEIGHTS, missing)
        self._bytes[owner] = self.of(owner) + nbytes

    def remove(self, owner: str) -> None:
        """Forget what `owner` has, if anything, and give the pages back that are not needed any more."""
        self._bytes.pop(owner, None)
        needed = self._pages_for(sum(self._bytes.values()))
        self._pages, spare = self._pages[:needed], self._pages[needed:]
        self._ledger.give(FIXED_OWNER, PageUse.WEIGHTS, spare)

    def check(self) -> None:
        """Raise AssertionError unless the ledger has the pages for the sum of the bytes."""
        held = self._ledger.held(FIXED_OWNER, PageUse.WEIGHTS)
        needed = self._pages_for(sum(self._bytes.values()))
        assert held == len(self._pages) == needed, f"fixed bytes need {needed} pages, {held} in the ledger"

    def _pages_for(self, nbytes: int) -> int:
        page = self._ledger.page_size
        return pages_for(max(0, nbytes - page // UNCOUNTED_SHARE), page)
