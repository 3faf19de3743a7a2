# SPDX-License-Identifier: Apache-2.0
"""The CUDA device against a driver of memory files: the laws of all devices, and the calls that it makes."""

from __future__ import annotations

import errno
import gc
import os
import random
import sys
import threading

import pytest
import torch

from tests.helpers.devices.device_laws import LAWS
from tests.helpers.devices.fake_cuda import GRANULARITY, FakeCuda, FakeCudaDevice
from tokenpool.errors import ConfigError
from tokenpool.memory.arena import KVArena
from tokenpool.memory.copies.shared_memory import SharedMemory
from tokenpool.memory.copy_engine import JobCancelled
from tokenpool.memory.devices.counted import CountedDevice
from tokenpool.memory.devices.cpu import CpuDevice
from tokenpool.memory.devices.cuda_driver import CudaDriver, CudaError
from tokenpool.memory.devices.pinned import LARGE_BYTES, cpus_near
from tokenpool.memory.ledger import PageLedger, PageUse
from tokenpool.memory.weight_layout import WeightLayout
from tokenpool.memory.weight_range import WeightRange

pytestmark = pytest.mark.cpu

PAGE = GRANULARITY


def test_a_page_that_the_gpu_cannot_map_is_refused():
    """The page size must be a multiple of the GPU's granularity: the error names both."""
    with pytest.raises(ConfigError, match="page_size: 4096 is no multiple of 65536"):
        FakeCudaDevice(4096)


@pytest.mark.parametrize("page", [PAGE, 4 * PAGE])
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("make", [FakeCudaDevice, lambda page: CpuDevice(keeps_bytes=True)], ids=["cuda", "cpu"])
def test_law(make, law, page):
    """What holds on the CPU holds on the CUDA device, although nothing on a stream happens by itself."""
    law(make(page), page)


def test_handles_are_made_once_and_mapped_again():
    """As many physical handles as were ever mapped at a time, whatever comes and goes."""
    device = FakeCudaDevice()
    one, other = device.reserve(8 * PAGE), device.reserve(4 * PAGE)
    for _ in range(5):
        device.map_zeroed(one, 3 * PAGE)
        device.map_zeroed(other + PAGE, 2 * PAGE)
        device.unmap(one, 3 * PAGE)
        device.map_zeroed(one + 4 * PAGE, PAGE)
        device.unmap(other + PAGE, 2 * PAGE)
        device.unmap(one + 4 * PAGE, PAGE)

    assert 5 == device.fake.count("cuMemCreate") == len(device.fake.handles)
    assert 15 == device.fake.count("cuMemSetAccess"), "one call for each range"
    assert 5 * PAGE == device.release_unused()
    assert not device.fake.handles


MAP_CALLS = ["cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemsetD8Async", "cuStreamWaitEvent"]


@pytest.mark.parametrize("call", MAP_CALLS)
def test_a_failed_map_maps_nothing(call):
    """Whichever call fails, nothing stays mapped and no handle is lost."""
    device = FakeCudaDevice()
    address = device.reserve(4 * PAGE)
    device.fake.allowed = {call: 2 if call in ("cuMemCreate", "cuMemMap") else 0}
    with pytest.raises(CudaError, match=f"{call}: CUDA_ERROR_INVALID_VALUE"):
        device.map_zeroed(address, 4 * PAGE)
    assert not device.fake.mapped
    device.fake.allowed = {}
    device.map_zeroed(address, 4 * PAGE)
    assert 4 == device.fake.count("cuMemCreate") - (call == "cuMemCreate") == len(device.fake.handles)


def test_short_memory_is_an_oserror_that_says_so():
    """The pool handles an OSError of a device; ENOMEM tells that memory is short."""
    device = FakeCudaDevice(handles=2)
    address = device.reserve(4 * PAGE)
    with pytest.raises(OSError, match="cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY") as caught:
        device.map_zeroed(address, 3 * PAGE)
    assert errno.ENOMEM == caught.value.errno
    device.map_zeroed(address, 2 * PAGE)


