# SPDX-License-Identifier: Apache-2.0
"""The custom all-reduce that all engines of a rank share: room for their graphs, and steps while one captures.

vLLM's own class runs, on stand-ins for its library and for GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed import parallel_state
from vllm.distributed.device_communicators import custom_all_reduce

from tokenpool.errors import ModelRefusedError
from tokenpool.host.engine.giving_way import graphs_to_capture
from tokenpool.host.engine.process_groups import ReduceRoom, counted_collectives, outside_capture
from tokenpool.patches import reduce_room

pytestmark = pytest.mark.vllm


class Library:
    """The functions of vLLM's library that one rank of two calls."""

    def __init__(self) -> None:
        self.room: torch.Tensor | None = None
        self.reduced: list[bool] = []
        """Of each all-reduce, whether its input was copied into a buffer first, as outside of graphs."""
        self.init_custom_ar = reduce_room.PATCH.replacement(self._init)

    def _init(self, ipc_tensors: Any, rank_data: torch.Tensor, rank: int, fully_connected: bool) -> int:
        self.room = rank_data
        return 7

    def meta_size(self) -> int:
        return 256

    def register_buffer(self, *_: Any) -> None:
        pass

    def all_reduce(self, pointer: int, given: torch.Tensor, out: torch.Tensor, buffer: int, size: int) -> None:
        out.copy_(given * 2)
        self.reduced.append(buffer != 0)

    def get_graph_buffer_ipc_meta(self, pointer: int) -> tuple[list[int], list[int]]:
        return [], []

    def register_graph_buffers(self, *_: Any) -> None:
        pass

    def dispose(self, pointer: int) -> None:
        pass


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    module = custom_all_reduce
    monkeypatch.setattr(module, "custom_ar", True)
    monkeypatch.setattr(module, "ops", made)
    monkeypatch.setattr(module, "in_the_same_node_as", lambda group, source_rank: [True, True])
    monkeypatch.setattr(module, "_can_p2p", lambda rank, size: True)
    monkeypatch.setattr(module, "_supports_mnnvl_multimem_reduce_scatter", lambda device, size: False, raising=False)
    monkeypatch.setattr(module.CustomAllreduce, "create_shared_buffer", staticmethod(lambda *_, **__: [1, 2]))
    platform = {name: (lambda: False) for name in ("is_cuda", "is_rocm")} | {"is_cuda_alike": lambda: True}
    platform |= {"get_device_capability": lambda: None, "is_fully_connected": lambda ids: True}
    platform |= {"visible_device_id_to_physical_device_id": lambda index: index}
    monkeypatch.setattr(module, "current_platform", SimpleNamespace(**platform))
    names = ("all_gather", "all_reduce", "broadcast_object_list")
    collectives: dict[str, Any] = {name: (lambda *_, **__: None) for name in names}
    collectives |= {
        "ReduceOp": SimpleNamespace(MIN="min"),
        "get_backend": lambda group: "gloo",
        "Backend": SimpleNamespace(NCCL="nccl"),
    }
    collectives |= {"get_rank": lambda group: 0, "get_world_size": lambda group: 2}
    collectives |= {"get_process_group_ranks": lambda group: [0]}
    monkeypatch.setattr(module, "dist", SimpleNamespace(**collectives))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made


