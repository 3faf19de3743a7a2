# SPDX-License-Identifier: Apache-2.0
"""The switch that vLLM itself offers: two servers on one GPU, one asleep while the other runs.

Sleep level 1: weights go to host memory, KV is thrown away. With `keep` the running requests are computed again after
waking, with `wait` the server finishes them before it sleeps. Each server has a client that streams all the time.

    switch_s   from the call that sends one server to sleep to the next event of the other's stream
    sleep_s    of that, the call that sends to sleep
    wake_s     of that, the call that wakes the other

The order of calls is forced: the memory of one is what the other wakes in.
"""

from __future__ import annotations

import http.client
import json
import statistics
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from bench.parts import common

MODES = {"keep": 1500, "wait": 64}
"""Mode of sleep -> tokens of each request: with `wait` nobody sleeps before they are made."""
_LIMIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Sleep:
    """One mode; medians over the switches, `p99` the worst but for a hundredth."""

    switch_s: float
    switch_p99_s: float
    sleep_s: float
    wake_s: float
    switches: list[tuple[float, float, float]]
    """Seconds to sleep, to wake, and in all."""


class Stream:
    """A client that has one request running all the time, and notes when the last event came."""

    def __init__(self, port: int, model: str, max_tokens: int, seed: int) -> None:
        self._body = json.dumps(
            {
                "model": model,
                "prompt": common.random_prompts(seed, 1, 128)[0],
                "max_tokens": max_tokens,
                "ignore_eos": True,
                "stream": True,
            }
        )
        self._port = port
        self._stopped = False
        self._events = 0
        self._came = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait_for_next(self, count: int = 1) -> float:
        """Wait for `count` more events; returns when the last came, by `time.perf_counter`. TimeoutError."""
        with self._came:
            goal = self._events + count
            if not self._came.wait_for(lambda: self._events >= goal, _LIMIT_S):
                raise TimeoutError(f"no event of the stream in {_LIMIT_S:g} s")
            return time.perf_counter()

    def close(self) -> None:
        """End after the next event, or when the server goes."""
        self._stopped = True

    def _run(self) -> None:
        with suppress(OSError, http.client.HTTPException):  # the server is closed
            while not self._stopped:
                connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
                connection.request("POST", "/v1/completions", self._body, {"Content-Type": "application/json"})
                for line in connection.getresponse():
                    if line.startswith(b"data:"):
                        with self._came:
                            self._events += 1
                            self._came.notify_all()
                    if self._stopped:
                        break
                connection.close()


def words(path: Path, name: str, flags: Sequence[str], kv_mib: int) -> list[str]:
    """The command of a server that can sleep; its environment needs VLLM_SERVER_DEV_MODE=1."""
    memory = ["--enable-sleep-mode", "--kv-cache-memory-bytes", str(kv_mib << 20), "--gpu-memory-utilization", "0.3"]
    return [*common.PLAIN, "--model", str(path), "--served-model-name", name, *flags, *memory]


def start(
    close: ExitStack, paths: Mapping[str, Path], flags: Sequence[str], kv_mib: int, start_limit_s: float, logs: Path
) -> dict[str, int]:
    """Start a server for each model, one after the other had gone to sleep; returns their ports. The last is awake.

    `close` ends them.
    """
    ports: dict[str, int] = {}
    for name, path in paths.items():
        if ports:
            post([*ports.values()][-1], "/sleep?level=1&mode=wait")
        log = logs / f"sleep-{name}.log"
        server = common.Server(words(path, name, flags, kv_mib), [name], log, VLLM_SERVER_DEV_MODE="1")
        close.callback(server.close)
        common.wait_until_ready([server], start_limit_s)
        ports[name] = server.port
    return ports


def serve_and_measure(
    path: Path, flags: Sequence[str], kv_mib: int, switches: int, start_limit_s: float, logs: Path, seed: int
) -> dict[str, Sleep]:
    """Start two servers and measure all modes."""
    with ExitStack() as close:
        ports = start(close, dict.fromkeys("ab", path), flags, kv_mib, start_limit_s, logs)
        return {mode: measure(ports, mode, switches, seed) for mode in MODES}


def measure(ports: dict[str, int], mode: str, switches: int, seed: int) -> Sleep:
    """Switch to and fro `switches` times, after one that does not count; the second server is awake before and after.

    `ports` are those of the two servers by the name of their models.
    """
    asleep, awake = ports
    streams = {awake: Stream(ports[awake], awake, MODES[mode], seed)}
    taken = []
    try:
        for number in range(switches + 1 + (switches + 1) % 2):
            streams[awake].wait_for_next(5)
            start = time.perf_counter()
            post(ports[awake], f"/sleep?level=1&mode={mode}")
            slept = time.perf_counter()
            post(ports[asleep], "/wake_up")
            woken = time.perf_counter()
            asleep, awake = awake, asleep
            if awake not in streams:
                streams[awake] = Stream(ports[awake], awake, MODES[mode], seed + 1)
            end = streams[awake].wait_for_next()
            if 0 < number <= switches:
                taken.append((slept - start, woken - slept, end - start))
    finally:
        for stream in streams.values():
            stream.close()
    sleep_s, wake_s, all_s = zip(*taken, strict=True)
    return Sleep(
        switch_s=statistics.median(all_s),
        switch_p99_s=common.percentile(all_s, 99),
        sleep_s=statistics.median(sleep_s),
        wake_s=statistics.median(wake_s),
        switches=taken,
    )


def post(port: int, path: str) -> None:
    """POST without a body; raises OSError unless it is answered with 200."""
    urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}{path}", b""), timeout=600).close()
