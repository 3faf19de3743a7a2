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
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import uvloop

MODEL_FLAGS = ("--max-model-len", "512", "--enforce-eager", "--dtype", "bfloat16", "--block-size", "32")
"""Of every model on both sides."""
POOL = ("-m", "tokenpool.cli.main", "serve")
PLAIN = (str(Path(__file__).with_name("plain_vllm.py")),)
_PLAIN_TOKENS = range(3, 512)  # of the tiny models; below are <s>, </s> and <unk>
_ports_given: set[int] = set()


class Server:
    """A server process under test; its output goes to a log file. `close` must be called.

    `words` are `POOL` or `PLAIN` and all flags but the address; `models` are the names it will serve.
    """

    def __init__(
        self,
        words: Sequence[str],
        models: Sequence[str],
        log: Path,
        *,
        enter: Sequence[str] = (),
        inside: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        **env: str,
    ) -> None:
        """`enter` are words before the command, which become it; sockets to it are made `inside`."""
        self.port, self.models, self.log, self.inside = free_port(), set(models), log, inside
        self.key = ""
        """What `is_ready` sends, for a server that asks for a key."""
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [*enter, sys.executable, *words, "--host", "127.0.0.1", "--port", str(self.port)]
        self.started_s = time.monotonic()
        with log.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **env})

    def get(self, path: str, *, key: str = "", body: Any = None, limit_s: float = 10.0) -> Any:
        """GET a path, or POST `body` as JSON; returns the decoded answer, None when it is empty."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        with self.inside(), urllib.request.urlopen(request, timeout=limit_s) as response:
            return json.loads(text) if (text := response.read()) else None

    def is_ready(self) -> bool:
        """Whether it is healthy and all its models can be asked; raises RuntimeError when the process ended."""
        if self.process.poll() is not None:
            tail = self.log.read_text(errors="replace")[-4000:]
            raise RuntimeError(f"the server ended with status {self.process.returncode}:\n{tail}")
        try:
            self.get("/health")
            cards = self.get("/v1/models", key=self.key)["data"]
        except OSError:  # also urllib's errors
            return False
        # A pool lists models while they load, with their state; plain vLLM listens once its model is loaded.
        ready = {card["id"] for card in cards if card.get("pool", {}).get("state", "ready") == "ready"}
        return ready >= self.models

    def tree(self) -> list[psutil.Process]:
        """The process and all that descend from it; empty when it ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        return []

    def cpu_s(self) -> float:
        """CPU seconds that the live processes of the tree have used so far."""
        return sum(sum(process.cpu_times()[:2]) for process in self.tree())

    def close(self) -> None:
        """End the tree: politely, then by force, so that nothing is left behind."""
        tree = self.tree()
        if self.process.poll() is None:
            self.process.terminate()
        for process in psutil.wait_procs(tree, timeout=60)[1]:
            progress(f"{self.log.stem}: process {process.pid} had to be killed")
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


def free_port(address: str = "127.0.0.1") -> int:
    """A port of this machine that nobody listens at, another one at each call."""
    while True:
        with socket.create_server((address, 0)) as sock:
            port: int = sock.getsockname()[1]
        if port not in _ports_given:  # else its server may not have bound it yet
            _ports_given.add(port)
            return port


def wait_until_ready(servers: Sequence[Server], limit_s: float) -> list[float]:
    """Poll until every server is ready; returns the seconds each took from its own start."""
    ready: dict[Server, float] = {}
    end = time.monotonic() + limit_s
    while len(ready) < len(servers):
        for server in servers:
            if server not in ready and server.is_ready():
                ready[server] = time.monotonic() - server.started_s
        if time.monotonic() > end:
            raise TimeoutError(f"{len(servers) - len(ready)} of {len(servers)} servers not ready after {limit_s:g} s")
        time.sleep(0.1)
    return [ready[server] for server in servers]


def wait_until_quiet(servers: Iterable[Server]) -> None:
    """Wait until no server uses more than 5 % of a core.

    A worker of plain vLLM polls for its next step for 1 s after the last one, on the core that all sides compute on:
    without this wait it took 0.4 cores from the pool's run after it.
    """
    used_s = -1.0
    for _ in range(60):
        before_s, used_s = used_s, sum(server.cpu_s() for server in servers)
        if 0 <= before_s and used_s - before_s < 0.025:
            return
        time.sleep(0.5)
    progress("the servers do not become quiet: they share the cores of the next run")


def make_models(folder: Path, kinds: Sequence[str]) -> dict[str, Path]:
    """Make one tiny model per kind, named KIND-INDEX, seeded by the index; in a child process (see the module)."""
    paths = {f"{kind}-{i}": folder / f"{kind}-{i}" for i, kind in enumerate(kinds)}
    code = (
        "import json, sys; from tokenpool.demo.tiny_models import make_tiny_model\n"
        "for i, (kind, path) in enumerate(json.loads(sys.argv[1])): make_tiny_model(kind, path, seed=i + 1)"
    )
    pairs = list(zip(kinds, map(str, paths.values()), strict=True))
    subprocess.run([sys.executable, "-c", code, json.dumps(pairs)], check=True)
    return paths


def memory_of(pids: Iterable[int]) -> dict[str, int]:
    """Bytes resident in processes: `pss`, its part `pss_anon` of no file, and `rss`, where shared pages count often."""
    total: Counter[str] = Counter(pss=0, pss_anon=0, rss=0)
    for pid in pids:
        with contextlib.suppress(OSError):  # ended meanwhile
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
            total.update({line.split(":")[0].lower(): int(line.split()[1]) << 10 for line in lines})
    return {name: total[name] for name in ("pss", "pss_anon", "rss")}


