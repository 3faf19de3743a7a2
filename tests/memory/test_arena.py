# SPDX-License-Identifier: Apache-2.0
"""The arena: block-id arithmetic, null blocks, zeroed and inaccessible slabs."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tokenpool.errors import CapacityError
from tokenpool.memory.arena import NULL_OWNER, ArenaView, KVArena
from tokenpool.memory.devices.cpu import CpuDevice
from tokenpool.memory.ledger import PageLedger, PageUse

pytestmark = pytest.mark.cpu

PAGE = 64 << 10
laws = settings(max_examples=150, deadline=None, derandomize=True)


@contextmanager
def arena_of(num_pages: int, *, page_size: int = PAGE, keeps_bytes: bool = False) -> Iterator[KVArena]:
    arena = KVArena(CpuDevice(keeps_bytes=keeps_bytes), PageLedger(num_pages, page_size), poison=True)
    try:
        yield arena
    finally:
        arena.close()


def take_slab(arena: KVArena, owner: str = "a") -> int:
    slab = arena.ledger.take(owner, PageUse.KV)[0]
    arena.map_slab(slab)
    return slab


def slab_bytes_of(arena: KVArena, slab: int) -> torch.Tensor:
    return arena.device.tensor(arena.base + arena.null_bytes + slab * arena.slab_bytes, arena.slab_bytes)


def null_block_of(arena: KVArena, view: ArenaView) -> torch.Tensor:
    return arena.tensor(view)[: view.block_bytes]


# -- block ids ---------------------------------------------------------------------------------------


@laws
@given(
    block_bytes=st.integers(1, PAGE),
    offset=st.integers(0, 63 * PAGE),
    page_size=st.sampled_from([4096, 16 << 10, PAGE]),
    num_pages=st.integers(1, 6),
)
def test_blocks_of_slabs_partition_what_fits_whole(block_bytes, offset, page_size, num_pages):
    """Each slab's ids are exactly the blocks wholly inside it, and no id is in two slabs."""
    assume(offset <= 63 * page_size)
    with arena_of(num_pages, page_size=page_size) as arena:
        view = ArenaView("a", offset, block_bytes)
        last_id = 0
        for slab in range(num_pages):
            ids = arena.block_ids(view, slab)
            start = arena.null_bytes + slab * page_size
            end = start + page_size
            assert len(ids) >= arena.min_blocks_per_slab(view)
            for block_id in {*ids[:1], *ids[-1:]}:
                address = offset + block_id * block_bytes
                assert start <= address
                assert address + block_bytes <= end
                assert slab == arena.slab_of(view, block_id)
            if ids:
                assert ids[0] > last_id, "block 0 is the null block, other ids are in one slab only"
                last_id = ids[-1]
                # Nothing that fits is left out.
                assert offset + (ids[0] - 1) * block_bytes < start
                assert offset + (ids[-1] + 1) * block_bytes + block_bytes > end
        assert (last_id + 1) * block_bytes <= arena.span_bytes
        assert arena.slab_of(view, 0) < 0
        assert offset + arena.span_bytes <= arena._reserved_bytes


@laws
@given(block_bytes=st.integers(1, PAGE))
def test_the_bound_on_blocks_per_slab_is_tight(block_bytes):
    """At the worst phase, one byte past a block's start, a slab holds exactly min_blocks_per_slab."""
    with arena_of(1) as arena:
        view = ArenaView("a", (arena.null_bytes - 1) % block_bytes, block_bytes)
        assert arena.min_blocks_per_slab(view) == len(arena.block_ids(view, 0))


# -- null blocks -------------------------------------------------------------------------------------


@settings(laws, max_examples=40)
@given(
    steps=st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, PAGE // 2)), min_size=1, max_size=14),
)
def test_null_blocks_are_private_mapped_and_zeroed_on_close(steps):
    """Views opened and closed in any order: null blocks never overlap, stay writable and start as zeros."""
    with arena_of(16) as arena:
        open_views: dict[str, ArenaView] = {}
        for owner, block_bytes in steps:
            if owner in open_views:
                arena.close_view(owner)
                del open_views[owner]
            else:
                view = arena.open_view(owner, block_bytes)
                assert not null_block_of(arena, view).any()
                null_block_of(arena, view).fill_(ord(owner))
                open_views[owner] = view
            for other, view in open_views.items():
                assert bool((null_block_of(arena, view) == ord(other)).all())
            arena.check()
        for owner in open_views:
            arena.close_view(owner)
        assert not arena.device.tensor(arena.base, len(arena._null_pages) * PAGE).any()
        assert len(arena._null_pages) == arena.ledger.held(NULL_OWNER, PageUse.NULL)


