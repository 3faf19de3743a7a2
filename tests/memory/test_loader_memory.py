# SPDX-License-Identifier: Apache-2.0
"""Whoever still reads what the loader filled reads wrong bytes, and most of that memory is free at once."""

from __future__ import annotations

import ctypes
import weakref

import pytest
import torch

from tokenpool.memory.loader_memory import LoaderMemory

pytestmark = pytest.mark.cpu


def read(address: int, nbytes: int) -> bytes:
    return ctypes.string_at(address, nbytes)


@pytest.mark.parametrize("nbytes", [1, 4097, 3 << 20, (3 << 20) + 5])
def test_no_byte_of_it_is_left(nbytes):
    """Small storages are full of NaN; of large ones the whole pages are gone and read as zeros, the rest is NaN."""
    tensor = torch.full((nbytes,), 7, dtype=torch.uint8)
    address = tensor.data_ptr()
    memory = LoaderMemory([tensor, tensor[1:]])
    tensor.data = torch.empty(0, dtype=torch.uint8)
    memory.poison()
    assert set(read(address, nbytes)) <= {0, 0xFF}
    assert (nbytes < 1 << 20) == (set(read(address, nbytes)) == {0xFF})


def test_it_stays_until_it_is_freed():
    """Nothing else can come to its place meanwhile."""
    tensor = torch.zeros(64)
    storage = weakref.ref(tensor.untyped_storage())
    address, memory = tensor.data_ptr(), LoaderMemory([tensor])
    del tensor
    memory.poison()
    assert torch.tensor(list(read(address, 4)), dtype=torch.uint8).view(torch.float32).isnan().all()
    assert all(torch.zeros(64).data_ptr() != address for _ in range(20))
    memory.free()
    assert storage() is None


def test_tensors_that_have_moved_keep_their_bytes():
    """What is poisoned are the storages of before."""
    tensor = torch.ones(64)
    memory = LoaderMemory([tensor])
    tensor.data = torch.ones(64)
    memory.poison()
    assert tensor.eq(1).all()