@pytest.fixture
def custom(library: Library, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """vLLM's all-reduce of a group of two."""
    made = custom_all_reduce.CustomAllreduce("group", torch.device("cpu", 0))  # type: ignore[arg-type]
    assert not made.disabled
    communicator = SimpleNamespace(ca_comm=made)
    monkeypatch.setattr(parallel_state, "_TP", SimpleNamespace(world_size=2, device_communicator=communicator))
    yield made
    made._ptr = 0  # or its end would call what this vLLM has not got, whenever it is collected


def test_there_is_room_for_the_graphs_of_many_models(custom: Any, library: Library) -> None:
    """Eight times what vLLM has for one, kept for as long as the process lives: the library has its address only."""
    assert library.room is not None
    assert (8, torch.uint8) == (library.room.nbytes // custom.rank_data.nbytes, library.room.dtype)
    assert library.room.numel() == 128 * reduce_room.PLACES
    assert any(library.room is kept for kept in reduce_room._kept)


def test_steps_of_others_compute_while_a_capture_pauses(custom: Any, library: Library) -> None:
    """Until the last graph of a model is captured, what is reduced outside of a graph is not reduced at all."""
    ones = torch.ones(8)
    with custom.capture():
        custom.custom_all_reduce(ones)
        assert [] == library.reduced, "vLLM computes now: nothing is to be done any more"
        with pytest.raises(RuntimeError), outside_capture():
            assert torch.equal(ones * 2, custom.custom_all_reduce(ones))
            raise RuntimeError
        custom.custom_all_reduce(ones)
        assert [True] == library.reduced
    assert torch.equal(ones * 2, custom.custom_all_reduce(ones))
    with outside_capture():
        pass
    assert torch.equal(ones * 2, custom.custom_all_reduce(ones))


def test_a_build_that_pauses_is_outside_of_its_capture(custom: Any, library: Library) -> None:
    """Which is where other engines step."""
    from tokenpool.host.engine.engine_globals import EngineGlobals

    kept = EngineGlobals()
    with kept.building("a"), custom.capture():
        with kept.build_paused():
            custom.custom_all_reduce(torch.ones(8))
        assert [True] == library.reduced


def test_the_one_model_too_many_is_refused_before_it_captures(custom: Any) -> None:
    """By name, on each rank at the same model; what it would have taken is left for a smaller one."""
    refusal = "'second'.*9 CUDA graphs with 65.*585 places.*415 of 1003 are left"
    for _rank in range(2):
        room = ReduceRoom(3 + 1000)
        room.take("first", 65, 9)
        with pytest.raises(ModelRefusedError, match=refusal):
            room.take("second", 65, 9)
        room.take("small", 83, 5)
        room.take("eager", 65, 0)
        with pytest.raises(ModelRefusedError, match="'smallest'.*and 0 of 1003"):
            room.take("smallest", 1, 1)


def test_a_worker_is_refused_by_what_its_warm_up_has_counted(custom: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the warm-up and the first capture; the next one, with fewer graphs, is not."""
    from vllm.v1.worker.gpu_worker import Worker

    from tokenpool.host.engine import cuda_worker

    class Communicator:
        ca_comm = custom

        def all_reduce(self, given: int) -> int:
            return given

    communicator, captured = Communicator(), list[int]()
    monkeypatch.setattr(parallel_state._TP, "device_communicator", communicator)
    monkeypatch.setattr(cuda_worker, "ROOM", ReduceRoom(3 + 10))
    for name in ("hide_unreadable_blocks", "embed_in_place"):
        monkeypatch.setattr(cuda_worker, name, lambda runner: None)
    monkeypatch.setattr(cuda_worker, "hold_graph_pool", lambda: None)
    monkeypatch.setattr(Worker, "determine_available_memory", lambda self: [communicator.all_reduce(i) for i in (1, 2)])
    monkeypatch.setattr(Worker, "compile_or_warm_up_model", lambda self: captured.append(graphs))
    for graphs in (6, 5):
        worker = object.__new__(cuda_worker.PooledCUDAWorker)
        worker.cache_config = SimpleNamespace(kv_cache_memory_bytes=1)
        worker.model_config = SimpleNamespace(served_model_name="llama")
        manager = SimpleNamespace(_capture_descs={"FULL": [*range(graphs)]})
        worker.model_runner = SimpleNamespace(cudagraph_manager=manager)
        worker.determine_available_memory()
        with pytest.raises(ModelRefusedError, match="'llama'.*12 places") if graphs == 6 else nullcontext():
            worker.compile_or_warm_up_model()
    assert [5] == captured


def test_without_a_custom_all_reduce_nothing_is_refused(custom: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is off, or there is one rank only."""
    room = ReduceRoom(3)
    custom.disabled = True
    room.take("off", 65, 9)
    custom.disabled = False
    monkeypatch.setattr(parallel_state, "_TP", SimpleNamespace(world_size=1, device_communicator=None))
    room.take("alone", 65, 9)
    with counted_collectives() as counted, outside_capture():
        pass
    assert 0 == counted.calls


def test_collectives_are_counted_and_still_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they are; afterwards the communicator is as it was."""

    class Communicator:
        def all_reduce(self, given: int) -> int:
            return given + 1

        def all_gather(self, given: int, dim: int = -1) -> tuple[int, int]:
            return given, dim

    communicator = Communicator()
    monkeypatch.setattr(parallel_state, "_TP", SimpleNamespace(world_size=2, device_communicator=communicator))
    with pytest.raises(RuntimeError), counted_collectives() as counted:
        assert (2, (3, 0)) == (communicator.all_reduce(1), communicator.all_gather(3, dim=0))
        raise RuntimeError
    assert 2 == counted.calls
    assert {} == vars(communicator)
    assert 2 == communicator.all_reduce(1)


def test_graphs_are_counted_before_they_are_captured() -> None:
    """Of both runners; one that captures none has none."""
    modes = {"PIECEWISE": [8, 4, 2], "FULL": [2]}
    second = SimpleNamespace(cudagraph_manager=SimpleNamespace(_capture_descs=modes))
    first = SimpleNamespace(cudagraph_dispatcher=SimpleNamespace(get_capture_descs=lambda: [*modes.items()]))
    assert (4, 4, 0) == tuple(map(graphs_to_capture, (second, first, SimpleNamespace(cudagraph_manager=None))))
