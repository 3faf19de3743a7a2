# SPDX-License-Identifier: Apache-2.0
"""A whole server that lends its device: streams pause while it is parked, its host is killed, and models sleep."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.conftest import TinyModels
from tests.helpers.server import PoolServerProcess, poll
from tests.serve.pool.test_lifecycle import Stream, complete

pytestmark = pytest.mark.vllm

KINDS = ("llama", "qwen2")
PAGE = 256 << 10
TOKENS = 300
DEV_MODE = {"VLLM_SERVER_DEV_MODE": "1"}


@pytest.fixture(scope="module")
def server(tiny_models: TinyModels) -> Iterator[PoolServerProcess]:
    pool = {
        "models": [{"name": kind, "model": str(tiny_models.path(kind))} for kind in KINDS],
        "device_memory": 24 * PAGE,
        "page_size": PAGE,
        "host_memory": "128MiB",
        "weights": "movable",
        "api_key": "test-api-key-0123",
        "admin_key": "test-admin-key-0123",
    }
    with PoolServerProcess(pool, env=DEV_MODE) as server:
        yield server


def budget(server: PoolServerProcess, order: Any = None, status: int = 200) -> dict[str, Any]:
    """Change the budget, or ask for it."""
    response = server.admin("POST" if order else "GET", "/budget", order)
    assert status == response.status_code, response.text
    told: dict[str, Any] = response.json()
    return told


def of_model(server: PoolServerProcess, method: str, path: str, **options: Any) -> dict[str, Any]:
    """One of vLLM's routes that need the admin key."""
    headers = server.headers(server.admin_key)
    response = httpx.request(method, server.base_url + path, headers=headers, timeout=120, **options)
    assert 200 == response.status_code, response.text
    told: dict[str, Any] = response.json()
    return told


def begin(server: PoolServerProcess, threads: ThreadPoolExecutor) -> list[Any]:
    """Begin a stream of each model; the texts, to be waited for."""
    return [threads.submit(complete, server, kind, TOKENS) for kind in KINDS]


def test_a_parked_pool_holds_streams_and_a_dead_host_comes_back_parked(server: PoolServerProcess) -> None:
    """Shrunk, parked, its host killed, grown: running streams and those that come meanwhile get the same tokens."""
    expected = [complete(server, kind, TOKENS) for kind in KINDS]
    first = budget(server)
    running = [Stream(server, kind, TOKENS) for kind in KINDS]
    for stream in running:
        stream.read_one()
    least = first["device_memory_least"]
    assert least == budget(server, {"device_memory": least})["device_memory"]
    parked = budget(server, {"device_memory": "0"})
    assert (True, 0, first["device_memory_most"]) == tuple(
        parked[key] for key in ("parked", "device_memory", "device_memory_most")
    )
    assert "kv" not in parked["device_held"]
    assert parked["device_held"].get("weights", {}).keys() <= {"fixed tensors"}
    assert {"ok": True} == server.admin("POST", "/check").json()
    with ThreadPoolExecutor(len(KINDS)) as threads:
        late = begin(server, threads)
        waits = poll(
            lambda: [model["waiting"] + model["running"] for model in server.state()["host"]["models"].values()],
            until=lambda counts: all(counts),
        )
        assert len(KINDS) == len(waits)
        before = server.host_pid
        os.kill(before, signal.SIGKILL)
        poll(lambda: server.host_pid, until=lambda pid: pid not in (before, None))
        poll(lambda: server.admin("GET", "/budget").status_code, until=lambda status: status == 200)
        assert budget(server)["parked"]
        grown = budget(server, {"device_memory": first["device_memory"]})
        assert (False, first["device_memory"]) == (grown["parked"], grown["device_memory"])
        assert expected == [text.result(240) for text in late]
    for stream in running:
        stream.read_all()
    assert expected == [stream.text for stream in running]
    server.wait_until_idle()


def test_a_refusal_says_what_is_wrong(server: PoolServerProcess) -> None:
    """Each in one line, and the budget stays."""
    before = budget(server)
    for order, status, words in (
        ({"device_memory": PAGE}, 507, "for one request of full length of each model"),
        ({"device_memory": "1TiB"}, 507, "addresses are reserved for 6MiB"),
        ({"host_memory": "1KiB"}, 507, "could not be read into host memory"),
        ({"device": "1GiB"}, 400, "device: is unknown; known: device_memory, host_memory"),
        ({"device_memory": "much"}, 400, "is no size"),
        ([1], 400, "expected an object"),
    ):
        assert words in budget(server, order, status)["error"]["message"]
    after = budget(server)
    assert [before[key] for key in ("device_memory", "host_memory")] == [
        after[key] for key in ("device_memory", "host_memory")
    ]


def test_models_sleep_and_wake_by_vllms_own_words(server: PoolServerProcess) -> None:
    """Requests of the one that sleeps wait for it, the other serves, and only an admin key says so."""
    expected = complete(server, "llama", 20)
    assert 401 == server.request("POST", "/models/llama/sleep").status_code
    assert {"is_sleeping": False} == of_model(server, "GET", "/models/llama/is_sleeping")
    assert {"status": "sleeping", "level": 1} == of_model(server, "POST", "/sleep?level=1", json={"model": "llama"})
    assert {"is_sleeping": True} == of_model(server, "GET", "/is_sleeping?model=llama")
    assert {"is_sleeping": False} == of_model(server, "GET", "/is_sleeping?model=qwen2")
    assert {"llama": 1} == budget(server)["asleep"]
    with ThreadPoolExecutor(1) as threads:
        text = threads.submit(complete, server, "llama", 20)
        poll(lambda: server.model_state("llama")["waiting"], until=bool)
        complete(server, "qwen2", 20)
        assert 0 == server.model_state("llama")["weight_pages"] and not text.done()
        assert {"status": "awake", "tags": None} == of_model(server, "POST", "/wake_up?model=llama")
        assert expected == text.result(120)
    server.wait_until_idle()