def test_pages_go_after_the_engine_is_done_with_them():
    """Work that the engine has queued on its stream still finds its pages when they are taken away."""
    device = FakeCudaDevice()
    address = device.reserve(PAGE)
    device.map_zeroed(address, PAGE)
    page, seen = device.tensor(address, PAGE), []
    device.fake.launch(lambda: seen.append(int(page.sum())), device.compute)
    device.unmap(address, PAGE)

    assert [0] == seen


def test_blocks_are_copied_after_the_engine_has_written_them():
    """A copy out has what was queued before it; a copy in does not come before work that still reads the old bytes."""
    device = FakeCudaDevice()
    address = device.reserve(PAGE)
    device.map_zeroed(address, PAGE)
    page, host, seen = device.tensor(address, PAGE), device.host_buffer(PAGE), []
    device.fake.launch(lambda: page.fill_(5), device.compute)
    device.copy_out(host, address)
    assert host.eq(5).all()
    device.fake.launch(lambda: seen.append(int(page[0])), device.compute)
    device.copy_in(address, host.fill_(9))

    assert [5] == seen
    assert page.eq(9).all()


def test_weights_come_in_beside_the_engine():
    """A copy of weights does not wait for the engine's stream, runs behind the caller, and two may be under way."""
    device = FakeCudaDevice()
    address = device.reserve(2 * PAGE)
    device.map_zeroed(address, 2 * PAGE)
    device.fake.launch(lambda: None, device.compute)
    here, host = device.tensor(address, 2 * PAGE), device.host_buffer(2 * PAGE).fill_(3)
    first = device.begin_copy_in(address, host[:PAGE])
    second = device.begin_copy_in(address + PAGE, host[PAGE:])
    assert not here.any(), "the fake copies when somebody waits"
    first()
    assert here[:PAGE].eq(3).all()
    assert not here[PAGE:].any()
    second()

    assert here.eq(3).all()
    assert not device.fake.is_idle(device.compute)
    assert 4 == device.copies_in_flight


