# SPDX-License-Identifier: Apache-2.0
"""Pages are counted alike by whoever plans, places or reserves."""

from __future__ import annotations

import pytest

from tokenpool.memory.page_counts import model_pages, needed_pages, pages_for

pytestmark = pytest.mark.cpu


def test_bytes_take_whole_pages():
    """A page more for each byte beyond the last full one."""
    assert [0, 1, 1, 2, 3] == [pages_for(nbytes, 8) for nbytes in (0, 1, 8, 9, 16.5)]


def test_models_need_their_weights_their_kv_and_one_null_page():
    """The null page is for all together; a model of unknown size needs its KV."""
    assert 4 == model_pages(17, 8)
    assert 7 == model_pages(17, 8, kv_floor_pages=4)
    assert 1 + 2 + 4 + 1 == needed_pages([0, 8, 17], 8)
    assert 1 + 5 + 4 * 2 == needed_pages([8, 32], 8, kv_floor_pages=4)
