# SPDX-License-Identifier: Apache-2.0
"""What the benches share: servers under test, their memory, a streaming load, and the file of results.

Imports neither torch, vllm nor numpy: this process must not map the libraries of the servers, because the
proportional set size (PSS) of a page is divided by the number of processes that map it. For the same reason no other
vLLM process should run on the machine while memory is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import psutil
import uvloop

REPO = Path(__file__).resolve().parents[1]
FIRST_PLAIN_TOKEN, VOCAB_SIZE = 3, 512  # of the tiny models; below 3 are <s>, </s> and <unk>
THREAD_VARIABLES = ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND")
MODEL_ARGS = {"max_model_len": 512, "enforce_eager": True, "dtype": "bfloat16", "block_size": 32}
"""Engine arguments of every model on both sides."""

_STOP_LIMIT_S = 60.0
_PLAIN = ("-m", "vllm.entrypoints.launchers.api_server.entry")  # the `vllm` command needs a distribution named vllm
_POOL = ("-m", "tokenpool.serve.cli", "serve")


# -- servers ---------------------------------------------------------------------------------------------


class Server:
    """A server process under test; its output goes to a log file. Ends with `stop`."""

    def __init__(self, words: Sequence[str], port: int, log: Path, env: Mapping[str, str], probe: str) -> None:
        self.port, self.log, self._probe = port, log, probe
        log.parent.mkdir(parents=True, exist_ok=True)
        self.started_s = time.monotonic()
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, *words, "--host", "127.0.0.1", "--port", str(port)],
                stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env={**os.environ, **env},
                start_new_session=True,
            )  # fmt: skip

    def get(self, path: str, *, key: str = "", body: Any = None, limit_s: float = 10.0) -> Any:
        """GET a path, or POST `body` as JSON; returns the decoded answer, or None when it is empty."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=limit_s) as response:
            return json.loads(text) if (text := response.read()) else None

    def is_ready(self, models: Sequence[str]) -> bool:
        """Whether the probe answers 200 and /v1/models lists `models`; raises RuntimeError when the process ended."""
        if self.process.poll() is not None:
            tail = self.log.read_text(errors="replace")[-4000:]
            raise RuntimeError(f"the server ended with status {self.process.returncode}:\n{tail}")
        try:
            self.get(self._probe)
            return set(models) <= {card["id"] for card in self.get("/v1/models")["data"]}
        except (urllib.error.URLError, OSError):
            return False

    def tree(self) -> list[psutil.Process]:
        """The process and all that descend from it."""
        try:
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def cpu_s(self) -> float:
        """CPU seconds that the live processes of the tree have used so far."""
        total = 0.0
        for process in self.tree():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def thread_settings(self) -> list[dict[str, str]]:
        """OpenMP environment of each process of the tree that has one, for the record."""
        found = []
        for process in self.tree():
            with contextlib.suppress(psutil.Error):
                env = process.environ()
                found.append({k: v for k, v in env.items() if k.startswith(("OMP_", "GOMP_", "KMP_", "VLLM_CPU_"))})
        return [settings for settings in found if settings]

    def stop(self) -> None:
        """End the tree: politely first, then by force, so that nothing is left behind."""
        tree = self.tree()
        if self.process.poll() is None:
            self.process.terminate()
        psutil.wait_procs(tree, timeout=_STOP_LIMIT_S)
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


def start_pool(words: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> Server:
    """Start `tokenpool serve`; `words` are a pool file or models, and flags."""
    return Server([*_POOL, *words], free_port(), log, env or {}, "/ready")


def start_plain(model: Path, name: str, words: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> Server:
    """Start vLLM's own OpenAI server with one model."""
    args = [*_PLAIN, "--model", str(model), "--served-model-name", name, *words]
    return Server(args, free_port(), log, env or {}, "/health")


def wait_until_ready(servers: Mapping[str, tuple[Server, Sequence[str]]], limit_s: float) -> dict[str, float]:
    """Poll until every server answers for its models; returns the seconds from each server's own start."""
    ready: dict[str, float] = {}
    end = time.monotonic() + limit_s
    while len(ready) < len(servers):
        for name, (server, models) in servers.items():
            if name not in ready and server.is_ready(models):
                ready[name] = time.monotonic() - server.started_s
        if time.monotonic() > end:
            raise TimeoutError(f"not ready after {limit_s:g} s: {', '.join(servers.keys() - ready.keys())}")
        time.sleep(0.1)
    return ready


def free_port() -> int:
    """A port that is free now; never the same twice in one run."""
    while True:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        if port not in _ports_given:
            _ports_given.add(port)
            return port


_ports_given: set[int] = set()


def engine_flags(**more: Any) -> list[str]:
    """`MODEL_ARGS` and `more` as flags of `vllm serve`."""
    words: list[str] = []
    for name, value in {**MODEL_ARGS, **more}.items():
        words += [f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}", str(value)]
    return words


def make_models(folder: Path, kinds: Sequence[str]) -> dict[str, Path]:
    """Make one tiny model per entry, `kind`-`index` with the index as seed, in a child process (see the module)."""
    wanted = {f"{kind}-{i}": (kind, str(folder / f"{kind}-{i}"), i + 1) for i, kind in enumerate(kinds)}
    code = (
        "import json, sys; from tokenpool.demo.tiny_models import make_tiny_model as make\n"
        "for kind, path, seed in json.loads(sys.argv[1]): make(kind, path, seed=seed)"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(list(wanted.values()))], check=True)
    return {name: Path(path) for name, (_, path, _) in wanted.items()}


def weight_bytes(model: Path) -> int:
    """Size of a model folder's weights."""
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


# -- memory ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of some processes, in bytes."""

    pss: int = 0
    """Each page divided by the number of processes that map it: the only one of the three that may be summed."""
    pss_anon: int = 0
    """The part of `pss` that belongs to no file, so not to shared libraries."""
    rss: int = 0

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.pss + other.pss, self.pss_anon + other.pss_anon, self.rss + other.rss)


def memory_of(pids: Sequence[int]) -> Memory:
    """Sum over processes, from /proc/PID/smaps_rollup; one that ended meanwhile counts nothing."""
    total = Memory()
    for pid in pids:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
            kib = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines)}
            total += Memory(kib["Pss"] << 10, kib.get("Pss_Anon", 0) << 10, kib["Rss"] << 10)
    return total


def memory_of_servers(servers: Sequence[Server]) -> Memory:
    """Resident memory of the process trees of `servers`."""
    return memory_of([process.pid for server in servers for process in server.tree()])


# -- load ------------------------------------------------------------------------------------------------
