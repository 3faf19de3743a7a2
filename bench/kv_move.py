# SPDX-License-Identifier: Apache-2.0
"""How fast the KV of a request that moves goes from one host to another, compared with a plain socket.

    python -m bench.kv_move --json bench/results/kv_move_cpu.json

Two processes with a host's end of a move each: the real exchange, tier of cached blocks, link and loop calls, without
engines. The request's blocks are on the source's (CPU) device. Arms take turns, round by round, at each size:

    plain      one process sends the bytes of a buffer over TCP on the loopback, the other takes them into fresh memory
    plain_tls  the same, encrypted as the product's path is
    tls        the product's path between machines: blocks out of the slots of one tier into fresh slots of the other
    shm        the product's path on one machine: through memory that both processes map

    kv_move_ratio       seconds of plain_tls / seconds of tls, medians, at the largest size: from the offer until all
                        blocks can be found at the target; tls_ratio is that of plain / tls, shm_ratio of plain / shm
    with_export         the last two once more with the copy from the device into the source's tier, which plain does
                        not make
    max_step_delay_ms   the longest time for which a step of either host had to wait for the move, between two steps,
                        while blocks move over TLS and both hosts step all the time; step_delay_p99_ms likewise
    chunk_ms            what one chunk takes on the wire in that arm

Sender and receiver of every arm share the cores of this machine: with two cores, and two loops that step, four threads
want them. So the ratio is that of two processes on one machine and says nothing of a network card.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/ itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.parts import common

_MIB = 1 << 20
_STEP_S = 0.005
_LIMIT_S = 30.0
_ARMS = ("plain", "plain_tls", "tls", "shm")


@dataclass(slots=True)
class Result:
    """See the module; by arm, and by size in MiB where there is one."""

    kv_move_ratio: float
    tls_ratio: float
    shm_ratio: float
    with_export: dict[str, float]
    max_step_delay_ms: float
    chunk_ms: float
    step_delay_p99_ms: float
    max_step_delay_at_rest_ms: float
    """The same between steps while nothing moves."""
    num_cores: int
    ratios: dict[str, dict[int, float]] = field(default_factory=dict)
    bytes_per_s: dict[str, dict[int, float]] = field(default_factory=dict)
    seconds: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    export_s: dict[int, float] = field(default_factory=dict)


def _plain_source(pipe: Any, nbytes: int, is_encrypted: bool) -> None:
    """Send as many bytes as each connection asks for."""
    import numpy as np

    from tokenpool.wire.tls import Identity

    identity = Identity.new() if is_encrypted else None
    content = memoryview(np.arange(nbytes // 8, dtype=np.uint64).view(np.uint8))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        pipe.send((listening.getsockname(), identity.certificate if identity is not None else None))
        while True:
            sock = listening.accept()[0]
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with identity.accept(sock, _LIMIT_S) if identity is not None else sock as end:
                end.sendall(content[: int.from_bytes(end.recv(8), "big")])


def _plain_target(pipe: Any) -> None:
    """Receive into fresh memory, and say how long it took."""
    import numpy as np

    from tokenpool.wire.tls import enter

    while True:
        (address, certificate), nbytes = pipe.recv()
        start = time.perf_counter()
        content = memoryview(np.empty(nbytes, np.uint8))
        sock = socket.create_connection(address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with sock if certificate is None else enter(sock, certificate, _LIMIT_S) as end:
            end.sendall(nbytes.to_bytes(8, "big"))
            filled = 0
            while filled < nbytes:
                filled += end.recv_into(content[filled:])
        pipe.send(time.perf_counter() - start)


class Plain:
    """The two processes of the arms `plain` and `plain_tls`."""

    def __init__(self, most_bytes: int, *, is_encrypted: bool) -> None:
        context = get_context("spawn")
        theirs, self._source = context.Pipe()
        source = context.Process(target=_plain_source, args=(theirs, most_bytes, is_encrypted), daemon=True)
        theirs, self._target = context.Pipe()
        target = context.Process(target=_plain_target, args=(theirs,), daemon=True)
        self._processes = [source, target]
        for process in self._processes:
            process.start()
        self._where = self._source.recv()

    def move(self, nbytes: int) -> float:
        """Seconds."""
        self._target.send((self._where, nbytes))
        return float(self._target.recv())

    def end(self) -> None:
        """End both."""
        for process in self._processes:
            process.kill()


class Hosts:
    """Two hosts, the source with one request of `mib`; over either kind of socket."""

    def __init__(self, folder: Path, mib: int, block_kib: int, step_s: float | None = None) -> None:
        from tests.host.kv.kv_hosts import HostProcess

        self.num_blocks = mib * 1024 // block_kib
        options: dict[str, Any] = {"block_bytes": block_kib << 10, "host_memory": 2 * (mib + 64) * _MIB,
                                   "step_s": step_s}  # fmt: skip
        folder.mkdir()
        self._both = [HostProcess(folder, "source", "127.0.0.1", num_blocks=self.num_blocks, **options),
                      HostProcess(folder, "target", "127.0.0.1", **options)]  # fmt: skip
        self.source, self.target = self._both

    def move(self, arm: str) -> tuple[float, float]:
        """Seconds of the copy into the source's tier, and from there into the target's."""
        for host in self._both:
            host.ask("forget")
            host.ask("new_gaps")
        export_s, offer = self.source.ask("timed", "export")
        kind = str if arm == "shm" else tuple
        offer = {**offer, "addresses": [address for address in offer["addresses"] if isinstance(address, kind)]}
        seconds, count = self.target.ask("timed", "fetch", offer)
        if count != self.num_blocks:
            raise RuntimeError(f"{count} of {self.num_blocks} blocks arrived")
        return export_s, seconds

    def verify(self) -> None:
        """All bytes are there."""
        if self.target.ask("verify") != self.num_blocks:
            raise RuntimeError("blocks are missing")

    def gaps_ms(self) -> list[float]:
        """How long steps of both waited since the last move began, or this was asked."""
        return [1000 * gap for host in self._both for gap in host.ask("new_gaps")]

    def end(self) -> None:
        """End both."""
        for host in self._both:
            host.end()


def _sizes(
    folder: Path, plain: dict[str, Plain], mib: int, block_kib: int, repeats: int
) -> tuple[dict[str, list[float]], float]:
    """Seconds of each arm at one size, and of the export."""
    hosts = Hosts(folder / str(mib), mib, block_kib)
    seconds: dict[str, list[float]] = {arm: [] for arm in _ARMS}
    exports: list[float] = []
    try:
        for turn in range(repeats + 1):
            for arm in _ARMS:
                export_s, took_s = (0.0, plain[arm].move(mib * _MIB)) if arm in plain else hosts.move(arm)
                if turn and arm not in plain:
                    exports.append(export_s)
                if turn:  # the first is for warmth
                    seconds[arm].append(took_s)
        hosts.verify()
    finally:
        hosts.end()
    return seconds, statistics.median(exports)


def _delays(folder: Path, mib: int, block_kib: int, repeats: int) -> dict[str, float]:
    from tokenpool.wire.kv_frames import CHUNK_BYTES

    hosts = Hosts(folder / "steps", mib, block_kib, _STEP_S)
    try:
        hosts.move("tls")
        hosts.gaps_ms()
        time.sleep(1.0)
        rest = hosts.gaps_ms()
        took_s, moving = [], []
        for _ in range(repeats):
            took_s.append(hosts.move("tls")[1])
            moving += hosts.gaps_ms()
        hosts.verify()
    finally:
        hosts.end()
    return {
        "max_step_delay_ms": max(moving),
        "step_delay_p99_ms": common.percentile(moving, 99),
        "max_step_delay_at_rest_ms": max(rest),
        "chunk_ms": 1000 * statistics.median(took_s) * CHUNK_BYTES / (mib * _MIB),
    }


def run(
    *, mib: Sequence[int], block_kib: int, repeats: int, seed: int, start_limit_s: float, logs: Path | None
) -> Result:
    """The whole bench."""
    os.environ.update({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})  # before the processes are started
    seconds: dict[str, dict[int, list[float]]] = {arm: {} for arm in _ARMS}
    export_s: dict[int, float] = {}
    plain = {arm: Plain(max(mib) * _MIB, is_encrypted=arm == "plain_tls") for arm in _ARMS if arm.startswith("plain")}
    with common.scratch(logs) as (folder, _, stack):
        for pair in plain.values():
            stack.callback(pair.end)
        for size in mib:
            found, export_s[size] = _sizes(folder, plain, size, block_kib, repeats)
            for arm in _ARMS:
                seconds[arm][size] = found[arm]
            middle = {arm: 1000 * statistics.median(found[arm]) for arm in _ARMS}
            common.progress(f"{size} MiB: " + ", ".join(f"{arm} {ms:.2f} ms" for arm, ms in middle.items()))
        delays = _delays(folder, max(mib), block_kib, repeats)
    middle_s = {arm: {size: statistics.median(values) for size, values in seconds[arm].items()} for arm in _ARMS}
    ratios = {arm: {size: middle_s["plain"][size] / middle_s[arm][size] for size in mib} for arm in _ARMS[1:]}
    most = max(mib)
    return Result(
        kv_move_ratio=middle_s["plain_tls"][most] / middle_s["tls"][most],
        tls_ratio=ratios["tls"][most],
        shm_ratio=ratios["shm"][most],
        with_export={arm: middle_s["plain"][most] / (middle_s[arm][most] + export_s[most]) for arm in ("tls", "shm")},
        num_cores=os.cpu_count() or 1,
        ratios=ratios,
        bytes_per_s={arm: {size: size * _MIB / s for size, s in middle_s[arm].items()} for arm in _ARMS},
        seconds=seconds,
        export_s=export_s,
        **delays,
    )


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--mib", type=int, nargs="+", default=[1, 16, 256], help="sizes (default: %(default)s)")
    parser.add_argument("--block-kib", type=int, default=512, help="of KV per block (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="moves per arm and size (default: %(default)s)")
    keys = ("kv_move_ratio", "tls_ratio", "shm_ratio", "max_step_delay_ms", "chunk_ms")
    common.report("kv_move", run, parser.parse_args(), keys)


if __name__ == "__main__":
    main()