def test_no_copy_is_under_way_when_a_job_is_cancelled():
    """A copy that is given up waits for the chunks that it has begun: their pages go right afterwards."""
    device = FakeCudaDevice()
    ledger = PageLedger(8, PAGE)
    tensors = [torch.nn.Parameter(torch.arange(6 * PAGE // 8), requires_grad=False)]
    place = WeightRange("a", WeightLayout(tensors), CountedDevice(device), ledger, poison=False)
    place.map()
    host, seen = device.host_buffer(6 * PAGE), []

    def advance(nbytes: int) -> None:
        seen.append(nbytes)
        if len(seen) == 2:
            raise JobCancelled

    with pytest.raises(JobCancelled):
        place.copy_in(host, PAGE, advance)
    assert 5 == device.fake.count("cuMemcpyHtoDAsync")
    assert device.fake.is_idle(device._weight_stream)
    place.release()


def test_pages_of_weights_are_mapped_under_the_copies_before_them():
    """Nothing is mapped before the first byte is copied; a copy that fails or is given up can be made again."""
    device = FakeCudaDevice()
    device.make_pages(6)
    tensors = [torch.nn.Parameter(torch.arange(5 * PAGE // 8 + 100), requires_grad=False)]
    place = WeightRange("a", WeightLayout(tensors), CountedDevice(device), PageLedger(8, PAGE), poison=False)
    host = device.host_buffer(6 * PAGE).fill_(3)
    for failing in ("cuMemMap", "cuMemSetAccess", None):
        place.map()
        assert not device.fake.mapped, "pages were mapped before they are needed"
        device.fake.allowed = {failing: 2} if failing else {}
        if failing:
            with pytest.raises(CudaError, match=failing):
                place.copy_in(host, PAGE + PAGE // 2, lambda nbytes: None)
            assert device.fake.is_idle(device._weight_stream)
        device.fake.allowed = {}
        place.copy_in(host, PAGE + PAGE // 2, lambda nbytes: None)
        assert device.tensor(place.address, place.layout.nbytes).eq(3).all()
        place.unmap()
        assert not device.fake.mapped
    place.map()  # and left before anything is copied
    place.release()
    assert 6 * PAGE == device.release_unused()


def test_many_blocks_go_in_one_batch():
    """A function for batches gets all copies at once, as (target, source, bytes)."""
    batches = []
    device = FakeCudaDevice(ways=[(0, lambda copies, stream: batches.append((copies, stream)))])
    host = device.host_buffer(300)
    device.begin_copies_out([(1000, host[:100]), (2000, host[100:])])
    device.begin_copies_in([(3000, host[:100])])
    device.begin_copies_in([])

    start = host.data_ptr()
    assert [[(start, 1000, 100), (start + 100, 2000, 200)], [(3000, start, 100)]] == [copies for copies, _ in batches]
    assert {device._stream} == {stream for _, stream in batches}


def test_each_copy_goes_the_way_of_its_size():
    """The table says which; where it names no function, copies go one by one."""
    small, large = [], []
    ways = [(0, lambda copies, _: small.extend(copies)), (200, None), (300, lambda copies, _: large.extend(copies))]
    device = FakeCudaDevice(ways=ways)
    address = device.reserve(PAGE)
    device.map_zeroed(address, PAGE)
    host = device.host_buffer(2000)
    sizes = [1, 199, 200, 299, 300, 900]
    device.begin_copies_in([(address, host[:size]) for size in sizes]).wait()
    assert [1, 199] == [size for *_, size in small]
    assert [300, 900] == [size for *_, size in large]
    assert [200, 299] == [call[3] for call in device.fake.calls if call[0] == "cuMemcpyHtoDAsync"]


def test_nobody_waits_on_the_host_for_zeroing():
    """The engine and copies of weights see zero bytes, each because its stream waits; mapping only issues work."""
    device = FakeCudaDevice()
    address = device.reserve(2 * PAGE)
    for _ in range(2):
        device.map_zeroed(address, 2 * PAGE)
        assert not device.fake.is_idle(device._stream)
        here, host, seen = device.tensor(address, 2 * PAGE), device.host_buffer(PAGE).fill_(7), []
        device.fake.launch(lambda here=here, seen=seen: seen.append(int(here[PAGE:].sum())), device.compute)
        device.begin_copy_in(address, host)()
        device.run_engine()
        assert [0] == seen
        assert here[:PAGE].eq(7).all(), "zeroing came after the weights"
        here.fill_(1)
        device.unmap(address, 2 * PAGE)
    assert 0 == device.fake.count("cuStreamSynchronize")


def test_the_host_goes_on_while_blocks_are_copied():
    """Copies in are begun and not waited for; an engine that was told to comes after them, and their time is known."""
    device = FakeCudaDevice()
    address = device.reserve(2 * PAGE)
    device.map_zeroed(address, 2 * PAGE)
    here, host, seen = device.tensor(address, 2 * PAGE), device.host_buffer(2 * PAGE).fill_(3), []
    first = device.begin_copies_in([(address, host[:PAGE])])
    second = device.begin_copies_in([(address + PAGE, host[PAGE:])])
    assert not first.done() and not second.done()
    first.precede_compute()
    device.fake.launch(lambda: seen.append((int(here[0]), int(here[PAGE]))), device.compute)
    device.run_engine()
    assert [(3, 0)] == seen, "the engine waits for what it was told to, and for no more"
    assert first.done() and not second.done()
    second.wait()
    assert here.eq(3).all()
    assert 2.5e-3 == first.seconds == second.seconds

    events = device.fake.count("cuEventCreate")
    device.begin_copies_in([(address, host)]).wait()
    assert events == device.fake.count("cuEventCreate"), "events are used again"


def test_no_copy_is_under_way_after_one_could_not_be_issued():
    """A batch that the driver refuses in its middle has ended when the error is raised."""
    device = FakeCudaDevice()
    address = device.reserve(PAGE)
    device.map_zeroed(address, PAGE)
    host = device.host_buffer(PAGE)
    device.fake.allowed = {"cuMemcpyHtoDAsync": 1}
    with pytest.raises(CudaError, match="cuMemcpyHtoDAsync"):
        device.begin_copies_in([(address, host[:100]), (address + 100, host[100:200])])
    assert device.fake.is_idle(device._stream)


def test_pinned_memory_lives_as_long_as_a_slice_of_it():
    """A host buffer is pinned with its exact size and freed with the last tensor over it."""
    device = FakeCudaDevice()
    part = device.host_buffer(12345)[100:200]
    gc.collect()
    assert [12345] == list(device.fake.pinned.values())
    part.fill_(1)
    del part
    gc.collect()

    assert not device.fake.pinned
    assert 0 == device.host_buffer(0).numel()


def test_large_pinned_memory_is_touched_by_threads_and_locked_then(monkeypatch):
    """All of it is zero, locked while a slice of it lives and no longer, and nothing stays when the driver refuses."""
    device, size = FakeCudaDevice(), LARGE_BYTES + 4321
    part = device.host_buffer(size)[size - 100 :]
    assert [size] == list(device.fake.pinned.values())
    assert not part.any()
    part.fill_(1)
    gc.collect()
    assert device.fake.pinned
    del part
    gc.collect()
    assert not device.fake.pinned
    device.fake.allowed = {"cuMemHostRegister": 0}
    with pytest.raises(CudaError, match="cuMemHostRegister"):
        device.host_buffer(size)
    assert (2, 1) == (device.fake.count("cuMemHostRegister"), device.fake.count("cuMemHostUnregister"))


def test_pinned_memory_is_touched_on_the_gpus_node(monkeypatch, tmp_path):
    """The thread that pins runs on the cores that sysfs names for the GPU, and on its old ones afterwards."""
    before = os.sched_getaffinity(0)
    near = tmp_path / "0000:3b:00.0"
    near.mkdir()
    (near / "local_cpulist").write_text("0,2-4\n")
    assert {0, 2, 3, 4} == cpus_near("0000:3b:00.0", tmp_path)
    assert not cpus_near("0000:99:00.0", tmp_path)
    device, set_to = FakeCudaDevice(), []
    device.near_cpus = frozenset({min(before)})
    real = os.sched_setaffinity
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: (set_to.append(set(cpus)), real(pid, cpus)))
    device.host_buffer(10)

    assert [{min(before)}, before] == set_to
    assert before == os.sched_getaffinity(0)


def test_each_thread_gets_the_context_and_side_threads_do_not_break_a_capture():
    """A thread's first call sets torch's context; only a side thread leaves the strict capture mode."""
    fake = FakeCuda()
    driver = CudaDriver(api=fake)
    for _ in range(2):
        driver.stream()
    side = threading.Thread(target=lambda: [driver.stream(), driver.event()])
    side.start()
    side.join()

    mine = threading.get_ident()
    assert [(mine, "context")] == [entry for entry in fake.threads if entry[0] == mine]
    assert ["context", "CU_STREAM_CAPTURE_MODE_RELAXED"] == [what for thread, what in fake.threads if thread != mine]


def test_a_machine_without_the_bindings_is_told_what_to_install(monkeypatch):
    """No traceback of an import: one line with the extra to install."""
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(ConfigError, match=r"no CUDA bindings .*install tokenpool\[cuda\]"):
        CudaDriver()


def test_a_tensor_lies_where_it_was_asked_for():
    """It has its own storage of the asked bytes, over addresses that need not be mapped."""
    device = FakeCudaDevice()
    address = device.reserve(2 * PAGE)
    tensor = device.tensor(address + 256, PAGE)

    assert (address + 256, PAGE, torch.int8) == (tensor.data_ptr(), tensor.untyped_storage().nbytes(), tensor.dtype)


def _arena(num_pages: int, **options) -> tuple[FakeCudaDevice, PageLedger, KVArena]:
    device = FakeCudaDevice(**options)
    device.make_pages(num_pages)
    ledger = PageLedger(num_pages, PAGE)
    return device, ledger, KVArena(device, ledger)


def _waits(device: FakeCudaDevice) -> int:
    return sum(device.fake.count(name) for name in ("cuEventSynchronize", "cuStreamSynchronize"))


@pytest.mark.parametrize("first", ["_stream", "compute"])
def test_a_slab_changes_hands_without_a_wait_or_a_mapping(first):
    """The step in flight still finds its bytes, and so do copies that were begun; the next step finds zeros."""
    device, _, arena = _arena(4)
    arena.map_slab(2)
    address, seen, host = arena._address(2), [], device.host_buffer(PAGE)
    page = device.tensor(address, PAGE)
    device.run_engine()
    calls, waits = [device.fake.count(name) for name in ("cuMemMap", "cuMemUnmap", "cuMemSetAccess")], _waits(device)
    device.fake.launch(lambda: page.fill_(7), device.compute)
    device.fake.launch(lambda: seen.append(int(page[5])), device.compute)
    copies = device.begin_copies_out([(address, host[: PAGE // 2])])
    arena.unmap_slab(2)
    device.fake.launch(lambda: page[-1].fill_(9), device.compute)  # after the copies were begun
    arena.map_slab(2)
    device.fake.launch(lambda: seen.append(int(page.sum())), device.compute)

    assert waits == _waits(device), "the host waited"
    assert not seen
    device.fake._cuStreamSynchronize(getattr(device, first))  # whichever stream of the GPU is ahead
    device.run_engine()
    assert [7, 0] == seen
    copies.wait()
    assert host[: PAGE // 2].eq(7).all()
    assert calls == [device.fake.count(name) for name in ("cuMemMap", "cuMemUnmap", "cuMemSetAccess")]
    arena.close()


def test_a_stray_read_of_the_arena_is_harmless_everywhere():
    """Slabs never granted, parked ones, and places whose page went to weights can all be read; the latter as zeros."""
    device, _, arena = _arena(4)
    device.run_engine()
    assert not device.tensor(arena.base, arena._reserved_bytes).any()
    arena.map_slab(0)
    arena.map_slab(1)
    device.run_engine()
    here = device.tensor(arena._address(0), 2 * PAGE)
    here.fill_(3)
    arena.unmap_slab(0)
    arena.unmap_slab(1)
    assert here.eq(3).all(), "a parked slab keeps its page"
    weights = device.reserve(3 * PAGE)
    device.map_unset(weights, 3 * PAGE)  # one more page than is free elsewhere: the slab that was parked first goes
    assert not here[:PAGE].any()
    assert here[PAGE:].eq(3).all()
    device.unmap(weights, 3 * PAGE)
    device.release(weights, 3 * PAGE)
    assert 4 * PAGE == device.release_unused()
    assert not device.tensor(arena.base, arena._reserved_bytes).any()
    arena.close()
    assert not device.fake.mapped


@pytest.mark.parametrize("call", ["cuMemMap", "cuMemSetAccess", "cuMemsetD8Async"])
def test_a_failed_grant_leaves_the_arena_harmless(call):
    """The zero page is back at the place, and the page is free again."""
    device, _, arena = _arena(2)
    device.run_engine()
    device.fake.allowed = {call: 0}
    with pytest.raises(CudaError, match=call):
        arena.map_slab(0)
    device.fake.allowed = {}
    if call == "cuMemsetD8Async":
        assert not device.tensor(arena.base, arena._reserved_bytes).any()
    arena.map_slab(0)
    device.run_engine()
    arena.map_slab(1)
    assert 2 * PAGE == device.page_bytes
    arena.close()


@pytest.mark.parametrize("seed", range(20))
def test_parked_pages_are_one_books_pages(seed):
    """Slabs and weights come and go at random: bytes of granted slabs stay theirs, and pages are never made anew."""
    rng = random.Random(seed)
    device, ledger, arena = _arena(6)
    slabs: dict[int, int] = {}
    ranges: list[tuple[int, list[int], int]] = []
    for value in range(1, 80):
        kind = rng.random()
        if kind < 0.4 and ledger.num_free:
            (slab,) = ledger.take("m", PageUse.KV)
            arena.map_slab(slab)
            device.run_engine()
            page = device.tensor(arena._address(slab), PAGE)
            assert not page.any(), "a granted slab holds old bytes"
            page.fill_(value)
            slabs[slab] = value
        elif kind < 0.65 and slabs:
            slab = rng.choice(sorted(slabs))
            del slabs[slab]
            arena.unmap_slab(slab)
            ledger.give("m", PageUse.KV, [slab])
        elif kind < 0.8 and ledger.num_free > 1:
            pages = ledger.take("w", PageUse.WEIGHTS, rng.randint(1, ledger.num_free))
            address = device.reserve(len(pages) * PAGE)
            device.map_unset(address, len(pages) * PAGE)
            host = device.host_buffer(len(pages) * PAGE).fill_(value)
            device.begin_copy_in(address, host)()
            ranges.append((address, pages, value))
        elif ranges:
            address, pages, _ = ranges.pop(rng.randrange(len(ranges)))
            device.unmap(address, len(pages) * PAGE)
            device.release(address, len(pages) * PAGE)
            ledger.give("w", PageUse.WEIGHTS, pages)
        device.run_engine()
        for slab, held in slabs.items():
            assert device.tensor(arena._address(slab), PAGE).eq(held).all()
        for address, pages, held in ranges:
            assert device.tensor(address, len(pages) * PAGE).eq(held).all()
        device.tensor(arena.base, arena._reserved_bytes)[:: PAGE // 2].sum()  # stray reads
        arena.check()
        assert 6 * PAGE == device.page_bytes
        assert 7 == device.fake.count("cuMemCreate"), "six pages and the zero page"
    for address, pages, _ in ranges:
        device.release(address, len(pages) * PAGE)
    arena.close()


def test_a_page_comes_to_a_place_or_goes_when_no_kernel_can_be_reading_there():
    """The first grant of a slab, and taking a parked page away, wait for the engine; both may be read by then."""
    device, _, arena = _arena(2)
    seen = []
    device.fake.launch(lambda: seen.append("read the page of zeros"), device.compute)
    arena.map_slab(0)
    assert ["read the page of zeros"] == seen
    device.fake.launch(lambda: seen.append("read a parked page"), device.compute)
    arena.unmap_slab(0)
    assert 1 == len(seen)
    weights = device.reserve(2 * PAGE)
    device.map_unset(weights, 2 * PAGE)
    assert 2 == len(seen)
    device.release(weights, 2 * PAGE)
    arena.close()


def test_all_parked_pages_that_weights_need_go_in_one_wait():
    """However many: the host waits for the engine once, and neighbours go in one call."""
    device, _, arena = _arena(8)
    for slab in range(6):
        arena.map_slab(slab)
    device.run_engine()
    for slab in (0, 1, 2, 4, 5):
        arena.unmap_slab(slab)
    waits, unmaps = _waits(device), device.fake.count("cuMemUnmap")
    weights = device.reserve(7 * PAGE)
    map_some = device.map_later(weights, 7 * PAGE)
    assert (waits + 1, unmaps + 2) == (_waits(device), device.fake.count("cuMemUnmap"))
    map_some(weights, 7 * PAGE)
    device.unmap(weights, 7 * PAGE)
    device.release(weights, 7 * PAGE)
    arena.close()


def test_a_sealed_mapping_is_page_locked_as_long_as_it_is_there():
    """Once, however many ask for it, and until the last tensor over it is gone."""
    device, memory = FakeCudaDevice(), SharedMemory.make(5000)
    pinned = device.fake.pinned
    before = dict(pinned)
    memory.seal()
    for _ in range(2):
        memory.register(device.register_host)
    tensor = memory.tensor
    del memory
    assert {**before, tensor.data_ptr(): 5000} == pinned
    del tensor
    assert before == pinned
