# SPDX-License-Identifier: Apache-2.0
"""What the device calls of a switch cost: copies over the link, mapping pages, and ways to copy scattered KV blocks.

    h2d_gbs, d2h_gbs   best rate of copies between pinned memory and the GPU, 10^9 bytes per second, over all chunks
    map_us, unmap_us   per page of --page-mib: re-mapping, access and zeroing; unmapping

Timer boundaries: the host's clock from the first call to the end of the last copy. Medians of --repeats. Rates by
chunk, number of copies in flight, and way of copying blocks are in the JSON. Nothing else may use the GPU meanwhile.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/gpu itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.gpu import rig
from bench.parts import common

CHUNKS_MIB = (0.25, 1, 4, 8, 16, 64)
BLOCK_KIB = (64, 256, 1024, 4096)
NUM_BLOCKS = 256


@dataclass(frozen=True, slots=True)
class Link:
    """Results; see the module."""

    gpu: dict[str, Any]
    h2d_gbs: float
    d2h_gbs: float
    map_us: float
    unmap_us: float
    h2d_gbs_of: dict[str, float]
    """By `CHUNKMiB xIN_FLIGHT`."""
    blocks_gbs: dict[str, float]
    """By `BLOCKKiB WAY in` or `out`; a way that failed is missing and named in the log."""
    copy_ways: list[tuple[int, str]]
    """The table for `cuda_copies.CHOSEN` that these rates choose, each way by its slower direction."""
    create_us: float
    """Making the physical handle of a page, once."""


def run(*, mib: int, page_mib: int, repeats: int, seed: int, start_limit_s: float, logs: Path | None) -> Link:
    """Measure all; needs about 2 * `mib` of device memory."""
    del start_limit_s, logs  # there is no server
    rig.require_cuda()
    from tokenpool.memory.devices.cuda import CudaDevice

    page, num_pages = page_mib << 20, max(2, mib // page_mib)
    device = CudaDevice(page)
    nbytes = num_pages * page
    address, host = device.reserve(nbytes), device.host_buffer(nbytes)
    host.fill_(1)

    first_s = _timed(device.map_zeroed, address, nbytes)
    map_s, unmap_s = [], []
    for _ in range(repeats):
        unmap_s.append(_timed(device.unmap, address, nbytes))
        map_s.append(_timed(device.map_zeroed, address, nbytes))
    map_us = statistics.median(map_s) / num_pages * 1e6

    h2d: dict[str, float] = {}
    for chunk_mib in CHUNKS_MIB:
        for in_flight in (1, 2, 4):
            seconds = [_timed(_in, device, address, host, chunk_mib, in_flight) for _ in range(repeats)]
            h2d[f"{chunk_mib:g}MiB x{in_flight}"] = nbytes / statistics.median(seconds) / 1e9
            common.progress(f"to the device {chunk_mib:g}MiB x{in_flight}: {list(h2d.values())[-1]:.1f} GB/s")
    d2h_s = [_timed(device.copy_out, host, address) for _ in range(repeats)]
    blocks = _blocks(device, address, nbytes, repeats, random.Random(seed))
    device.release(address, nbytes)
    return Link(
        gpu=rig.describe_gpu(),
        h2d_gbs=max(h2d.values()),
        d2h_gbs=nbytes / statistics.median(d2h_s) / 1e9,
        map_us=map_us,
        unmap_us=statistics.median(unmap_s) / num_pages * 1e6,
        h2d_gbs_of=h2d,
        blocks_gbs={f"{kib}KiB {name} {way}": rate for (kib, name, way), rate in blocks.items()},
        copy_ways=_choose(blocks),
        create_us=first_s / num_pages * 1e6 - map_us,
    )


def _in(device: Any, address: int, host: Any, chunk_mib: float, in_flight: int) -> None:
    chunk = int(chunk_mib * (1 << 20))
    waits: deque[Callable[[], None]] = deque()
    for start in range(0, host.numel(), chunk):
        waits.append(device.begin_copy_in(address + start, host[start : start + chunk]))
        if len(waits) == in_flight:
            waits.popleft()()
    while waits:
        waits.popleft()()


def _choose(blocks: dict[tuple[int, str, str], float]) -> list[tuple[int, str]]:
    from tokenpool.host.load.cuda_copies import fastest

    rates: dict[int, dict[str, float]] = {}
    for kib, name, way in blocks:
        if way == "in" and (kib, name, "out") in blocks:
            rates.setdefault(kib << 10, {})[name] = min(blocks[kib, name, "in"], blocks[kib, name, "out"])
    return fastest(rates)


def _blocks(
    device: Any, address: int, nbytes: int, repeats: int, rng: random.Random
) -> dict[tuple[int, str, str], float]:
    """Rates in 10^9 bytes per second by KiB of a block, way to copy, and direction."""
    from tokenpool.host.load.cuda_copies import BATCH_COPIES

    found: dict[tuple[int, str, str], float] = {}
    for kib in BLOCK_KIB:
        size = kib << 10
        if NUM_BLOCKS * size > nbytes:
            continue
        host = device.host_buffer(NUM_BLOCKS * size)
        places = rng.sample(range(nbytes // size), NUM_BLOCKS)
        copies = [(address + place * size, host[i * size : (i + 1) * size]) for i, place in enumerate(places)]
        for name, batch in BATCH_COPIES.items():
            device.ways = ((0, batch),)
            for way, begin in (("out", device.begin_copies_out), ("in", device.begin_copies_in)):
                try:
                    begin(copies).wait()  # the first call compiles the Triton kernel
                    seconds = statistics.median(_timed(_begin_and_wait, begin, copies) for _ in range(repeats))
                except Exception as error:  # one way of three: the others are still worth knowing
                    common.progress(f"{kib}KiB {name} {way}: {type(error).__name__}: {error}")
                else:
                    found[kib, name, way] = NUM_BLOCKS * size / seconds / 1e9
        device.ways = ((0, None),)
    return found


def _begin_and_wait(begin: Callable[..., Any], copies: Any) -> None:
    begin(copies).wait()


def _timed(call: Callable[..., None], *args: Any) -> float:
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


def main(words: Sequence[str] | None = None) -> None:
    """Read the flags, run, report."""
    parser = common.parser(__doc__)
    parser.add_argument("--mib", type=int, default=2048, help="bytes of each copy (default: %(default)s)")
    parser.add_argument("--page-mib", type=int, default=32, help="multiple of 2 (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    common.report("gpu_link", run, parser.parse_args(words), ["h2d_gbs", "d2h_gbs", "map_us", "unmap_us"])


if __name__ == "__main__":
    main()
