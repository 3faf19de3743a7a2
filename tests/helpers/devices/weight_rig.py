# SPDX-License-Identifier: Apache-2.0
"""A weight store on a device that can break, and tensors of all sorts to put into it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tokenpool.memory.devices.cpu import CpuDevice
from tokenpool.memory.host_ledger import HostLedger, HostUse
from tokenpool.memory.ledger import PageLedger
from tokenpool.memory.weights import WeightStore

PAGE = 64 << 10
CHUNK = 16 << 10
LIMIT_S = 20.0
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn)


def random_tensors(seed: int, count: int = 8) -> list[torch.Tensor]:
    """Parameters and buffers of several dtypes; some share storages, have offsets or are transposed or empty."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    tensors: list[torch.Tensor] = []
    for _ in range(count):
        shape = [rng.randrange(1, 40) for _ in range(rng.randrange(4))]
        nbytes = max(1, torch.Size(shape).numel()) * 8
        raw = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)
        dtype = rng.choice(DTYPES)
        flat = (raw % 2).bool() if dtype is torch.bool else raw.view(dtype)
        whole = flat[: torch.Size(shape).numel()].view(shape)
        tensors.append(torch.nn.Parameter(whole, requires_grad=False) if rng.random() < 0.5 else whole)
        kind = rng.randrange(5)
        if kind == 0 and whole.dim():
            tensors.append(whole.transpose(0, -1))
        elif kind == 1 and whole.dim():
            tensors.append(whole.narrow(0, whole.shape[0] // 2, whole.shape[0] - whole.shape[0] // 2))
        elif kind == 2:
            tensors.append(flat[1:][::3])
        elif kind == 3:
            tensors.append(tensors[-1])
        elif kind == 4:
            tensors.append(torch.empty(0, dtype=dtype))
    return tensors


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().flatten().clone(memory_format=torch.contiguous_format)


def bytes_of(tensors: list[torch.Tensor]) -> list[list[int]]:
    return [_flat(tensor).view(torch.uint8).tolist() for tensor in tensors]


@dataclass
class Checkpoint:
    """What a model was loaded from; `reload` writes it into the tensors, as a loader does."""

    tensors: list[torch.Tensor]
    saved: list[torch.Tensor] = field(default_factory=list)
    skip: set[int] = field(default_factory=set)
    """Tensors that are in no checkpoint."""
    before: Callable[[int], None] = lambda index: None
    reads: int = 0

    def __post_init__(self) -> None:
        self.saved = [tensor.detach().clone() for tensor in self.tensors]

    def reload(self, advance: Callable[[int], None], on_final: Callable[[torch.Tensor], None]) -> None:
        self.reads += 1
        for index, (tensor, value) in enumerate(zip(self.tensors, self.saved, strict=True)):
            if index not in self.skip:
                self.before(index)
                tensor.data.copy_(value)
                if index % 2:
                    on_final(tensor)
            advance(value.nbytes)


class Breaking(CpuDevice):
    """A device whose calls fail on demand: name of the call -> calls that still succeed."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed: dict[str, int] = {}
        self.before_copy: Callable[[], None] = lambda: None

    def _count(self, call: str) -> None:
        if call in self.allowed:
            self.allowed[call] -= 1
            if self.allowed[call] < 0:
                raise OSError(f"{call} failed")

    def reserve(self, nbytes: int) -> int:
        self._count("reserve")
        return super().reserve(nbytes)

    def map_later(self, address: int, nbytes: int):
        self._count("map_later")
        back = super().map_later(address, nbytes)
        self.fill(address, nbytes, 0xFF)
        return back

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        self._count("host_buffer")
        return super().host_buffer(nbytes)

    def copy_in(self, address: int, source: torch.Tensor) -> None:
        self.before_copy()
        self._count("copy_in")
        super().copy_in(address, source)


class Rig:
    """A store with its ledgers on a device that can break."""

    def __init__(self, pages: int = 64, host_bytes: int = 1 << 30, *, poison: bool = True) -> None:
        self.device = Breaking()
        self.ledger = PageLedger(pages, PAGE)
        self.host = HostLedger(host_bytes)
        self.store = WeightStore(self.device, self.ledger, self.host, poison=poison, chunk_bytes=CHUNK)

    def load(self, owner: str) -> None:
        self.store.map(owner)
        assert self.store.copy(owner).wait(LIMIT_S)
        self.store.finish(owner)

    def check(self) -> None:
        self.store.check()
        self.ledger.check()
        self.host.check()

    def assert_empty(self) -> None:
        self.check()
        assert self.ledger.num_free == self.ledger.num_pages
        assert 0 == self.host.total(HostUse.WEIGHTS)


def big_tensors(pages: int) -> list[torch.Tensor]:
    """One storage of that many pages, less a bit."""
    values = torch.arange(pages * PAGE // 8 - 5, dtype=torch.int64)
    return [torch.nn.Parameter(values, requires_grad=False)]
