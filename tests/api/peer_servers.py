# SPDX-License-Identifier: Apache-2.0
"""A plugin of pytest for vLLM's own tests: their servers are started here, plain or with the pool in between.

It runs in a process where `tests` is vLLM's package, so it imports nothing of this repository. `PEER_SIDE` says which
side is tried, `PEER_RESULTS` names the file that gets the outcomes, `PEER_LOGS` the folder of the servers' logs.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

SIDES = ("plain", "pool")
_PROGRAMS = {
    "plain": (str(Path(__file__).parents[2] / "bench/parts/plain_vllm.py"), "--model"),
    "pool": ("-m", "tokenpool.cli.main", "serve"),
}
# What a side is given beyond the flags of the test. 64 MiB of KV are 128 ki tokens of the tiny models.
_OWN_FLAGS = {
    "plain": ("--kv-cache-memory-bytes", str(64 << 20)),
    "pool": ("--device-memory", "256MiB", "--page-size", "1MiB"),
}
# Plain vLLM listens once its model is loaded; a pool is healthy while it loads.
_READY_PATHS = {"plain": "/health", "pool": "/ready?all=1"}
_START_LIMIT_S = 480.0
_STOP_LIMIT_S = 60.0
_CALL_LIMIT_S = 120.0
"""Of one call of a client: a test that hangs fails."""
_MIN_KEY_CHARS = 16
_HOST = "127.0.0.1"
_VARYING = re.compile(r"0x[0-9a-f]+|(?<=127\.0\.0\.1:)\d+|(?<=localhost:)\d+|\b\w*-?[0-9a-f]{16,}\b|/tmp/\S+")


def words(side: str, model: str, flags: Sequence[str], port: int) -> list[str]:
    """The command of a server of one side, after the interpreter; what the test says comes first."""
    kept: list[str] = []
    rest = iter(flags)
    for word in rest:
        if word in ("-p", "--port"):
            next(rest)
        elif not word.startswith("--port="):
            kept.append(word)
    return [*_PROGRAMS[side], model, *kept, "--host", _HOST, "--port", str(port), *_OWN_FLAGS[side]]


def plain_words(message: str) -> str:
    """A failure without what differs at each run: addresses, ports, ids and temporary folders."""
    return _VARYING.sub("…", message.split("\n", 1)[0])[:300]


class _Server:
    """A server with all that it started; `users` are the stand-ins that are open."""

    def __init__(self, side: str, model: str, flags: Sequence[str], env: Mapping[str, str]) -> None:
        self.side, self.users = side, 0
        with socket.create_server((_HOST, 0)) as sock:
            self.port: int = sock.getsockname()[1]
        folder = Path(os.environ["PEER_LOGS"], side)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{len(list(folder.iterdir())):02}-{model.replace('/', '-')}.log"
        command = [sys.executable, *words(side, model, flags, self.port)]
        with path.open("w") as log:
            print(*command, file=log, flush=True)
            whole = {**os.environ, **env}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=whole, start_new_session=True)
        try:
            self._wait_until_ready()
        except BaseException as error:  # also an interrupt: nobody else knows of the process
            self.end()
            if not isinstance(error, RuntimeError):
                raise
            last = [line for line in path.read_text(errors="replace").splitlines() if line.strip()][-1]
            raise RuntimeError(f"{error}: {last}") from None

    def _wait_until_ready(self) -> None:
        url = f"http://{_HOST}:{self.port}{_READY_PATHS[self.side]}"
        deadline_s = time.monotonic() + _START_LIMIT_S
        while time.monotonic() < deadline_s:
            if (status := self.process.poll()) is not None:
                raise RuntimeError(f"the server ended with status {status}")
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
                return
            time.sleep(0.2)
        raise RuntimeError(f"the server is not ready after {_START_LIMIT_S:g} s")

    def end(self) -> None:
        """End it politely, then by force."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_STOP_LIMIT_S)
        # It leads the group of all that it started.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class StandIn:
    """Stands in for RemoteOpenAIServer.

    A server lives on when its module is done, until one with other flags is asked for: neighbours share it.
    """

    DUMMY_API_KEY = "token-of-vllms-own-tests"
    side: ClassVar[str] = "plain"
    _servers: ClassVar[dict[tuple[Any, ...], _Server]] = {}

    def __init__(
        self,
        model: str,
        vllm_serve_args: list[str],
        *,
        env_dict: Mapping[str, str] | None = None,
        seed: int | None = 0,
        auto_port: bool = True,
        max_wait_seconds: float | None = None,
        override_hf_configs: Mapping[str, Any] | None = None,
    ) -> None:
        flags = list(vllm_serve_args)
        if seed is not None:
            flags += ["--seed", str(seed)]
        if override_hf_configs is not None:
            flags += ["--hf-overrides", json.dumps(override_hf_configs)]
        # Some tests pass the whole environment; two that say the same are one.
        env = {key: value for key, value in (env_dict or {}).items() if os.environ.get(key) != value}
        key = (model, tuple(flags), tuple(sorted(env.items())))
        server = self._servers.get(key)
        if server is None or server.process.poll() is not None:
            self.end_idle()
            server = self._servers[key] = self._started(model, flags, env)
        self._server = server
        self.host, self.port, self.uds, self.proc = _HOST, server.port, None, server.process

    @classmethod
    def _started(cls, model: str, flags: Sequence[str], env: Mapping[str, str]) -> _Server:
        return _Server(cls.side, model, flags, env)

    @classmethod
    def end_idle(cls, *, all_of_them: bool = False) -> None:
        """End the servers that no open module uses; two module fixtures may be open at once."""
        for key in [key for key, server in cls._servers.items() if all_of_them or not server.users]:
            cls._servers.pop(key).end()

    def __enter__(self) -> StandIn:
        self._server.users += 1
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Keep the server for the next module."""
        self._server.users -= 1

    @property
    def url_root(self) -> str:
        """Where the server is."""
        return f"http://{self.host}:{self.port}"

    def url_for(self, *parts: str) -> str:
        """The address of a path given in parts."""
        return "/".join([self.url_root, *(part.strip("/") for part in parts if part)])

    def get_client(self, **options: Any) -> Any:
        """A client of the OpenAI API."""
        import openai

        return openai.OpenAI(**self._options(self.url_for("v1"), options))

    def get_async_client(self, **options: Any) -> Any:
        """The same, to be awaited."""
        import openai

        return openai.AsyncOpenAI(**self._options(self.url_for("v1"), options))

    def get_client_anthropic(self, **options: Any) -> Any:
        """A client of the Anthropic API."""
        import anthropic

        return anthropic.Anthropic(**self._options(self.url_root, options))

    def get_async_client_anthropic(self, **options: Any) -> Any:
        """The same, to be awaited."""
        import anthropic

        return anthropic.AsyncAnthropic(**self._options(self.url_root, options))

    def _options(self, url: str, options: Mapping[str, Any]) -> dict[str, Any]:
        fixed = {"base_url": url, "api_key": self.DUMMY_API_KEY, "max_retries": 0}
        return {"timeout": _CALL_LIMIT_S, **fixed, **options}


_outcomes: dict[str, tuple[str, str]] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Put the stand-in where vLLM's test modules, and the conftest files before them, take their server from."""
    import tests.utils

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # an interrupted session still ends its servers
    StandIn.side = os.environ["PEER_SIDE"]
    tests.utils.RemoteOpenAIServer = StandIn  # type: ignore[attr-defined]


