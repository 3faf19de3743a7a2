# SPDX-License-Identifier: Apache-2.0
"""A whole `tokenpool serve` as a child process, for tests that talk to it as clients do. Imports no vLLM."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import yaml

if TYPE_CHECKING:
    from tests.helpers.plain import RequestSpec

_T = TypeVar("_T")

REPOSITORY = Path(__file__).parents[2]
ENV = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENPOOL_LOG_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
TINY_ARGS: dict[str, Any] = {"max_model_len": 512, "enforce_eager": True, "dtype": "bfloat16", "block_size": 32}
"""Engine arguments with which a tiny model starts in about a second."""

START_LIMIT_S = 180.0
STOP_LIMIT_S = 60.0
WAIT_LIMIT_S = 60.0
_TAIL_CHARS = 6000


def poll(look: Callable[[], _T], *, until: Callable[[_T], bool] = bool, limit_s: float = WAIT_LIMIT_S) -> _T:
    """Call `look` until `until` of its value holds and return that value; raises AssertionError at the limit."""
    deadline = time.monotonic() + limit_s
    while not until(value := look()):
        assert time.monotonic() < deadline, f"not reached within {limit_s:g} s, last seen: {value!r}"
        time.sleep(0.05)
    return value


def child_pids(pid: int) -> set[int]:
    """Return the processes, zombies aside, whose parent is `pid`."""
    pids = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it ended meanwhile
        if int(parent) == pid and state != "Z":
            pids.add(int(stat.parent.name))
    return pids


def is_running(pid: int) -> bool:
    """Tell whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class PoolServerProcess:
    """Runs a pool file's server between `with` and its end, or until `stop`.

        with PoolServerProcess({"models": [...], "device_memory": "64MiB", "api_key": "test-api-key-0123"}) as server:
            httpx.get(f"{server.base_url}/health")

    Host and port are added to `pool`; `models` entries get TINY_ARGS where they set no other value. Any model may be
    added, from whatever folder a test makes it in, unless `pool` says otherwise.
    """

    def __init__(
        self,
        pool: Mapping[str, Any],
        *,
        env: Mapping[str, str] | None = None,
        flags: Sequence[str] = (),
        enter: Sequence[str] = (),
    ) -> None:
        """`enter` are words before the command, which become it."""
        self._folder = tempfile.TemporaryDirectory(prefix="tokenpool-test-")
        self.port = free_port()
        models = [{**model, "args": TINY_ARGS | model.get("args", {})} for model in pool["models"]]
        self.pool = {"admin_models": "any", **pool, "models": models, "host": "127.0.0.1", "port": self.port}
        self.base_url = f"http://127.0.0.1:{self.port}"
        self.api_key: str | None = pool.get("api_key")
        self.admin_key: str | None = pool.get("admin_key")
        self.process: subprocess.Popen[bytes] | None = None
        self._flags, self._enter = list(flags), list(enter)
        self._env = {**os.environ, **ENV, **(env or {})}
        self.pool_file = Path(self._folder.name, "pool.yaml")
        self._log_file = Path(self._folder.name, "log")
        self._log = ""

    def inside(self) -> AbstractContextManager[object]:
        """Where requests to it are sent from: here."""
        return nullcontext()

    def __enter__(self) -> PoolServerProcess:
        self.pool_file.write_text(yaml.safe_dump(self.pool, sort_keys=False))
        with self._log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [*self._enter, sys.executable, "-m", "tokenpool.cli.main", "serve", str(self.pool_file), *self._flags],
                cwd=REPOSITORY, env=self._env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            self.wait_until_ready(START_LIMIT_S)
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.kill()
        elif self.running and (status := self.stop()) != 0:
            raise AssertionError(f"the server ended with status {status}{self._tail()}")

    @property
    def running(self) -> bool:
        """Whether the server process is there."""
        return self.process is not None and self.process.poll() is None

    @property
    def log(self) -> str:
        """All that the server and its host have printed."""
        if self._log_file.exists():
            self._log = self._log_file.read_text(errors="replace")
        return self._log

    @property
    def host_pid(self) -> int:
        """Process id of the engine host."""
        return self.state()["host_pid"]

    @contextmanager
    def host_held_still(self) -> Iterator[None]:
        """Stop the engine host for the time of the block, so that what runs there cannot end meanwhile."""
        pid = self.host_pid
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def headers(self, key: str | None) -> dict[str, str]:
        """The header that carries `key`."""
        return {"Authorization": f"Bearer {key}"} if key else {}

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send one request with the API key."""
        headers = self.headers(self.api_key) | options.pop("headers", {})
        return httpx.request(method, self.base_url + path, headers=headers, timeout=WAIT_LIMIT_S, **options)

    def admin(self, method: str, path: str, json: Any = None) -> httpx.Response:
        """Send one request to the pool API with the admin key; `path` starts behind /v1/pool."""
        url = f"{self.base_url}/v1/pool{path}"
        return httpx.request(method, url, headers=self.headers(self.admin_key), json=json, timeout=2 * WAIT_LIMIT_S)

    def state(self) -> dict[str, Any]:
        """The pool's state."""
        response = self.admin("GET", "/state")
        assert response.status_code == 200, response.text
        return response.json()

    def model_state(self, name: str) -> dict[str, Any]:
        """What the host says about one model."""
        return self.state()["host"]["models"][name]

    def wait_until_idle(self) -> dict[str, Any]:
        """Poll until no model has requests or KV that is not idle, and return the state; checks the books."""
        state = poll(self.state, until=_is_idle)
        checked = self.admin("POST", "/check")
        assert checked.json() == {"ok": True}, checked.text
        return state

    def wait_until_ready(self, limit_s: float = WAIT_LIMIT_S) -> None:
        """Poll /ready until no model is on its way; raises with the end of the log if the server ends or is slow."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if not self.running:
                status = self.process.returncode if self.process else None
                raise AssertionError(f"the server ended with status {status}{self._tail()}")
            try:
                if httpx.get(f"{self.base_url}/ready?all=1", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # it does not listen yet
            time.sleep(0.1)
        raise AssertionError(f"the server is not ready after {limit_s:g} s{self._tail()}")

    def terminate(self) -> None:
        """Send SIGTERM and go on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """Send SIGTERM unless the server has ended and return its exit status; kills it when it hangs."""
        assert self.process is not None
        if self.running:
            self.terminate()
        try:
            status = self.process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the server does not stop within {STOP_LIMIT_S:g} s{self._tail()}") from None
        self._clean_up()
        return status

    def kill(self) -> None:
        """End the server and its host at once."""
        assert self.process is not None
        children = child_pids(self.process.pid)
        self.process.kill()
        self.process.wait()
        for pid in filter(is_running, children):
            os.kill(pid, signal.SIGKILL)
        self._clean_up()

    def _clean_up(self) -> None:
        self._log = self.log
        self._folder.cleanup()

    def _tail(self) -> str:
        return f"; end of its log:\n{self.log[-_TAIL_CHARS:]}"


