# SPDX-License-Identifier: Apache-2.0
"""Hosts without engines for the ends of a move: real tier, link, exchange and loop calls, and blocks with known bytes.

Every byte of a block is made of its key, so whoever has a block knows what must be in it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tokenpool.host.kv.tier_link import TierLink
from tokenpool.host.kv_exchange import KVExchange, Offer
from tokenpool.host.loop_calls import LoopCalls
from tokenpool.memory.devices.cpu import CpuDevice
from tokenpool.memory.host_ledger import HostLedger, HostUse
from tokenpool.memory.kv_tier import HostKVTier
from tokenpool.wire.messages import Wire, connect
from tokenpool.wire.pulse import Pulse

MODEL = "m"
REQUEST = "r"
LIMIT_S = 60.0


def key_of(number: int) -> bytes:
    """The key of a block."""
    return b"block" + number.to_bytes(8, "little") + bytes(20)


def content_of(key: bytes, block_bytes: int) -> np.ndarray:
    """Its bytes: no two keys, and no two places of a block, have the same."""
    seed = int.from_bytes(key[5:13], "little")
    return (np.arange(block_bytes // 8, dtype=np.uint64) * 7 + seed * 1_000_003).view(np.uint8)


def knock(offer: Offer, limit_s: float = 30.0) -> Wire:
    """A connection to the nearest address of an offer, without a proof so far."""
    address = offer["addresses"][0]
    return connect(address, limit_s, None if isinstance(address, str) else offer["certificate"])


class TierHost:
    """What `KVExchange` knows of an EngineHost: a loop, a tier, and one model with one request of `num_blocks`."""

    group = None

    def __init__(
        self, path: str, node_ip: str | None = None, *, block_bytes: int = 1 << 14, num_blocks: int = 0,
        host_memory: int = 64 << 20, step: Callable[[], None] | None = None, only: str | None = None,
    ) -> None:  # fmt: skip
        self.device = CpuDevice()
        self.tier = HostKVTier(HostLedger(host_memory), self.device)
        self.tier.host.make_room = self.tier.drop_cached
        self.block_bytes, self.num_blocks = block_bytes, num_blocks
        size = -(-max(1, num_blocks * block_bytes) // self.device.granularity) * self.device.granularity
        self._base, self._size = self.device.reserve(size), size
        self.device.map_zeroed(self._base, size)
        self._calls, self._wake, self._end = LoopCalls(Pulse()), threading.Event(), False
        self._step = step
        self.gaps_s: list[float] = []
        """Time between the end of a step and the beginning of the next, for which steps had to wait for calls."""
        self.models: dict[str, Any] = {}
        self.swapper = SimpleNamespace(tier=self.tier, after_step=lambda hosted: None, is_out=lambda model: False)
        self.exchange = KVExchange(self, path, node_ip)  # type: ignore[arg-type]
        if only is not None:
            self.exchange._addresses = [a for a in self.exchange._addresses if isinstance(a, str) == (only == "unix")]
        self.add()

    def add(self) -> None:
        """The model, with a request whose blocks are on the device."""
        blocks = []
        for number in range(self.num_blocks):
            key, address = key_of(number), self._base + number * self.block_bytes
            self.device.tensor(address, self.block_bytes).numpy().view(np.uint8)[:] = content_of(key, self.block_bytes)
            blocks.append(SimpleNamespace(block_id=number, block_hash=key, block_hash_num_tokens=number))
        view = SimpleNamespace(owner=MODEL, block_bytes=self.block_bytes)
        pool = SimpleNamespace(
            view=view, transit=None, address_of=lambda block_id: self._base + block_id * self.block_bytes
        )
        pool.link = TierLink(pool, self.tier)
        coordinator = SimpleNamespace(single_type_managers=[SimpleNamespace(req_to_blocks={REQUEST: blocks})])
        scheduler = SimpleNamespace(kv_cache_manager=SimpleNamespace(coordinator=coordinator))
        core = SimpleNamespace(scheduler=scheduler, drain_batches=lambda: None)
        hosted = SimpleNamespace(name=MODEL, core=core, build=SimpleNamespace(pool=pool))
        self.models[MODEL] = hosted
        self.exchange.add(hosted)  # type: ignore[arg-type]

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """See EngineHost."""
        future = self._calls.submit(function)
        self._wake.set()
        return future

    def run(self) -> None:
        """Be the loop until `end`: calls between steps, or when they come if there is no step."""
        while not self._end:
            start = time.perf_counter()
            self._calls.run()
            self.gaps_s.append(time.perf_counter() - start)
            if self._step is not None:
                self._step()
            elif not self._calls:
                self._wake.wait(0.05)
                self._wake.clear()

    def start(self) -> TierHost:
        """Run the loop on a thread."""
        threading.Thread(target=self.run, daemon=True).start()
        return self

    def end(self) -> None:
        self._end = True
        self._wake.set()

    # -- what tests ask, from other threads ----------------------------------------------------------

    def export(self) -> Offer:
        """As a frontend does."""
        return self.call(lambda: self.models[MODEL].core.export_kv(REQUEST)).result(LIMIT_S).result(LIMIT_S)

    def fetch(self, offer: Offer) -> int:
        """As a frontend does; raises HostError."""
        return self.call(lambda: self.models[MODEL].core.import_kv(offer)).result(LIMIT_S).result(LIMIT_S)

    def verify(self) -> int:
        """How many blocks the tier has, all with the bytes that they must have; the books are in order."""
        return self.call(self._verify).result(LIMIT_S)

    def _verify(self) -> int:
        self.tier.check()
        entries = self.tier.entries_of(MODEL)
        for key, entry in entries.items():
            entry.slot.buffer.settle()
            assert np.array_equal(entry.slot.view().numpy(), content_of(key, self.block_bytes)), (
                "a block has other bytes"
            )
        held = self.tier.host.held(MODEL, HostUse.CACHED_KV)
        assert held == len(entries) * self.block_bytes, "room is set aside for nothing"
        return len(entries)

    def forget(self) -> None:
        """Let the tier be as new."""
        self.call(lambda: self.tier.forget(MODEL)).result(LIMIT_S)

    def timed(self, method: str, *args: Any) -> tuple[float, Any]:
        """Seconds and result of one of these."""
        start = time.perf_counter()
        result = getattr(self, method)(*args)
        return time.perf_counter() - start, result

    def new_gaps(self) -> list[float]:
        """`gaps_s` since this was asked last."""
        found, self.gaps_s = self.gaps_s, []
        return found


class HostProcess:
    """A TierHost in a process of its own."""

    def __init__(self, folder: Path, name: str, node_ip: str | None = None, **options: Any) -> None:
        self._context = get_context("spawn")
        self._pipe, theirs = self._context.Pipe()
        arguments = (theirs, str(folder / name), node_ip, options)
        self.process = self._context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        assert self.ask("ready") is True

    def ask(self, method: str, *args: Any) -> Any:
        """Call a method of the host there."""
        self._pipe.send((method, args))
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def _serve(pipe: Any, path: str, node_ip: str | None, options: dict[str, Any]) -> None:
    if (step_s := options.pop("step_s", None)) is not None:
        options["step"] = partial(_compute, step_s)
    sys.setswitchinterval(0.0005)  # as a host does
    host = TierHost(path, node_ip, **options).start()
    while True:
        try:
            method, args = pipe.recv()
        except EOFError:
            return
        try:
            result = True if method == "ready" else getattr(host, method)
            pipe.send(result(*args) if callable(result) else result)
        except Exception as error:
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


_MATRIX = np.ones((192, 192), np.float32)


def _compute(seconds: float) -> None:
    """What a step does: the processor is busy, other Python threads run."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        _MATRIX @ _MATRIX