def test_the_place_of_a_closed_null_block_is_used_again():
    """Adding and removing a model for ever needs no more null pages than once."""
    with arena_of(2) as arena:
        for _ in range(50):
            arena.open_view("a", PAGE // 2)
            arena.close_view("a")
        assert arena.ledger.held(NULL_OWNER, PageUse.NULL) == 1


def test_a_block_larger_than_a_page_is_refused():
    """The error says both sizes and what to change; nothing is taken."""
    with arena_of(4) as arena:
        with pytest.raises(CapacityError, match=f"'a': one KV block .* {PAGE + 1} bytes.*{PAGE}; raise page_size"):
            arena.open_view("a", PAGE + 1)
        assert arena.ledger.num_free == 4


def test_a_view_whose_slabs_may_hold_no_block_is_refused():
    """A block over half a page that is not aligned to pages would make slabs without a single block."""
    with arena_of(4) as arena:
        with pytest.raises(CapacityError, match="may hold none of them whole; raise page_size"):
            arena.open_view("a", PAGE // 2 + 4096)
        assert arena.ledger.num_free == 4
        assert arena.min_blocks_per_slab(arena.open_view("b", PAGE)) == 1


@laws
@given(sizes=st.lists(st.integers(1, PAGE), min_size=1, max_size=4))
def test_every_view_that_opens_has_a_block_in_every_slab(sizes):
    """A granted slab always brings at least one block."""
    with arena_of(12) as arena:
        for index, block_bytes in enumerate(sizes):
            try:
                view = arena.open_view(str(index), block_bytes)
            except CapacityError:
                continue
            assert 1 <= arena.min_blocks_per_slab(view)
            assert all(len(arena.block_ids(view, slab)) >= arena.min_blocks_per_slab(view) for slab in range(12))


def test_a_full_null_region_is_refused():
    """The 65th null block of a page each finds no place, and the error counts the models."""
    with arena_of(70) as arena:
        for index in range(64):
            arena.open_view(str(index), PAGE)
        with pytest.raises(CapacityError, match="64 models fill the arena's null region .*; raise page_size or remove"):
            arena.open_view("one more", PAGE)


def test_a_null_block_without_free_pages_is_refused():
    """Without a free page for the null block no view is opened, and no page is taken."""
    with arena_of(3) as arena:
        arena.ledger.take("x", PageUse.WEIGHTS, 3)
        with pytest.raises(CapacityError, match="needs 1 pages for null, 0 of 3 are free"):
            arena.open_view("a", 4096)
        arena.check()
        assert not arena._views


def test_a_page_size_off_the_granularity_is_refused():
    """Pages must be multiples of what the device maps."""
    with pytest.raises(CapacityError, match="page_size 5000 is no multiple of the device's 4096 bytes"):
        KVArena(CpuDevice(), PageLedger(2, 5000))


@pytest.mark.parametrize("given", [0, 1, 2])
def test_null_pages_that_the_device_refuses_are_given_back(given, monkeypatch):
    """Of three pages that are asked for at once those that came stay, and the others are free for the next try."""
    with arena_of(8) as arena:
        original, mapped = arena.device.map_zeroed, []

        def map_zeroed(address, nbytes):
            if len(mapped) == given:
                raise OSError(12, "no memory left")
            mapped.append(address)
            original(address, nbytes)

        monkeypatch.setattr(arena.device, "map_zeroed", map_zeroed)
        with pytest.raises(CapacityError, match=f"'a'.* {3 - given} pages .*no memory left"):
            arena._map_null_pages("a", 3)
        arena.ledger.check()
        assert given == arena.ledger.held(NULL_OWNER, PageUse.NULL) == len(arena._null_pages)
        assert 8 - given == arena.ledger.num_free
        monkeypatch.undo()
        views = [arena.open_view(name, PAGE) for name in "abc"]
        assert not any(null_block_of(arena, view).any() for view in views)
        assert 3 == arena.ledger.held(NULL_OWNER, PageUse.NULL)
        arena.check()


def test_a_view_whose_null_block_gets_no_memory_is_not_opened(monkeypatch):
    """The page comes back, and the name can be used again."""
    with arena_of(2) as arena:
        with monkeypatch.context() as broken, pytest.raises(CapacityError, match="lower device_memory"):
            broken.setattr(arena.device, "map_zeroed", lambda *_: (_ for _ in ()).throw(OSError(12, "none")))
            arena.open_view("a", 4096)
        assert 2 == arena.ledger.num_free
        arena.open_view("a", 4096)
        arena.check()


# -- slabs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keeps_bytes", [False, True])
def test_a_mapped_slab_reads_as_zero_whatever_it_held(keeps_bytes):
    """No byte of an earlier holder survives, even where the physical memory keeps it."""
    with arena_of(3, keeps_bytes=keeps_bytes) as arena:
        for _ in range(3):
            slab = take_slab(arena)
            assert not slab_bytes_of(arena, slab).any()
            slab_bytes_of(arena, slab).fill_(-1)
            arena.unmap_slab(slab)
            arena.ledger.give("a", PageUse.KV, [slab])
            arena.check()


def test_views_alias_one_memory():
    """Byte x of a slab is the same byte through every view: only offsets and strides differ."""
    with arena_of(4) as arena:
        a, b = arena.open_view("a", 1000), arena.open_view("b", 12288)
        slab = take_slab(arena)
        block_id = arena.block_ids(b, slab)[1]
        arena.tensor(b)[block_id * b.block_bytes] = 7
        assert 7 == arena.tensor(a)[b.offset - a.offset + block_id * b.block_bytes].item()
        assert 7 == slab_bytes_of(arena, slab).sum().item()


def test_mapping_twice_and_unmapping_twice_are_bugs():
    """A slab is mapped once and unmapped once."""
    with arena_of(2) as arena:
        slab = take_slab(arena)
        with pytest.raises(AssertionError, match="mapped already"):
            arena.map_slab(slab)
        arena.unmap_slab(slab)
        with pytest.raises(KeyError):
            arena.unmap_slab(slab)


CHILD = """
import os, resource, sys
from tokenpool.memory.arena import KVArena
from tokenpool.memory.devices.cpu import CpuDevice
from tokenpool.memory.ledger import PageLedger, PageUse
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
arena = KVArena(CpuDevice(keeps_bytes=sys.argv[2] == "keeps"), PageLedger(3, 65536))
view = arena.open_view("a", 4096)
slab = arena.ledger.take("a", PageUse.KV)[0]
tensor = arena.tensor(view)
byte = arena.block_ids(view, slab)[0] * 4096
for case in sys.argv[1].split(","):
    pid = os.fork()
    if pid == 0:
        if case != "never mapped":
            arena.map_slab(slab)
            tensor[byte] = 7
        if case == "unmapped":
            arena.unmap_slab(slab)
        tensor[byte].item()
        os._exit(0)
    print(os.WEXITSTATUS(s) if os.WIFEXITED(s := os.waitpid(pid, 0)[1]) else -os.WTERMSIG(s))
if sys.argv[3] == "direct":
    tensor[byte].item()
"""


def test_a_slab_without_memory_is_inaccessible():
    """Touching a slab that is not mapped, never or no longer, kills the process; a mapped one can be read."""
    cases = "mapped,never mapped,unmapped"
    for kept, direct in (("keeps", ""), ("drops", "direct")):
        child = subprocess.run(
            [sys.executable, "-c", CHILD, cases, kept, direct], capture_output=True, text=True, timeout=60, check=False
        )
        assert (-signal.SIGSEGV if direct else 0) == child.returncode, child.stderr
        if not direct:
            assert [0, -signal.SIGSEGV, -signal.SIGSEGV] == [int(line) for line in child.stdout.split()]


@laws
@given(sizes=st.lists(st.sampled_from([1000, 4096, 12288, 8 << 10, 16 << 10, 32 << 10, PAGE]), max_size=6))
def test_blocks_that_fill_a_slab_fill_each(sizes):
    """Whoever was added before: where a whole number of blocks fits a slab, each slab holds as many."""
    with arena_of(16) as arena:
        for index, block_bytes in enumerate(sizes):
            view = arena.open_view(str(index), block_bytes)
            least = min(len(arena.block_ids(view, slab)) for slab in range(4))
            assert least >= arena.min_blocks_per_slab(view)
            assert PAGE % block_bytes or least == PAGE // block_bytes == arena.min_blocks_per_slab(view)
