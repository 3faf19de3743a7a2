# SPDX-License-Identifier: Apache-2.0
"""A whole server with vLLM's routes for development, which lends its device.

Each route answers, or says why not, whatever its model does; streams pause while the pool is parked, its host is
killed, and models sleep.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.conftest import TinyModels
from tests.helpers.server import PoolServerProcess, poll
from tests.serve.pool.test_lifecycle import Stream, complete
from tokenpool.serve.access.dev_routes import REFUSED_PATHS

pytestmark = pytest.mark.vllm

NAMES = ("llama", "qwen2", "gemma3")
LENT = ("llama", "qwen2")
"""Those that are asked while the device is lent."""
PAGE = 256 << 10
TOKENS = 300
ANSWER_LIMIT_S = 60.0
RPC: dict[str, Any] = {"method": "check_health"}
LOOKING = ("/server_info", "/is_paused", "/is_sleeping", "/weight_info", "/get_world_size")
CHANGING: dict[str, dict[str, Any]] = {
    "/reset_prefix_cache": {},
    "/reset_mm_cache": {},
    "/reset_encoder_cache": {},
    "/collective_rpc": RPC,
    "/weight_checker": {"action": "checksum"},
    "/update_weight_version": {"new_version": "v2"},
}


@pytest.fixture(scope="module")
def server(tiny_models: TinyModels) -> Iterator[PoolServerProcess]:
    extension = {"worker_extension_cls": "tests.helpers.inputs.worker_extension.Extension"}
    pool = {
        "models": [{"name": kind, "model": str(tiny_models.path(kind)), "args": extension} for kind in NAMES],
        "device_memory": 24 * PAGE,
        "page_size": PAGE,
        "host_memory": "128MiB",
        "weights": "movable",
        "api_key": "test-api-key-0123",
        "admin_key": "test-admin-key-0123",
    }
    with PoolServerProcess(pool, env={"VLLM_SERVER_DEV_MODE": "1"}) as server:
        yield server


def ask(server: PoolServerProcess, path: str, body: Any = None, *, model: str = "llama") -> httpx.Response:
    """Ask a route of one model with the admin key."""
    headers = server.headers(server.admin_key)
    method = "GET" if path.partition("?")[0] in LOOKING else "POST"
    options = {} if method == "GET" else {"json": body or {}}
    url = f"{server.base_url}/models/{model}{path}"
    return httpx.request(method, url, headers=headers, timeout=ANSWER_LIMIT_S, **options)


@contextmanager
def idle(server: PoolServerProcess) -> Iterator[None]:
    """No model has a request."""
    yield


@contextmanager
def running(server: PoolServerProcess) -> Iterator[None]:
    """Each model has one, and they take turns on the device."""
    expected = [complete(server, name, 300) for name in NAMES]
    streams = [Stream(server, name, 300) for name in NAMES]
    for stream in streams:
        stream.read_one()
    yield
    for stream in streams:
        stream.read_all()
    assert expected == [stream.text for stream in streams]


@contextmanager
def paused(server: PoolServerProcess) -> Iterator[None]:
    """One has a request, and is paused."""
    with running(server):
        assert 200 == ask(server, "/pause?mode=keep&clear_cache=false").status_code
        assert ask(server, "/is_paused").json()["is_paused"]
        yield
        assert 200 == ask(server, "/resume").status_code


@contextmanager
def asleep(server: PoolServerProcess) -> Iterator[None]:
    """One sleeps."""
    assert 200 == ask(server, "/sleep").status_code
    yield
    assert 200 == ask(server, "/wake_up").status_code


@contextmanager
def parked(server: PoolServerProcess) -> Iterator[None]:
    """Nothing is on the device."""
    full = server.admin("GET", "/budget").json()["device_memory"]
    assert server.admin("POST", "/budget", {"device_memory": 0}).json()["parked"]
    yield
    assert 200 == server.admin("POST", "/budget", {"device_memory": full}).status_code


@pytest.mark.parametrize("state", [pytest.param(idle, marks=pytest.mark.slow), running, paused, asleep, parked])
def test_each_route_answers_or_says_why_not(server: PoolServerProcess, state: Callable[..., Any]) -> None:
    """Of a model that is kept off the device, what needs it there is refused; streams get the same tokens."""
    with state(server):
        for path in LOOKING:
            assert 200 == ask(server, path).status_code, path
        for path, body in CHANGING.items():
            answer = ask(server, path, body)
            if state in (asleep, parked) and path not in ("/reset_mm_cache", "/update_weight_version"):
                assert (400, True) == (answer.status_code, ("wake_up" if state is asleep else "parked") in answer.text)
            else:
                assert 200 == answer.status_code, answer.text
        for path, reason in REFUSED_PATHS.items():
            answer = ask(server, path, {})
            assert (400, reason) == (answer.status_code, answer.json()["error"]["message"])
    server.wait_until_idle()
    assert ask(server, "/reset_prefix_cache").json() == {"success": True}
    assert {"ok": True} == server.admin("POST", "/check").json()


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_a_pause_is_answered_and_reset_takes_what_runs(server: PoolServerProcess, mode: str) -> None:
    """`keep` keeps a stream, whose KV is computed again; `wait` lets it end; `abort` ends it."""
    stream = Stream(server, "llama", 200)
    stream.read_one()
    assert 200 == ask(server, f"/pause?mode={mode}").status_code
    assert ask(server, "/reset_prefix_cache?reset_running_requests=true").json() == {"success": True}
    assert 200 == ask(server, "/resume").status_code
    stream.read_all()
    assert (stream.num_tokens == 200) is (mode != "abort")
    server.wait_until_idle()


def test_an_extension_is_called_and_nothing_else_of_the_worker(server: PoolServerProcess) -> None:
    """What it gives is told, or that it cannot be sent; vLLM's own methods that move memory are refused."""
    told = ask(server, "/collective_rpc", {"method": "told", "args": ["a", "b"]})
    assert {"results": [{"words": ["a", "b"]}]} == told.json()
    assert 500 == ask(server, "/collective_rpc", {"method": "unsendable"}).status_code
    for method in ("load_model", "sleep", "reset_weights", "shutdown", "__reduce__"):
        answer = ask(server, "/collective_rpc", {"method": method})
        assert (400, True) == (answer.status_code, "--worker-extension-cls" in answer.text)
    assert 400 == ask(server, "/weight_checker", {"action": "reset"}).status_code
    assert complete(server, "llama", 5)


