# SPDX-License-Identifier: Apache-2.0
"""The GPU benches on a machine without a GPU: they say so, and what can be run of them runs."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import aiohttp
import pytest
import torch
from aiohttp.test_utils import TestServer

from bench.gpu import goodput, layout, link, one_model_tax, rig, sleep_mode, sleep_router, switch
from tests.helpers.devices.fake_cuda import FakeCudaDevice
from tokenpool.config import load_pool_file
from tokenpool.host.load import cuda_copies
from tokenpool.memory.devices import cuda as device_cuda

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]


@pytest.fixture
def no_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


FIRST_MINUTES = ROOT / "bench/gpu/first_minutes.sh"


def first_minutes(*words: object, limit_s: int = 700) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"LIMIT_S": str(limit_s)}
    return subprocess.run([FIRST_MINUTES, *map(str, words)], capture_output=True, text=True, check=False, env=env)


@pytest.mark.parametrize(("limit_s", "told"), [(700, "ok"), (0, "no time left")])
def test_the_first_minutes_leave_a_line_for_each_check(tmp_path, limit_s, told):
    """With a program in Python's place: results are there as they come, and nothing starts when the time is over."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho result: $1 $2 $3\n")
    python.chmod(0o755)
    ran = first_minutes("--dry-run", tmp_path / "out", python, limit_s=limit_s)
    lines = (tmp_path / "out" / "table.txt").read_text().splitlines()
    assert ["doctor", "memory_laws", "link", "eager", "engine_cost", "switch"] == [line.split()[0] for line in lines]
    assert all(told in line for line in lines)
    assert (0 if told == "ok" else 1) == ran.returncode
    assert ran.stdout.splitlines() == lines
    if told == "ok":
        assert "result: -m bench.gpu.engine_cost --device" in lines[4]


