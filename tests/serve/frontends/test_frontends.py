# SPDX-License-Identifier: Apache-2.0
"""Several frontends are one pool: whichever answers, and whichever dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from tests.conftest import TinyModels
from tests.helpers.frontends import BODY, NUM_TOKENS, Stream, clients, complete, frontends
from tests.helpers.server import PoolServerProcess, is_running, poll
from tokenpool.tenant_config import hash_key

pytestmark = pytest.mark.vllm

KEYS = {"polite": "tp-polite-1111111", "counted": "tp-counted-222222"}


@pytest.fixture(scope="module")
def server(tiny_models: TinyModels) -> Iterator[PoolServerProcess]:
    pool = {
        "models": [{"name": "qwen2", "model": str(tiny_models.path("qwen2"))}],
        "tenants": [
            {"name": "polite", "keys": [hash_key(KEYS["polite"])]},
            {"name": "counted", "keys": [hash_key(KEYS["counted"])], "requests_per_minute": 6, "max_concurrent": 3},
        ],
        "device_memory": "64MiB",
        "page_size": "1MiB",
        "api_key": "test-api-key-0123",
        "admin_key": "test-admin-key-0123",
    }
    with PoolServerProcess(pool, flags=["--frontends", "2"]) as process:
        yield process


def test_both_give_the_tokens_of_a_single_frontend(server: PoolServerProcess, pool_server: PoolServerProcess) -> None:
    single = pool_server.request("POST", "/v1/completions", json=BODY | {"return_token_ids": True})
    expected = single.json()["choices"][0]["token_ids"]
    assert len(expected) == NUM_TOKENS
    with clients(server) as both:
        assert [complete(client) for client in both] == [expected, expected]


def test_what_concerns_the_pool_is_the_same_at_both(server: PoolServerProcess) -> None:
    """Readiness, load and state do not depend on who is asked, and /metrics counts the requests of all."""
    with clients(server) as both, ExitStack() as stack:
        paths = ("/ready", "/load", "/v1/models", "/version")
        for path in paths:
            answers = [client.get(path) for client in both]
            assert [answer.status_code for answer in answers] == [200, 200], path
            first, second = (_undated(answer.json()) for answer in answers)
            assert first == second, path
        stream = Stream(both[0], stack)
        with server.host_held_still():
            load = both[1].get("/load").json()
        stream.rest()
    if load["server_load"]:  # else the stream was over before the host was stopped
        assert load == {"server_load": 1, "models": {"qwen2": 1}}


def test_the_budget_is_that_of_the_pool_whichever_is_asked(server: PoolServerProcess) -> None:
    """One shrinks it, the other says so and takes it back; a host's refusals come through, too."""
    with clients(server) as both:
        asked = [(client, server.headers(server.admin_key)) for client in both]

        def budget(index: int, order: Any = None) -> Any:
            client, headers = asked[index]
            how = {"json": order} if order else {}
            return client.request("POST" if order else "GET", "/v1/pool/budget", headers=headers, **how)

        first = budget(0).json()
        least = {"device_memory": first["device_memory_least"]}
        assert least["device_memory"] == budget(0, least).json()["device_memory"] == budget(1).json()["device_memory"]
        assert complete(both[0])
        assert 507 == budget(0, {"device_memory": 0}).status_code  # its weights are fixed
        assert first["device_memory"] == budget(1, {"device_memory": first["device_memory"]}).json()["device_memory"]


def _undated(answer: Any) -> Any:
    if isinstance(answer, dict):
        return {k: _undated(v) for k, v in answer.items() if k not in ("created", "id")}
    return [_undated(item) for item in answer] if isinstance(answer, list) else answer


def test_metrics_of_one_count_the_requests_of_both(server: PoolServerProcess) -> None:
    def counted(client: httpx.Client) -> float:
        name = "vllm:generation_tokens_total{"
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    with clients(server) as both:
        before = counted(both[0])
        for client in both:
            complete(client)
        for client in both:
            poll(lambda client=client: counted(client) - before, until=lambda new: new == 2 * NUM_TOKENS)


def test_models_come_and_go_at_both(server: PoolServerProcess, tiny_models: TinyModels) -> None:
    spec = {"name": "late", "model": str(tiny_models.path("llama")), "args": server.pool["models"][0]["args"]}
    with clients(server) as both:
        added = server.admin("POST", "/models", spec)
        assert added.status_code == 201, added.text
        tokens = [complete(client, model="late") for client in both]
        assert tokens[0] == tokens[1] and len(tokens[0]) == NUM_TOKENS
        assert server.admin("POST", "/models", spec).status_code == 400
        assert server.admin("DELETE", "/models/late").status_code == 200
        after = [client.post("/v1/completions", json=BODY | {"model": "late"}).status_code for client in both]
        assert after == [404, 404]
        for client in both:  # the series of the host and of both frontends are gone, those of the others are not
            text = poll(lambda client=client: client.get("/metrics").text, until=lambda text: '"late"' not in text)
            assert 'vllm:generation_tokens_total{engine="0",model_name="qwen2"}' in text
    assert server.admin("DELETE", "/models/late").status_code == 404
    server.wait_until_idle()