class Stream(threading.Thread):
    """One greedy completion, read token by token from the time that it is made."""

    def __init__(self, server: PoolServerProcess, prompt: list[int], num_tokens: int, model: str = "a") -> None:
        super().__init__(daemon=True)
        self.tokens: list[int] = []
        self.problem: Any = None
        self._server = server
        self._body = {
            "model": model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True,
        }  # fmt: skip
        self.start()

    def run(self) -> None:
        try:
            url = f"{self._server.base_url}/v1/completions"
            sent = httpx.stream("POST", url, json=self._body, timeout=2 * WAIT_LIMIT_S)
            with self._server.inside(), sent as response:
                self.problem = None if response.status_code == 200 else response.status_code
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        self._take(json.loads(line[6:]))
        except Exception as error:
            self.problem = error

    def _take(self, chunk: Mapping[str, Any]) -> None:
        self.problem = chunk.get("error", self.problem)
        for choice in chunk.get("choices", ()):
            self.tokens += choice.get("token_ids") or ()

    def rest(self) -> list[int]:
        """All tokens, once it has ended well."""
        self.join(2 * WAIT_LIMIT_S)
        assert self.problem is None and not self.is_alive(), f"{self.problem} after {len(self.tokens)} tokens"
        return self.tokens


def _is_idle(state: dict[str, Any]) -> bool:
    models = (state["host"] or {}).get("models", {}).values()
    busy = ("running", "waiting")
    return state["ready"] and all(
        not any(model[key] for key in busy) and model["kv_pages"] == model["kv_idle_pages"] for model in models
    )


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def complete(server: PoolServerProcess, model: str, request: RequestSpec) -> tuple[list[int], list[float]]:
    """The tokens of a completion, and their log probabilities."""
    body = {
        "model": model,
        "prompt": request.prompt_token_ids,
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "seed": request.seed,
        "ignore_eos": True,
        "logprobs": 1,
        "return_token_ids": True,
    }
    answer = server.request("POST", "/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]
