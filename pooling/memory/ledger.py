# SPDX-License-Identifier: Apache-2.0
"""The one book of device pages: who holds which page, for what use. Pure Python, no device calls."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum

from tokenpool.errors import CapacityError


class PageUse(StrEnum):
    """What a page is used for."""

    KV = "kv"
    WEIGHTS = "weights"
    NULL = "null"
    LENT = "lent"
    """Nothing of the pool's: the memory is lent to others."""


LENT_OWNER = "outside the pool"
"""Who holds the pages that are lent."""


@dataclass(frozen=True, slots=True)
class LedgerSnapshot:
    """State of the ledger at one moment; counts are pages."""

    page_size: int
    num_pages: int
    num_free: int
    held: dict[str, dict[str, int]]
    """use -> owner -> pages; only non-zero entries."""


class PageLedger:
    """Owns the page ids 0..num_pages-1 and says who holds each one.

    A page id is one unit of physical device memory. On the CPU device page k backs slab k of the KV arena
    or, when it is accounted to weights, nothing in the arena. Called on the host loop's thread only.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1:
            raise CapacityError(
                f"device_memory holds no page of {page_size} bytes: raise device_memory or lower page_size"
            )
        self.num_pages = num_pages
        self.page_size = page_size
        # A stack: the page given back last is still warm in the caches and is handed out first.
        self._free = list(range(num_pages - 1, -1, -1))
        self._holder: dict[int, tuple[str, PageUse]] = {}
        self._counts: Counter[tuple[str, PageUse]] = Counter()

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    @property
    def num_usable(self) -> int:
        """Pages that are not lent."""
        return self.num_pages - self.held(LENT_OWNER, PageUse.LENT)

    def held(self, owner: str, use: PageUse) -> int:
        """Pages that `owner` holds for `use`."""
        return self._counts[owner, use]

    def total(self, use: PageUse) -> int:
        """Pages held for `use` by all owners together."""
        return sum(n for (_, u), n in self._counts.items() if u == use)

    def take(self, owner: str, use: PageUse, count: int = 1) -> list[int]:
        """Hand `count` free pages to `owner`; raises CapacityError and changes nothing if too few are free."""
        if count > len(self._free):
            raise CapacityError(
                f"{owner!r} needs {count} pages for {use}, {len(self._free)} of {self.num_pages} are free",
                needed_pages=count,
                free_pages=len(self._free),
                holders={f"{o}:{u}": n for (o, u), n in self._counts.items() if n},
            )
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holder[page] = (owner, use)
        self._counts[owner, use] += count
        return pages

    def give(self, owner: str, use: PageUse, pages: list[int]) -> None:
        """Take `pages` back from `owner`, who must hold each of them for `use`."""
        for page in pages:
            if self._holder.get(page) != (owner, use):
                raise AssertionError(f"page {page} is held by {self._holder.get(page)}, not {(owner, use)}")
            del self._holder[page]
        self._counts[owner, use] -= len(pages)
        self._free.extend(pages)

    def holder(self, page: int) -> tuple[str, PageUse] | None:
        """Owner and use of `page`, or None when it is free."""
        return self._holder.get(page)

    def check(self) -> None:
        """Raise AssertionError unless free + held == total, every page counted once."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & self._holder.keys(), "a page is both free and held"
        assert free | self._holder.keys() == set(range(self.num_pages)), "a page is lost"
        assert Counter(self._holder.values()) == +self._counts, "counts differ from the pages held"

    def snapshot(self) -> LedgerSnapshot:
        """Plain values for state, metrics and tests."""
        held: dict[str, dict[str, int]] = {}
        for (owner, use), count in sorted(self._counts.items()):
            if count:
                held.setdefault(use.value, {})[owner] = count
        return LedgerSnapshot(self.page_size, self.num_pages, self.num_free, held)
