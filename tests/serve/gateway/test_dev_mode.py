# SPDX-License-Identifier: Apache-2.0
"""vLLM's routes for development on a whole server: each answers, or says why not, whatever its model does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
PAGE = 256 << 10
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
