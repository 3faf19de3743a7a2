# SPDX-License-Identifier: Apache-2.0
"""Tenants share a budget: nobody has more than is left, and whoever comes next finds some."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenpool.serve.access.byte_shares import ByteShares

pytestmark = pytest.mark.cpu

MAX = 1000


@pytest.mark.parametrize(("tenants", "each"), [(1, 500), (2, 333), (3, 250)])
def test_each_of_some_that_want_all_has_the_same(tenants: int, each: int) -> None:
    """One has half, two a third each, three a quarter; without tenants all may be taken."""
    shares, names = ByteShares(MAX), [f"t{i}" for i in range(tenants)]
    for _ in range(MAX):
        for name in names:
            shares.take(name, 1)
    assert [each] * tenants == [shares._own[name] for name in names]
    nobody = ByteShares(MAX)
    assert all(nobody.take("", 1) for _ in range(MAX)) and not nobody.take("", 1)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, MAX)), max_size=60), st.randoms())
def test_the_books_agree_whatever_comes_and_goes(wanted: list[tuple[str, int]], random) -> None:
    """Never more than there is, a refusal only for one of two reasons, and all is given back in the end."""
    shares, taken = ByteShares(MAX), list[tuple[str, int]]()
    for owner, size in wanted:
        own, left = sum(n for name, n in taken if name == owner), MAX - sum(n for _, n in taken)
        fits, took = shares.fits(owner, size), shares.take(owner, size)
        assert fits == took
        assert took == (size <= left and (not own or own + size <= left - size))
        if took:
            taken.append((owner, size))
        while taken and random.random() < 0.3:
            shares.give_back(*taken.pop(random.randrange(len(taken))))
        assert shares.num_bytes == sum(n for _, n in taken) <= MAX
    for each in taken:
        shares.give_back(*each)
    assert (0, Counter()) == (shares.num_bytes, shares._own)
