# SPDX-License-Identifier: Apache-2.0
"""The parts of the CUDA start that run without a GPU: vLLM's own checks as our worker meets them, and the choices."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from vllm.utils.mem_utils import MemorySnapshot
from vllm.v1.worker import gpu_worker
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.utils import request_memory

from tests.helpers.devices.fake_cuda import GRANULARITY, FakeCudaDevice
from tests.helpers.server import REPOSITORY
from tokenpool.errors import CapacityError, ConfigError
from tokenpool.host.engine import cuda_worker
from tokenpool.host.engine.cuda_worker import PooledCUDAWorker
from tokenpool.host.engine.engine_globals import EngineGlobals
from tokenpool.host.engine_builder import EngineBuilder
from tokenpool.host.load import build_lane, cuda_copies, device_choice
from tokenpool.memory.devices.cpu import CpuDevice
from tokenpool.memory.devices.cuda_driver import CudaError
from tokenpool.memory.devices.mirrored import Mirror, MirroredDevice
from tokenpool.patches.build_context import building

pytestmark = pytest.mark.vllm

GIB = 1 << 30


class Build:
    """What the worker tells a build."""

    def __init__(self, *, movable_weights: bool) -> None:
        self.movable_weights = movable_weights
        self.calls: list[str] = []

    def expect_blocks(self, block_bytes: int) -> None:
        self.calls.append(f"blocks of {block_bytes}")

    def enter_phase(self, phase: str) -> None:
        self.calls.append(phase)

    def adopt_weights(self, model_runner: object) -> None:
        self.calls.append("adopt_weights")


@pytest.fixture
def worker() -> PooledCUDAWorker:
    """A worker before `init_device`, with as much of a config as the tests use."""
    made = object.__new__(PooledCUDAWorker)
    made.cache_config = SimpleNamespace(gpu_memory_utilization=0.92, kv_cache_memory_bytes=None)
    made.model_config = SimpleNamespace(is_moe=False, enable_cumem_allocator=True, multimodal_config=None)
    made.vllm_config = SimpleNamespace(model_config=made.model_config)
    made.parallel_config = SimpleNamespace()
    return made


def test_a_second_engine_passes_the_check_of_free_memory(worker, monkeypatch):
    """vLLM refuses an engine when others use the memory; inside our `init_device` its check has nothing to refuse."""
    full = SimpleNamespace(total_memory=80 * GIB, free_memory=1 * GIB, device_="cuda:0")
    assert {"total_memory", "free_memory"} <= set(MemorySnapshot.__annotations__)
    with pytest.raises(ValueError, match="Free memory on device"):
        request_memory(full, worker.cache_config)
    asked = []
    monkeypatch.setattr(Worker, "init_device", lambda self: asked.append(request_memory(full, self.cache_config)))
    worker.init_device()

    assert [0] == asked
    assert 0.92 == worker.cache_config.gpu_memory_utilization


def test_memory_is_not_profiled(worker, monkeypatch):
    """vLLM's own code warms the model up once, measures nothing, and the answer is the arena's span."""
    runs = []
    monkeypatch.setattr(gpu_worker, "memory_profiling", None)  # a call would fail
    worker.model_runner = SimpleNamespace(
        profile_run=lambda **kwargs: runs.append(kwargs), get_kv_cache_spec=lambda: {}
    )
    worker.init_snapshot = SimpleNamespace(free_memory=GIB)
    monkeypatch.setattr(Worker, "randomize_dummy_inputs", False, raising=False)  # vLLM 0.29 has none
    monkeypatch.setattr(gpu_worker, "set_current_vllm_config", _nothing)
    worker.cache_config.kv_cache_memory_bytes = 300 * GIB
    with building(build := Build(movable_weights=True)):
        assert 300 * GIB == worker.determine_available_memory()

    assert 1 == len(runs)
    assert ["blocks of 0", "warming up", "building engine"] == build.calls


@pytest.mark.parametrize("movable", [True, False])
def test_weights_are_adopted_as_the_runner_leaves_them(worker, monkeypatch, movable):
    """vLLM loads, outside its one-per-process allocator; then the weights move, and what the loader had is freed."""
    build = Build(movable_weights=movable)
    worker.model_runner = SimpleNamespace(load_model=lambda **kwargs: build.calls.append("load"))
    monkeypatch.setattr(gpu_worker, "set_current_vllm_config", _nothing)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: build.calls.append("empty_cache"))
    worker.vllm_config.weight_transfer_config = None
    with building(build):
        worker.load_model()

    assert ["loading weights", "load", *["adopt_weights"] * movable, "empty_cache"] == build.calls


@contextmanager
def _nothing(*args):
    yield


# -- choices -----------------------------------------------------------------------------------------


def test_the_device_is_that_of_vllms_platform(monkeypatch, caplog):
    """A CPU host gets the CPU device without a word, a CUDA host the GPU with one warning, others an error."""
    assert isinstance(device_choice.make_device(1 << 20, 5), CpuDevice)
    assert not caplog.records
    cuda = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True, device_name="cuda")
    monkeypatch.setattr(device_choice, "current_platform", cuda)
    contexts: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", contexts.append)
    monkeypatch.setattr(device_choice, "CudaDriver", lambda ordinal: f"driver {ordinal}")
    monkeypatch.setattr(device_choice, "CudaDevice", lambda page, driver, ways: ("cuda", page, driver, ways))
    assert ("cuda", 2 << 20, "driver 0", [(0, None)]) == device_choice.make_device(2 << 20)
    assert ["docs/gpu.md" in record.getMessage() for record in caplog.records] == [True]
    assert ("cuda", 2 << 20, "driver 3", [(0, None)]) == device_choice.make_device(2 << 20, rank=3)
    assert [3] == contexts, "torch's context of a rank lies on its own GPU"
    cuda.is_cuda, cuda.device_name = lambda: False, "xpu"
    with pytest.raises(ConfigError, match="xpu is not supported"):
        device_choice.make_device(2 << 20)


def test_a_loader_finds_memory_on_a_gpu(monkeypatch):
    """Pages for the weights are freed, and what backs nothing goes back to the GPU; not so on the CPU."""
    asked: list[int] = []
    freed: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append("loader's memory"))
    device = FakeCudaDevice()
    address = device.reserve(4 * GRANULARITY)
    device.map_zeroed(address, 4 * GRANULARITY)
    device.unmap(address, 3 * GRANULARITY)

    def make_room(num_pages: int) -> None:
        asked.append(num_pages)
        if num_pages > 20:
            raise CapacityError("too many")

    assert 7 == device_choice.make_room_for_loading(device, make_room, 7)
    with pytest.raises(CapacityError, match="too many"):
        device_choice.make_room_for_loading(device, make_room, 21)
    assert 0 == device_choice.make_room_for_loading(CpuDevice(), make_room, 7)
    device.fake.handles_left = 17
    pauses = []
    device_choice.give_back_loading_memory(device, 18, lambda: pauses.append(len(device.fake.handles)))
    device_choice.give_back_loading_memory(CpuDevice(), 18, lambda: pauses.append(0))
    assert [9, 17, 18] == pauses, "pages are made a few at a time"
    device_choice.give_back_loading_memory(device, 30, lambda: pauses.append(0))  # of which none is left: no error

    assert [7, 21] == asked
    assert ["loader's memory"] * 2 == freed
    assert 18 == len(device.fake.handles)
    assert 1 << 30 == device_choice.spare_host_bytes(device, 8 << 30)
    assert 0 == device_choice.spare_host_bytes(CpuDevice(), 8 << 30)


@pytest.mark.parametrize("name", ["batch", "triton"])
def test_batches_go_to_vllms_kernels(monkeypatch, name):
    """Targets, sources and sizes arrive as columns of int64, on the device's stream."""
    from vllm import _custom_ops
    from vllm.v1.kv_offload.cpu import swap_blocks_triton

    seen, streams = [], []

    def record(sources, targets, sizes, **options):
        seen.append((sources.tolist(), targets.tolist(), sizes.tolist(), sizes.dtype, options))

    @contextmanager
    def stream_context(stream):
        streams.append(stream)
        yield

    monkeypatch.setattr(_custom_ops, "swap_blocks_batch", record)
    monkeypatch.setattr(swap_blocks_triton, "swap_blocks_batch", record)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "stream", stream_context)
    copy = cuda_copies.BATCH_COPIES[name]
    copy([(1000, 2000, 8), (3000, 1 << 40, 16)], 77)

    options = {"bytes_per_chunk": 8192} if name == "triton" else {}
    assert [([2000, 1 << 40], [1000, 3000], [8, 16], torch.int64, options)] == seen
    assert [77] == streams
    if name == "triton":
        with pytest.raises(ValueError, match="8 bytes"):
            copy([(0, 0, 12)], 77)


