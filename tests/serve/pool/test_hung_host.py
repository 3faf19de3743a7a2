# SPDX-License-Identifier: Apache-2.0
"""A host that hangs is told of at once, killed at its limit and replaced, and its streams go on."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from tests.conftest import TinyModels
from tests.helpers.server import PoolServerProcess, poll
from tests.serve.client.test_failover import GREEDY, Call, results, stop_in_the_middle

pytestmark = pytest.mark.vllm

RUNNING: dict[str, dict[str, Any]] = {
    "greedy": {"model": "llama", "max_tokens": 1900, **GREEDY},
    "seeded": {"model": "llama", "max_tokens": 1900, "temperature": 1, "seed": 5},
}
HOST_TIMEOUT_S = 12


def pulse_age_s(server: PoolServerProcess) -> float:
    found = re.search(r"^tokenpool:host_pulse_age_seconds\S* (\S+)$", server.request("GET", "/metrics").text, re.M)
    assert found is not None
    return float(found[1])


def replaced_when_it_hangs(server: PoolServerProcess, frontends: int) -> None:
    """Readiness, models, state and metrics say so meanwhile; all calls end as those of an undisturbed run."""
    before = server.wait_until_idle()
    assert frontends > 1 or "alive" == before["host_pulse"]["standing"]
    alone = results({name: Call(server, **options) for name, options in RUNNING.items()})
    calls = dict(zip(RUNNING, stop_in_the_middle(server, before["host_pid"], list(RUNNING.values())), strict=True))

    ready = poll(lambda: httpx.get(f"{server.base_url}/ready"), until=lambda answer: answer.status_code == 503)
    assert {"ready": False} == ready.json()
    told = server.request("GET", "/v1/models").json()["data"][0]
    assert "unavailable" == told["pool"]["state"]
    refused = server.request("POST", "/v1/completions", json={"model": "llama", "prompt": "x"})
    assert (503, True) == (refused.status_code, int(refused.headers["retry-after"]) >= 1)
    state = server.state()
    assert (False, before["host_pid"]) == (state["ready"], state["host_pid"])
    assert frontends > 1 or "no pulse for" in state["host_pulse"]["reason"]
    assert 1 < pulse_age_s(server)

    assert alone == results(calls)
    server.wait_until_ready(120)
    after = server.wait_until_idle()
    assert before["host_restarts"] + 1 == after["host_restarts"]
    assert before["host_pid"] != after["host_pid"]
    assert "engine host hangs host=host" in server.log and "no pulse for" in server.log
    poll(lambda: pulse_age_s(server), until=lambda age_s: age_s < HOST_TIMEOUT_S / 2)


@pytest.mark.slow
def test_a_stopped_host_behind_two_frontends(tiny_models: TinyModels) -> None:
    """One behind a single frontend is in test_host_template.py, where hosts of one server die in many ways."""
    pool = {
        "models": [{"name": "llama", "model": str(tiny_models.path("llama")), "args": {"max_model_len": 2048}}],
        "device_memory": "64MiB",
        "page_size": "1MiB",
        "frontends": 2,
        "host_timeout": HOST_TIMEOUT_S,
        "api_key": "test-api-key-0123",
        "admin_key": "test-admin-key-0123",
    }
    with PoolServerProcess(pool, env={"TOKENPOOL_LOG_LEVEL": "INFO"}) as server:
        replaced_when_it_hangs(server, frontends=2)