def test_a_model_that_many_add_at_once_is_there_once(server: PoolServerProcess, tiny_models: TinyModels) -> None:
    """One of them adds it, which takes words of the frontends that they have to be asked by; the others are refused."""
    spec = {"name": "wanted", "model": str(tiny_models.path("llama")), "args": server.pool["models"][0]["args"]}
    with ThreadPoolExecutor(72) as threads:
        answers = list(threads.map(lambda _: server.admin("POST", "/models", spec).status_code, range(72)))
    assert sorted(answers) == [201, *[400] * 71]
    assert server.admin("DELETE", "/models/wanted").status_code == 200


def test_a_limit_counts_what_came_to_either(server: PoolServerProcess) -> None:
    """Six requests a minute are six at both together, whoever takes them; and the usage is that of both."""
    with clients(server, KEYS["counted"]) as both:
        statuses = [both[i % 2].post("/v1/completions", json=BODY).status_code for i in range(8)]
    assert statuses[:6] == [200] * 6 and 429 in statuses[6:], statuses
    tenant = server.admin("GET", "/tenants").json()["tenants"]["counted"]
    assert tenant["usage"]["qwen2"]["requests"] == statuses.count(200)
    assert tenant["usage"]["qwen2"]["completion_tokens"] == statuses.count(200) * NUM_TOKENS
    assert tenant["refused"] == {"requests_per_minute": statuses.count(429)}


def test_one_that_is_killed_takes_nobody_along(server: PoolServerProcess) -> None:
    """The other's stream goes on token for token, new requests are served, the host drops what the dead one had."""
    pids = frontends(server)
    with clients(server, KEYS["polite"]) as both:
        expected = complete(both[1], max_tokens=400)
        with ExitStack() as stack:
            doomed, other = Stream(both[0], stack), Stream(both[1], stack)
            assert doomed.tokens and other.tokens
            with server.host_held_still():
                os.kill(pids[0], signal.SIGKILL)
                poll(lambda: not is_running(pids[0]))
            assert other.rest() == expected
        assert len(complete(both[1])) == NUM_TOKENS  # on the connection that is there
    assert server.request("POST", "/v1/completions", json=BODY).status_code == 200  # and on a new one
    server.wait_until_idle()
    back = frontends(server)
    assert back[1] == pids[1] and back[0] != pids[0]
    with clients(server, KEYS["polite"]) as both:
        assert complete(both[0], max_tokens=400) == expected
    state = server.state()
    assert state["frontend_restarts"] == 1
    polite = server.admin("GET", "/tenants").json()["tenants"]["polite"]
    assert polite["inflight"] == 0
    assert polite["usage"]["qwen2"]["completion_tokens"] >= 3 * 400


def test_a_host_that_dies_loses_no_stream_of_either(server: PoolServerProcess) -> None:
    with clients(server) as both:
        expected = complete(both[0], max_tokens=400)
        with ExitStack() as stack:
            streams = [Stream(client, stack) for client in both]
            os.kill(server.host_pid, signal.SIGKILL)
            assert [stream.rest() for stream in streams] == [expected, expected]
    poll(lambda: server.request("GET", "/ready").status_code, until=lambda status: status == 200)
    assert server.state()["host_restarts"] == 1


def test_sigterm_lets_the_streams_of_both_end(server: PoolServerProcess) -> None:
    pids = frontends(server)
    with clients(server) as both, ExitStack() as stack:
        expected = complete(both[0], max_tokens=400)
        streams = [Stream(client, stack) for client in both]
        with server.host_held_still():
            server.terminate()
            poll(lambda: _refuses(server))
        assert [stream.rest() for stream in streams] == [expected, expected]
    assert server.stop() == 0
    assert not any(is_running(pid) for pid in pids)


def _refuses(server: PoolServerProcess) -> bool:
    try:
        httpx.get(f"{server.base_url}/health", timeout=5)
    except httpx.ConnectError:
        return True
    except httpx.TransportError:
        pass
    return False


@pytest.mark.slow
def test_a_supervisor_that_is_killed_takes_all_along(tiny_models: TinyModels) -> None:
    """Nobody answers on its port then."""
    models = [{"name": "llama", "model": str(tiny_models.path("llama"))}]
    pool = {"models": models, "device_memory": "64MiB", "page_size": "1MiB", "admin_key": "test-admin-key-0123"}
    with PoolServerProcess(pool, flags=["--frontends", "2"]) as server:
        pids = [*frontends(server), server.host_pid]
        assert server.process is not None
        server.process.kill()
        server.process.wait()
        poll(lambda: [pid for pid in pids if is_running(pid)], until=lambda left: not left)
        assert _refuses(server)