def test_a_model_is_built_on_the_stream_on_which_it_is_stepped(monkeypatch):
    """Torch's current stream is one per thread; the thread of a build takes over that of the loop's thread."""
    streams, used = {threading.get_ident(): "the loop's"}, []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: streams.update({threading.get_ident(): stream}))
    monkeypatch.setattr(build_lane.torch_utils, "current_stream", lambda: streams.get(threading.get_ident()))
    lane = build_lane.BuildLane(EngineGlobals())
    done = lane.submit(lambda: used.append((threading.get_ident(), build_lane.torch_utils.current_stream())))
    lane.run_slice(beside=True)
    done.result(timeout=60)
    assert not lane.busy

    ((thread, stream),) = used
    assert thread != threading.get_ident()
    assert "the loop's" == stream


def test_a_measurement_chooses_how_blocks_are_copied():
    """At each size the fastest way, the smallest size's below it; what was not measured is not chosen."""
    rates = {4096: {"each": 2.0, "triton": 9.0}, 65536: {"each": 30.0, "triton": 20.0}, 1 << 20: {"each": 50.0}}
    table = cuda_copies.fastest(rates | {512: {"triton": 1.0}, 1 << 22: {}})
    assert [(0, "triton"), (65536, "each")] == table
    assert [] == cuda_copies.fastest({})
    assert [(0, cuda_copies.BATCH_COPIES["triton"]), (65536, None)] == cuda_copies.ways(table)
    assert [(0, None)] == cuda_copies.ways()