def test_a_check_that_fails_is_told_and_the_next_one_runs(tmp_path):
    """Its last line is in the table: there is no result."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho broken; exit 7\n")
    python.chmod(0o755)
    ran = first_minutes("--dry-run", tmp_path / "out", python)
    assert 1 == ran.returncode
    assert 6 == ran.stdout.count("FAILED (7)") == ran.stdout.count("broken")
    assert 2 == first_minutes().returncode


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there IS a GPU: the script would run for minutes")
def test_the_first_minutes_without_a_device_measure_nothing(tmp_path):
    """The same status as the other script's."""
    ran = first_minutes(tmp_path / "out", sys.executable)
    assert (3, "no CUDA device: nothing was measured\n") == (ran.returncode, ran.stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_first_minutes_run_dry(tmp_path):
    """Every command of the script runs here from end to end, on the CPU or a stand-in."""
    ran = first_minutes("--dry-run", tmp_path / "out", sys.executable, limit_s=3000)
    assert 0 == ran.returncode, ran.stdout
    assert 6 == ran.stdout.count(" ok ")


@pytest.mark.parametrize("bench", [link, layout, switch, goodput, one_model_tax], ids=lambda bench: bench.__name__)
def test_a_bench_without_a_device_measures_nothing(bench, no_gpu, capsys, tmp_path):
    """It ends with a status of its own, one line, and no result file."""
    with pytest.raises(SystemExit) as ended:
        bench.main(["--json", str(tmp_path / "result.json")])

    assert 3 == ended.value.code
    assert "no CUDA device: nothing was measured\n" == capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there IS a GPU: the script would run for minutes")
def test_all_benches_without_a_device_measure_nothing(tmp_path):
    """The script ends with the same status before it writes anything; without a part's name it tells its usage."""
    script, out = ROOT / "bench/gpu/run_all.sh", tmp_path / "out"
    ran = subprocess.run([script, out, "checks"], capture_output=True, text=True, check=False, timeout=60)
    wrong = subprocess.run([script, out, "all"], capture_output=True, text=True, check=False, timeout=60)

    assert 2 == wrong.returncode
    assert "OUT_DIR checks|backends|" in wrong.stdout
    assert (3, "", "no CUDA device: nothing was measured\n") == (ran.returncode, ran.stdout, ran.stderr)
    assert not (tmp_path / "out").exists()


def test_the_limits_of_all_checks_fit_in_nine_minutes():
    """Each check has a limit, and those of each part together end before ten minutes are over."""
    limits: dict[str, list[int]] = {}
    for line in (ROOT / "bench/gpu/run_all.sh").read_text().partition("case $part in")[2].splitlines():
        if match := re.match(r"([a-z]+)\)", line):
            part = limits.setdefault(match[1], [])
        elif line.startswith("  check "):
            part.append(int(line.split()[2]))

    assert ["checks", "backends", "tax", "switch", "sleep", "goodput"] == list(limits)
    assert all(0 < sum(seconds) <= 9 * 60 for seconds in limits.values())


def test_the_link_bench_runs_to_its_end(monkeypatch, tmp_path, capsys):
    """On a device of memory files every part of it runs, and all its numbers are there."""
    monkeypatch.setattr(rig, "require_cuda", lambda: None)
    monkeypatch.setattr(rig, "describe_gpu", lambda: {"name": "none"})
    monkeypatch.setattr(device_cuda, "CudaDevice", FakeCudaDevice)
    monkeypatch.setattr(cuda_copies, "BATCH_COPIES", {"each": None, "broken": lambda copies, stream: 1 / 0})
    monkeypatch.setattr(link, "BLOCK_KIB", (4, 64))
    link.main(["--mib", "4", "--page-mib", "2", "--repeats", "2", "--json", str(tmp_path / "link.json")])
    values = json.loads((tmp_path / "link.json").read_text())["values"]

    assert {"4KiB each in", "4KiB each out"} == values["blocks_gbs"].keys(), "256 blocks of 64 KiB do not fit"
    assert [[0, "each"]] == values["copy_ways"]
    assert len(link.CHUNKS_MIB) * 3 == len(values["h2d_gbs_of"])
    assert values["h2d_gbs"] > 0 < values["d2h_gbs"]
    printed = capsys.readouterr()
    assert "4KiB broken out: ZeroDivisionError" in printed.err
    assert "result: h2d_gbs=" in printed.out


class _Sleeper(BaseHTTPRequestHandler):
    """A server that streams while it is awake, like vLLM's; it notes what it is asked."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server = self.server
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/v1/completions":
            server.calls.append(self.path)
            (server.awake.clear if self.path.startswith("/sleep") else server.awake.set)()
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        for _ in range(20):
            server.awake.wait()
            self.wfile.write(b"data: {}\n\n")
            time.sleep(0.001)
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def sleepers() -> Iterator[dict[str, ThreadingHTTPServer]]:
    """Two of them, asleep."""
    servers = {}
    for name in "ab":
        servers[name] = ThreadingHTTPServer(("127.0.0.1", 0), _Sleeper)
        servers[name].daemon_threads = True
        servers[name].calls, servers[name].awake = [], threading.Event()
        threading.Thread(target=servers[name].serve_forever, daemon=True).start()
    yield servers
    for server in servers.values():
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("mode", list(sleep_mode.MODES))
def test_the_sleep_arm_switches_to_and_fro(mode, sleepers):
    """One server sleeps before the other wakes, each switch ends with an event of the one that woke."""
    sleepers["b"].awake.set()
    ports = {name: server.server_port for name, server in sleepers.items()}
    measured = sleep_mode.measure(ports, mode, switches=3, seed=1)
    sleep, wake = f"/sleep?level=1&mode={mode}", "/wake_up"
    assert [wake, sleep, wake, sleep] == sleepers["a"].calls
    assert [sleep, wake, sleep, wake] == sleepers["b"].calls
    assert 3 == len(measured.switches)
    assert all(0 < slept + woken <= total for slept, woken, total in measured.switches)


@pytest.mark.parametrize("quantum_s", [0.0, 600.0], ids=["at once", "when idle"])
def test_servers_behind_the_router_take_turns(quantum_s, sleepers):
    """Every request is answered in full; with a quantum that never ends a server sleeps only when it has no request."""
    ports = {name: server.server_port for name, server in sleepers.items()}
    answers = {}

    async def ask(session: aiohttp.ClientSession, url: str, number: int) -> None:
        name = "ab"[number % 2]
        async with session.post(f"{url}/v1/completions", json={"model": name}) as answer:
            answers[number] = await answer.text()

    def is_settled(router: sleep_router.Router) -> bool:
        wakes = sum(server.calls.count(sleep_router.WAKE) for server in sleepers.values())
        return 1 == sum(server.awake.is_set() for server in sleepers.values()) and wakes == router.numbers["switches"]

    async def play() -> dict[str, float]:
        async with aiohttp.ClientSession() as session:
            router = sleep_router.Router(ports, quantum_s, session)
            async with TestServer(router.app()) as server:
                turns = asyncio.create_task(router.take_turns())
                url = str(server.make_url("")).rstrip("/")
                await asyncio.gather(*(ask(session, url, number) for number in range(6)))
                async with session.post(f"{url}/v1/completions", json={"model": "c"}) as answer:
                    assert 404 == answer.status
                async with session.get(f"{url}/load") as answer:
                    assert {"server_load": 0} == await answer.json()
                while not is_settled(router):  # a turn is being passed on
                    await asyncio.sleep(0.001)
                turns.cancel()
                return router.numbers

    numbers = asyncio.run(play())
    assert dict.fromkeys(range(6), "data: {}\n\n" * 20) == answers
    first, second = sorted(sleepers.values(), key=lambda server: len(server.calls), reverse=True)
    if quantum_s:
        assert ([sleep_router.WAKE, sleep_router.SLEEP], [sleep_router.WAKE]) == (first.calls, second.calls)
    else:
        assert 2 < numbers["switches"]


def test_a_pool_of_the_tax_bench_is_a_pool(tmp_path):
    """Its file is one that the server reads, with a page for what weights round up to."""
    flags = rig.model_flags(graphs=True)
    rig.make_model(tmp_path / "m", "1b")
    words = one_model_tax._pool_words(tmp_path, tmp_path / "m", ["m0", "m1"], flags, "cuda", 2861)
    pool = load_pool_file(Path(words[-1]))
    assert ["m0", "m1"] == [model.name for model in pool.models]
    assert (4096 + 2 * (2880 + 64)) << 20 == pool.device_memory


def test_a_shape_has_the_size_of_its_model():
    """Llama 3.1 8B has 8,030,261,248 parameters and keeps 128 KiB of KV for each token."""
    assert 2 * 8_030_261_248 == rig.weight_bytes("8b")
    assert 128 << 10 == rig.kv_bytes_per_token("8b")
