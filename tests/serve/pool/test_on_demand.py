# SPDX-License-Identifier: Apache-2.0
"""A real server whose models are loaded by their first request, one at a time, and leave nothing when they are idle."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.conftest import TinyModels
from tests.helpers.server import PoolServerProcess, poll

pytestmark = pytest.mark.vllm

NAMES = ("llama", "qwen2", "gemma3")


@pytest.fixture(
    scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["one frontend", "two frontends"]
)
def server(request: pytest.FixtureRequest, tiny_models: TinyModels) -> Iterator[PoolServerProcess]:
    pool = {
        "models": [{"name": name, "model": str(tiny_models.path(name))} for name in NAMES],
        "load": "on_demand",
        "max_loaded": 1,
        "unload_after": "2s",
        "device_memory": "64MiB",
        "page_size": "1MiB",
        "admin_key": "test-admin-key-0123",
        "frontends": request.param,
    }
    with PoolServerProcess(pool) as process:
        yield process


@contextmanager
def always_ready(server: PoolServerProcess) -> Iterator[None]:
    """Ask /ready all the time; it says 200 whatever happens to models."""
    stop, seen = threading.Event(), set[int]()

    def ask() -> None:
        while not stop.is_set():
            seen.add(httpx.get(f"{server.base_url}/ready", timeout=60).status_code)
            stop.wait(0.02)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        stop.set()
        asking.join()
    assert seen == {200}


def ask(server: PoolServerProcess, name: str) -> list[int]:
    body: dict[str, Any] = {"model": name, "prompt": [5] * 20, "max_tokens": 8, "ignore_eos": True, "temperature": 0}
    answer = server.request("POST", "/v1/completions", json=body | {"return_token_ids": True})
    assert answer.status_code == 200, answer.text
    tokens: list[int] = answer.json()["choices"][0]["token_ids"]
    assert len(tokens) == 8
    return tokens


def states(server: PoolServerProcess) -> dict[str, str]:
    cards = server.request("GET", "/v1/models").json()["data"]
    return {card["id"]: card["pool"]["state"] for card in cards}


def test_models_come_and_go_and_no_request_is_lost(server: PoolServerProcess) -> None:
    """All are cold; requests to all are answered, two at a time for each; then all are cold again, and so once more."""
    assert states(server) == dict.fromkeys(NAMES, "cold")
    with always_ready(server), ThreadPoolExecutor(6) as pool:
        first = list(pool.map(lambda name: ask(server, name), NAMES * 2))
        assert first[:3] == first[3:]
        poll(lambda: states(server), until=lambda seen: seen == dict.fromkeys(NAMES, "cold"))
        host = poll(lambda: server.state()["host"], until=lambda host: not host["models"])
        assert not {owner for owners in host["held_pages"].values() for owner in owners} & set(NAMES)
        text = server.request("GET", "/metrics").text
        assert not [line for line in text.splitlines() if 'model_name="' in line and line.startswith("vllm:")]
        assert "tokenpool:unloads_total" in text and "tokenpool:demand_loads_total" in text
        assert server.admin("POST", "/check").json() == {"ok": True}
        assert list(pool.map(lambda name: ask(server, name), NAMES)) == first[:3]


def test_who_waits_is_answered_after_the_death_of_the_host(server: PoolServerProcess) -> None:
    """The host is killed as soon as a request has made its model loading; the next host loads it."""
    poll(lambda: states(server), until=lambda seen: seen == dict.fromkeys(NAMES, "cold"))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, server, "qwen2")
        poll(lambda: states(server)["qwen2"], until=lambda state: state != "cold")
        os.kill(server.state()["host_pid"], signal.SIGKILL)
        assert len(asked.result()) == 8
    poll(lambda: states(server), until=lambda seen: seen == dict.fromkeys(NAMES, "cold"))