def test_adding_a_model_keeps_the_gpus_random_state(monkeypatch):
    """vLLM seeds the generators when it builds an engine: those of the CPU and the GPU go on as before."""
    state = {"cuda": torch.tensor([1])}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: state["cuda"])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda value: state.update(cuda=value))
    with EngineGlobals().building("a"):
        state["cuda"] = torch.tensor([2])

    assert 1 == state["cuda"].item()


def test_the_pool_of_graphs_is_never_empty(monkeypatch):
    """One graph is captured into the process's pool, once, and kept: torch drops a pool with its last graph."""
    pools = []

    @contextmanager
    def graph(captured, pool):
        pools.append(pool)
        yield

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda count, device: zeros(count))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(cuda_worker, "current_platform", SimpleNamespace(get_global_graph_pool=lambda: "pool"))
    cuda_worker.hold_graph_pool.cache_clear()
    try:
        first = cuda_worker.hold_graph_pool()
        assert first is cuda_worker.hold_graph_pool()
    finally:
        cuda_worker.hold_graph_pool.cache_clear()
    assert ("graph", ["pool"]) == (first[0], pools)


def test_an_engine_is_measured_beside_the_pages(monkeypatch):
    """By what the driver has free, pages of the pool left out, whether they were made or given back meanwhile."""
    device, free = FakeCudaDevice(), [100 * GRANULARITY]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda ordinal: (free[0], 100 * GRANULARITY))
    device.make_pages(2)
    free[0] -= 2 * GRANULARITY
    memory = device_choice.EngineMemory(device)
    device.make_pages(10)
    free[0] -= 8 * GRANULARITY
    assert 0 == memory.growth()
    free[0] -= 3 * GRANULARITY + 1
    assert 3 * GRANULARITY + 1 == memory.growth()
    free[0] += 10 * GRANULARITY
    device_choice.release_device_memory(device)
    assert 3 * GRANULARITY + 1 == memory.growth()
    assert 0 == device_choice.EngineMemory(CpuDevice()).growth()


def test_a_gpu_that_has_too_few_pages_is_told_at_start(monkeypatch):
    """All pages are made before a model is built; what was made is given back when one is refused."""
    device = FakeCudaDevice()
    device_choice.make_all_pages(device, 6)
    assert 6 == len(device.fake.handles)
    create = device.driver.create

    def refuse(nbytes):
        if len(device.fake.handles) == 9:
            raise CudaError("cuMemCreate", 2, "CUDA_ERROR_OUT_OF_MEMORY")
        return create(nbytes)

    monkeypatch.setattr(device.driver, "create", refuse)
    with pytest.raises(CapacityError, match="gives 9 of 20 pages.*lower device_memory"):
        device_choice.make_all_pages(device, 20)
    assert 0 == len(device.fake.handles)
    device_choice.make_all_pages(CpuDevice(), 20)