@dataclass(frozen=True, slots=True)
class Load:
    """A closed loop: `concurrency` users take from `prompts` and wait for each answer."""

    port: int
    model: str
    prompts: Sequence[Sequence[int]]
    concurrency: int
    max_tokens: int


@dataclass(slots=True)
class LoadResult:
    """What the users saw. An event is a piece of a stream with one new token, or more when a server is behind."""

    num_tokens: int = 0
    num_events: int = 0
    ttft_s: list[float] = field(default_factory=list)  # per request, from the send to the first event
    itl_s: list[float] = field(default_factory=list)  # between neighbouring events of a request


def measure(loads: Sequence[Load]) -> tuple[float, list[LoadResult]]:
    """Run loads side by side; returns the seconds from the first send to the last byte, and what each saw.

    Raises RuntimeError when a request is refused or a token is missing.
    """

    async def run() -> tuple[float, list[LoadResult]]:
        limits = aiohttp.ClientTimeout(total=1800)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=limits) as session:
            start = time.perf_counter()
            results = await asyncio.gather(*(_run_load(session, load) for load in loads))
            return time.perf_counter() - start, results

    return uvloop.run(run())


async def _run_load(session: aiohttp.ClientSession, load: Load) -> LoadResult:
    result, prompts = LoadResult(), iter(load.prompts)

    async def user() -> None:
        for prompt in prompts:
            await _request(session, load, prompt, result)

    await asyncio.gather(*(user() for _ in range(load.concurrency)))
    if result.num_tokens != (expected := len(load.prompts) * load.max_tokens):
        raise RuntimeError(f"{load.model}: {result.num_tokens} tokens instead of {expected}")
    return result


async def _request(session: aiohttp.ClientSession, load: Load, prompt: Sequence[int], result: LoadResult) -> None:
    fixed = {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    body = {"model": load.model, "prompt": prompt, "max_tokens": load.max_tokens, **fixed}
    previous_s, is_first, rest = time.perf_counter(), True, b""
    async with session.post(f"http://127.0.0.1:{load.port}/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{load.model}: status {response.status}: {(await response.text())[:500]}")
        async for chunk in response.content.iter_any():
            now_s = time.perf_counter()
            *events, rest = (rest + chunk).split(b"\n\n")
            for event in events:
                # Tokens are not decoded, only the usage at the end: the client shares the cores with the server.
                if b'"choices":[{' in event:
                    (result.ttft_s if is_first else result.itl_s).append(now_s - previous_s)
                    previous_s, is_first = now_s, False
                    result.num_events += 1
                elif event != b"data: [DONE]":
                    usage = json.loads(event.removeprefix(b"data: ")).get("usage")
                    if usage is None:
                        raise RuntimeError(f"{load.model}: {event[:500]!r}")
                    result.num_tokens += usage["completion_tokens"]


def random_prompts(seed: int, count: int, num_tokens: int) -> list[list[int]]:
    """Prompts without a common prefix, so that no prefix cache helps."""
    rng = random.Random(seed)
    return [rng.choices(_PLAIN_TOKENS, k=num_tokens) for _ in range(count)]


def percentile(values: Sequence[float], percent: int) -> float:
    """The 1st to 99th percentile of at least two values."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the flags of every bench; they end up as arguments of its `run`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, help="write the result to this file")
    made.add_argument("--logs", type=Path, help="keep the servers' logs in this folder")
    made.add_argument("--start-limit-s", type=float, default=900, help="for servers to start (default: %(default)s)")
    made.add_argument("--seed", type=int, default=1, help="of the prompts (default: %(default)s)")
    return made


def report(name: str, run: Callable[..., Any], flags: argparse.Namespace, keys: Sequence[str]) -> None:
    """Call `run` with the flags, write what it returns, and print `keys` of it in the result line.

    A key `name_x` may also stand for the entry `x` of a mapping `name`.
    """
    settings = {key: value for key, value in vars(flags).items() if key != "json"}
    values = asdict(run(**settings))
    del settings["logs"]
    if flags.json:
        settings = {key: value.name if isinstance(value, Path) else value for key, value in settings.items()}
        write_result(flags.json, name, settings, values)
    mappings = {key: value for key, value in values.items() if isinstance(value, dict)}
    entries = {f"{key}_{x}": entry for key, value in mappings.items() for x, entry in value.items()}
    print_result_line({key: (entries | values)[key] for key in keys})


@contextlib.contextmanager
def scratch(logs: Path | None) -> Iterator[tuple[Path, Path, contextlib.ExitStack]]:
    """Yield a temporary folder, the folder for logs, and a stack for `Server.close`, unwound on SIGTERM too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="tokenpool-bench-") as folder, contextlib.ExitStack() as stack:
        yield Path(folder), logs or Path(folder, "logs"), stack


def write_result(path: Path, name: str, settings: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Write a run as JSON: its values, how and on what it was made. `settings` holds the seed."""
    versions = {d.name: d.version for d in importlib.metadata.distributions()}
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    result = {
        "name": name,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "seed": settings["seed"],
        "settings": dict(settings),
        "environment": {key: os.environ.get(key) for key in ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND")},
        "machine": {
            "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": psutil.virtual_memory().total,
            "load_average_at_end": os.getloadavg(),
        },
        "python": platform.python_version(),
        "versions": {name: versions.get(name) for name in ("torch", "vllm", "vllm-cpu", "tokenpool")},
        "values": dict(values),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def _git(*words: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def print_result_line(values: Mapping[str, float]) -> None:
    """Print the line that scripts read: `result: name=value ...`."""
    print("result: " + " ".join(f"{name}={value:.4g}" for name, value in values.items()), flush=True)


def progress(text: str) -> None:
    """Tell on stderr how far the bench is."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