def pytest_collection_modifyitems(items: Sequence[Any]) -> None:
    """Lengthen the keys of test_root_path.py, on both sides: a pool refuses keys of seven characters."""
    for item in items:
        if (case := getattr(item, "callspec", None)) is None or not hasattr(item.module, "ERROR_API_KEY"):
            continue
        item.module.API_KEY = item.module.API_KEY.ljust(_MIN_KEY_CHARS, "-")
        for name, value in case.params.items():
            if hasattr(value, "_replace"):
                case.params[name] = value._replace(api_key=value.api_key.ljust(_MIN_KEY_CHARS, "-"))


def pytest_runtest_logreport(report: Any) -> None:
    """Keep what became of a test, and in one line why; a failure of its fixtures is an error."""
    if report.when == "call" or report.outcome != "passed":
        outcome = "error" if report.outcome == "failed" and report.when != "call" else report.outcome
        crash = getattr(report.longrepr, "reprcrash", None)
        told = crash.message if crash else str(report.longrepr or "").strip().rpartition("\n")[2]
        _outcomes[report.nodeid] = (outcome, plain_words(told))
        _write()


def pytest_collectreport(report: Any) -> None:
    """Keep a module that cannot be imported as one error."""
    if report.failed:
        _outcomes[report.nodeid] = ("error", plain_words(str(report.longrepr).strip().rpartition("\n")[2]))


def pytest_unconfigure(config: Any) -> None:
    """End what lives."""
    StandIn.end_idle(all_of_them=True)
    _write()


def _write() -> None:
    Path(os.environ["PEER_RESULTS"]).write_text(json.dumps(_outcomes, indent=1))