def test_a_rank_runs_near_its_gpu(monkeypatch):
    """On the cores of the GPU's NUMA node where they are known and ours, and it goes on where it was otherwise."""
    bound: list[frozenset[int]] = []
    monkeypatch.setattr(device_choice, "ALL_CPUS", frozenset(range(4)))
    monkeypatch.setattr(device_choice.os, "sched_setaffinity", lambda thread, cpus: bound.append(cpus))
    device = FakeCudaDevice()
    device.near_cpus = frozenset({2, 3, 6, 7})
    device_choice.run_near_gpu(device)
    device_choice.run_near_gpu(MirroredDevice(device, lambda name, args: None))
    for cpus in ((), (99,)):
        device.near_cpus = frozenset(cpus)
        device_choice.run_near_gpu(device)
    device_choice.run_near_gpu(CpuDevice())
    assert [{2, 3}, {2, 3}] == bound


def test_a_rank_with_too_few_pages_is_named(monkeypatch):
    """Each rank makes all of its own pages, so none can be short of them where rank 0 is not."""
    rank_models = pytest.importorskip(
        "tokenpool.host.ranks.rank_models", exc_type=ImportError, reason="vLLM 0.29 has not all that ranks import"
    )
    device = FakeCudaDevice()
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(rank_models, "make_device", lambda page, link, rank: asked.append((page, rank)) or device)
    models = rank_models.RankModels(2, "file:///nowhere", GRANULARITY)
    models.make_pages(6)
    assert [(GRANULARITY, 2)] == asked
    assert 6 == len(device.fake.handles)

    def refuse(nbytes):
        raise CudaError("cuMemCreate", 2, "CUDA_ERROR_OUT_OF_MEMORY")

    monkeypatch.setattr(device.driver, "create", refuse)
    with pytest.raises(CapacityError, match="rank 2: the GPU gives 6 of 7 pages") as raised:
        models.make_pages(7)
    assert (7, 6) == (raised.value.needed_pages, raised.value.free_pages)


def test_a_loader_finds_memory_on_all_gpus_of_a_group(monkeypatch):
    """And each has its pages again afterwards; one that cannot have them all makes them later."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    first, other = FakeCudaDevice(), FakeCudaDevice()
    mirror = Mirror(other)
    device = MirroredDevice(first, lambda name, args: mirror.do(name, args))
    for each in (first, other):
        device_choice.make_all_pages(each, 6)
    assert 4 == device_choice.make_room_for_loading(device, lambda num_pages: None, 4)
    assert (0, 0) == (first.page_bytes, other.page_bytes)
    device_choice.give_back_loading_memory(device, 6, lambda: None)
    assert (6 * GRANULARITY,) * 2 == (first.page_bytes, other.page_bytes)
    device_choice.release_device_memory(device)
    assert (0, 0) == (first.page_bytes, other.page_bytes)
    other.fake.handles_left = 5
    device_choice.give_back_loading_memory(device, 6, lambda: None)
    assert (6 * GRANULARITY, 5 * GRANULARITY) == (first.page_bytes, other.page_bytes)
    assert 1 << 30 == device_choice.spare_host_bytes(device, 8 << 30)


def test_an_engine_of_a_group_counts_where_it_is_the_largest(monkeypatch):
    """One book stands for all ranks."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    free = [100 * GRANULARITY]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda ordinal: (free[0], 100 * GRANULARITY))
    memory = device_choice.EngineMemory(MirroredDevice(FakeCudaDevice(), lambda name, args: None))
    free[0] -= GRANULARITY
    asked: list[tuple[str, str]] = []
    group = SimpleNamespace(
        watch=SimpleNamespace(work=lambda what: nullcontext()),
        ask=lambda kind, name: asked.append((kind, name)),
        answers=lambda question: [5 * GRANULARITY, 0],
    )
    builder = object.__new__(EngineBuilder)
    builder._group = group
    assert 5 * GRANULARITY == builder._growth("llama", memory)
    assert [("growth", "llama")] == asked
    builder._group = None
    assert GRANULARITY == builder._growth("llama", memory)


def test_a_host_does_not_start_with_a_rank_that_is_short_of_memory():
    """It says which rank has how much, and leaves no process behind."""
    words = [sys.executable, "-m", "tests.helpers.failing_rank", "short"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert (0, "rank 1: the GPU gives 3 of 16 pages; needed 16, free 3\n") == (done.returncode, done.stdout)
