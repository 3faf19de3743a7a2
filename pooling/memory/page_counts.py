# SPDX-License-Identifier: Apache-2.0
"""How many pages a budget must have: the arithmetic of whoever plans, places or reserves device memory."""

from __future__ import annotations

from collections.abc import Iterable

_NULL_PAGES = 1
"""For the null blocks of all models."""


def pages_for(nbytes: float, page_size: int) -> int:
    """Whole pages that hold `nbytes`, 0 or more."""
    return int(-(-nbytes // page_size))


def model_pages(weight_bytes: int, page_size: int, kv_floor_pages: int = 1) -> int:
    """Pages of a model's weights and of the KV that is promised to it."""
    return pages_for(weight_bytes, page_size) + kv_floor_pages


def needed_pages(weight_bytes: Iterable[int], page_size: int, kv_floor_pages: int = 1) -> int:
    """Pages that a device must have for models of such weights to be on it together."""
    return sum([model_pages(nbytes, page_size, kv_floor_pages) for nbytes in weight_bytes]) + _NULL_PAGES
