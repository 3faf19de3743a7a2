# SPDX-License-Identifier: Apache-2.0
"""Two engine hosts of one machine that share host copies of weights: what they hold, and how fast a copy is read.

    python -m bench.node_store --json bench/results/node_store_cpu.json

Two servers with the same models, one host each, first with private copies, then with a shared store. When both are
ready they are parked, so that nothing is on the device, and their memory is counted.

    host_copies    copies that the node's book has of each model; hosts: hosts in that book
    rss_ratio      proportional set size (PSS) of all processes of both servers, shared / private
    fetch_ratio    bytes per second of reading a model that is on disk only, from the first byte until it is checked and
                   can be copied to the device / bytes per second of reading its file into fresh memory; medians. The
                   file is not in the page cache before either.
    second_start_s  from the start of the second server until it is ready, private and shared
    reads          of checkpoints by the second server, private and shared: what the kernel says it read from files
"""

from __future__ import annotations

import mmap
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/ itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from bench.parts import common, sized_models

_ENV = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # fmt: skip
_KEY = "bench-admin-key-0123"
_CHUNK = 8 << 20
_KV_MIB = 64


@dataclass(frozen=True, slots=True)
class Result:
    """See the module."""

    host_copies: float
    hosts: int
    rss_ratio: float
    fetch_ratio: float
    pss_private_bytes: int
    pss_shared_bytes: int
    weight_bytes: int
    second_start_s: Mapping[str, float]
    reads: Mapping[str, int]
    fetch_bytes_per_s: Sequence[float]
    plain_bytes_per_s: Sequence[float]
    book: Mapping[str, Any]


class Pool:
    """Two servers, each with one host and the same models."""

    def __init__(
        self, folder: Path, logs: Path, paths: Mapping[str, Path], mib: int, store: str, limit_s: float
    ) -> None:
        self.names = list(paths)
        self.servers: list[common.Server] = []
        self.ready_s: list[float] = []
        self.read_bytes: list[int] = []
        config = {
            "models": [{"name": name, "model": str(path), "args": {"max_model_len": 512, "enforce_eager": True,
                        "dtype": "bfloat16", "block_size": 32}} for name, path in paths.items()],
            "weights": "movable", "device_memory": f"{mib + 2 * _KV_MIB}MiB", "page_size": "4MiB",
            "host_memory": f"{len(paths) * mib + 4 * _KV_MIB}MiB", "host_store": store, "admin_key": _KEY,
        }  # fmt: skip
        file = folder / f"{store}.yaml"
        file.write_text(yaml.safe_dump(config))
        self._start = lambda: common.Server((*common.POOL, str(file)), self.names, self._log(logs, store), **_ENV)
        self._limit_s = limit_s

    def _log(self, logs: Path, store: str) -> Path:
        return logs / f"{store}-{len(self.servers)}.log"

    def start(self) -> None:
        """One more server, ready."""
        server = self._start()
        self.servers.append(server)
        self.ready_s += common.wait_until_ready([server], self._limit_s)
        self.read_bytes.append(sum(_read_bytes(process.pid) for process in server.tree()))

    def park(self) -> None:
        """Take all weights off both devices."""
        for server in self.servers:
            server.get("/v1/pool/budget", key=_KEY, body={"device_memory": 0}, limit_s=120)

    def pss_bytes(self) -> int:
        """Of all processes of both servers."""
        return common.memory_of(p.pid for server in self.servers for p in server.tree())["pss"]

    def book(self) -> dict[str, Any]:
        """The node's, as the host of the first server knows it."""
        time.sleep(2.5)  # hosts look at it once a second
        memory = self.servers[0].get("/v1/pool/state", key=_KEY)["host"]["host_memory"]
        return memory["node"]

    def close(self) -> None:
        """End both."""
        while self.servers:
            self.servers.pop().close()


