# SPDX-License-Identifier: Apache-2.0
"""Memory of models, and of bodies, that are gone."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest

from tokenpool.process import heap
from tokenpool.process.heap import HeapTrimmer

pytestmark = pytest.mark.cpu

_METRICS = """
import gc, weakref
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from tokenpool.process.heap import release_metrics

registry = CollectorRegistry()
MultiProcessCollector(registry)
kept, gone = (Counter(name, "a counter", registry=None) for name in ("kept", "gone"))
kept.inc(1)
gone.inc(2)
value = weakref.ref(gone._value)
del gone
gc.collect()
held = value() is not None
release_metrics()
gc.collect()
kept.inc(3)
lines = generate_latest(registry).decode().splitlines()
print(held, value() is None, *[line for line in lines if not line.startswith("#")], sep="|")
"""


def test_values_of_metrics_that_are_gone_are_let_go_and_the_scrape_keeps_them(tmp_path: Path) -> None:
    """Counters must not fall when a model is removed, and those of the others go on."""
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}  # read once, at import

    out = subprocess.run([sys.executable, "-c", _METRICS], env=env, check=True, capture_output=True, text=True).stdout

    held, let_go, *scrape = out.strip().split("|")
    assert (held, let_go) == ("True", "True"), "if prometheus_client lets go by itself, release_metrics can go"
    assert sorted(scrape) == ["gone_total 2.0", "kept_total 4.0"]


def test_nothing_to_let_go_without_the_multiprocess_mode() -> None:
    """As in the engine host and in PooledLLM."""
    env = {name: value for name, value in os.environ.items() if name.lower() != "prometheus_multiproc_dir"}
    code = "from tokenpool.process.heap import release_metrics; release_metrics()"

    subprocess.run([sys.executable, "-c", code], env=env, check=True)


_TRIM = """
import ctypes, os
from tokenpool.process.heap import trim_heap

def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
size, blocks = 64 << 10, []
for _ in range(2000):
    blocks.append(libc.malloc(size))
    ctypes.memset(blocks[-1], 1, size)
kept = blocks[9::10]  # between what is freed
for block in set(blocks) - set(kept):
    libc.free(block)
before_mib = resident_mib()
done = trim_heap()
print(done, hasattr(libc, "malloc_trim"), before_mib - resident_mib())
assert all(ctypes.string_at(block, size) == bytes([1]) * size for block in kept)
"""


def test_a_trimmed_heap_is_given_back() -> None:
    """What was freed between pieces that are in use leaves the process, and these keep their bytes."""
    told = subprocess.run([sys.executable, "-c", _TRIM], check=True, capture_output=True, text=True).stdout.split()
    assert told[0] == told[1], "it is done where the C library can"
    assert told[0] == "False" or float(told[2]) > 60


def test_the_heap_is_trimmed_once_after_much_was_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the loop; not for a little, again for what comes later, and an error of it harms nobody."""
    monkeypatch.setattr(heap, "_WAIT_S", 0.01)
    threads: list[int] = []

    def trim() -> None:
        threads.append(threading.get_ident())
        raise OSError

    async def until(count: int) -> None:
        async with asyncio.timeout(60):
            while len(threads) < count or trimmer._is_due:
                await asyncio.sleep(0.005)

    async def main() -> None:
        trimmer.freed(heap._WORTH_BYTES - 1)
        await asyncio.sleep(0.05)
        assert not threads
        for _ in range(100):
            trimmer.freed(1000)
        await until(1)
        trimmer.freed(heap._WORTH_BYTES)
        await until(2)
        await asyncio.sleep(0.05)

    trimmer = HeapTrimmer(trim)
    asyncio.run(main())
    assert len(threads) == 2
    assert threading.get_ident() not in threads


def test_it_is_trimmed_once_more_when_nothing_large_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What threads still held at the first time, and what only a collection finds, goes then."""
    monkeypatch.setattr(heap, "_WAIT_S", 0.01)
    monkeypatch.setattr(heap, "_AGAIN_S", 0.2)

    class Fault(Exception):
        """An error that refers to itself, as those do that a frame keeps."""

    alive: list[bool] = []

    async def main() -> None:
        gc.disable()
        try:
            fault = Fault()
            fault.itself = fault  # type: ignore[attr-defined]
            seen = weakref.ref(fault)
            del fault
            trimmer = HeapTrimmer(lambda: alive.append(seen() is not None))
            trimmer.freed(heap._WORTH_BYTES)
            async with asyncio.timeout(60):
                while len(alive) < 2:
                    await asyncio.sleep(0.01)
        finally:
            gc.enable()

    asyncio.run(main())
    assert alive == [True, False]