def test_a_call_that_ends_the_host_is_not_made_again(server: PoolServerProcess) -> None:
    """It is told, and the next host lives."""
    before = server.host_pid
    assert 502 == ask(server, "/collective_rpc", {"method": "end_the_host"}).status_code
    poll(lambda: server.host_pid, until=lambda pid: pid not in (before, None))
    server.wait_until_ready()
    after = server.host_pid
    assert complete(server, "llama", 5)
    assert after == server.host_pid


# --- the device is lent ------------------------------------------------------------------------------------


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


def asked(model: dict[str, Any]) -> int:
    """Requests that it has."""
    count: int = model["waiting"] + model["running"]
    return count


def begin(server: PoolServerProcess, threads: ThreadPoolExecutor) -> list[Any]:
    """Begin a stream of each model; the texts, to be waited for."""
    return [threads.submit(complete, server, kind, TOKENS) for kind in LENT]


def test_a_parked_pool_holds_streams_and_a_dead_host_comes_back_parked(server: PoolServerProcess) -> None:
    """Shrunk, parked, its host killed, grown: running streams and those that come meanwhile get the same tokens."""
    expected = [complete(server, kind, TOKENS) for kind in LENT]
    first = budget(server)
    running = [Stream(server, kind, TOKENS) for kind in LENT]
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
    with ThreadPoolExecutor(len(LENT)) as threads:
        late = begin(server, threads)
        waits = poll(
            lambda: [asked(server.model_state(kind)) for kind in LENT],
            until=lambda counts: all(counts),
        )
        assert len(LENT) == len(waits)
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