def _read_bytes(pid: int) -> int:
    """What a process had read by the kernel from a disk, or from files that it maps."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return 0
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def forget(folder: Path) -> list[Path]:
    """Take the weight files of a checkpoint out of the page cache; returns them."""
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return files


def plain_read(folder: Path) -> float:
    """Bytes per second of reading the files from the disk into fresh memory."""
    files = forget(folder)
    nbytes = sum(path.stat().st_size for path in files)
    with mmap.mmap(-1, nbytes) as memory:
        view, done, start = memoryview(memory), 0, time.perf_counter()
        for path in files:
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(view[done : done + _CHUNK]):
                    done += count
        seconds = time.perf_counter() - start
        view.release()
    return nbytes / seconds


def fetch(server: common.Server, name: str, path: Path) -> float:
    """Bytes per second of a read of a model that is on disk only, which a request has begun."""
    forget(path)
    state = server.get("/v1/pool/state", key=_KEY)["host"]["models"][name]["state"]
    if state != "on disk":
        raise RuntimeError(f"{name} is {state}, and should be on disk")
    began_s = time.time()
    body = {"model": name, "prompt": [5, 6, 7], "max_tokens": 2}
    server.get("/v1/completions", body=body, limit_s=300)
    events = server.get("/v1/pool/trace", key=_KEY)["traceEvents"]
    (found,) = [e for e in events if e["name"] == "weights_from_disk" and e["ts"] > 1e6 * began_s]
    return float(found["args"]["bytes"] / (found["dur"] / 1e6))


def run(*, models: int, mib: int, fetches: int, seed: int, start_limit_s: float, logs: Path | None) -> Result:
    """The whole bench."""
    with common.scratch(logs) as (folder, log_folder, stack):
        paths = sized_models.make_all(folder / "models", {f"model-{i}": mib for i in range(models)})
        weight_bytes = sum(file.stat().st_size for path in paths.values() for file in path.glob("*.safetensors"))
        pss, second_s, reads, book = {}, {}, {}, dict[str, Any]()
        store = f"bench-{os.getpid()}"
        for kind, name in (("private", "private"), ("shared", store)):
            pool = Pool(folder, log_folder, paths, mib, name, start_limit_s)
            stack.callback(pool.close)
            for _ in range(2):
                for path in paths.values():
                    forget(path)
                pool.start()
            pool.park()
            pss[kind], second_s[kind], reads[kind] = pool.pss_bytes(), pool.ready_s[1], pool.read_bytes[1]
            if kind == "shared":
                book = pool.book()
            common.progress(f"{kind}: PSS {pss[kind] >> 20} MiB, second server ready after {second_s[kind]:.1f} s")
            pool.close()
        fetched, plain = _fetches(folder, log_folder, paths, mib, fetches, start_limit_s, stack)
        return Result(
            host_copies=len(book["copies"]) / models,
            hosts=book["hosts"],
            rss_ratio=pss["shared"] / pss["private"],
            fetch_ratio=statistics.median(fetched) / statistics.median(plain),
            pss_private_bytes=pss["private"],
            pss_shared_bytes=pss["shared"],
            weight_bytes=weight_bytes,
            second_start_s=second_s,
            reads=reads,
            fetch_bytes_per_s=fetched,
            plain_bytes_per_s=plain,
            book={key: value for key, value in book.items() if key not in ("copies", "pid")},
        )


def _fetches(
    folder: Path, logs: Path, paths: Mapping[str, Path], mib: int, count: int, limit_s: float, stack: Any
) -> tuple[list[float], list[float]]:
    """One server whose host memory has room for one model's copy: they are read in turns."""
    pool = Pool(folder, logs, paths, mib, f"bench-{os.getpid()}-one", limit_s)
    stack.callback(pool.close)
    pool.start()
    (server,) = pool.servers
    server.get("/v1/pool/budget", key=_KEY, body={"host_memory": f"{mib + mib // 2}MiB"}, limit_s=120)
    fetched, plain = [], []
    for index in range(count):
        states = server.get("/v1/pool/state", key=_KEY)["host"]["models"]
        name = next(name for name in pool.names if states[name]["state"] == "on disk")
        plain.append(plain_read(paths[name]))
        fetched.append(fetch(server, name, paths[name]))
        common.progress(f"fetch {index}: {fetched[-1] / 1e6:.0f} MB/s, plain {plain[-1] / 1e6:.0f} MB/s")
    return fetched, plain


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--models", type=int, default=2, help="2 or more (default: %(default)s)")
    parser.add_argument("--mib", type=int, default=512, help="of weights of each (default: %(default)s)")
    parser.add_argument("--fetches", type=int, default=5, help="reads from disk (default: %(default)s)")
    common.report("node_store", run, parser.parse_args(), ("host_copies", "hosts", "rss_ratio", "fetch_ratio"))


if __name__ == "__main__":
    main()
