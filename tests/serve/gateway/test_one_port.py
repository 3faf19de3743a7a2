# SPDX-License-Identifier: Apache-2.0
"""What a whole server says of itself: in its log, in its metrics, and to browsers. One server on a port it chose."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.conftest import TinyModels
from tests.helpers.server import PoolServerProcess, poll

pytestmark = pytest.mark.vllm

UI = {"Origin": "http://ui.example"}
ALLOWED = "access-control-allow-origin"
BODY = {"prompt": "hello", "max_tokens": 2}
SLO = {"ttft": "10s", "tpot": "1s"}


class AnyPort(PoolServerProcess):
    """A server with `port: 0`, whose address is read from its log."""

    def wait_until_ready(self, limit_s: float = 60.0) -> None:
        poll(lambda: not self.running or self._address(), limit_s=limit_s)
        found = self._address()
        assert found is not None, self.log[-3000:]
        self.port = int(found[1])
        self.base_url = f"http://127.0.0.1:{self.port}"
        super().wait_until_ready(limit_s)

    def _address(self) -> re.Match[str] | None:
        return re.search(r"^INFO serving 2 models on http://127\.0\.0\.1:(\d+)$", self.log, re.MULTILINE)


@pytest.fixture(scope="module")
def server(tiny_models: TinyModels) -> Iterator[PoolServerProcess]:
    pool = {
        "models": [
            {"name": "llama", "model": str(tiny_models.path("llama")), "args": {"allowed_origins": ["*"]}},
            {"name": "qwen2", "model": str(tiny_models.path("qwen2"))},
        ],
        "device_memory": "64MiB",
        "page_size": "1MiB",
        "api_key": "test-api-key-0123",
        "admin_key": "test-admin-key-0123",
    }
    process = AnyPort(pool, env={"TOKENPOOL_LOG_LEVEL": "INFO"})
    process.pool["port"] = 0
    with process:
        yield process


def test_the_state_tells_the_port_that_was_chosen(server: PoolServerProcess) -> None:
    """It is the one of the log line by which this test found the server."""
    assert server.state()["address"] == f"127.0.0.1:{server.port}"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/models/qwen2/v1/completions"])
def test_a_preflight_is_answered_without_key_and_model(server: PoolServerProcess, path: str) -> None:
    """As a browser sends it, by the first model's flags, which are a YAML list."""
    server_key, server.api_key = server.api_key, None
    try:
        headers = UI | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        answer = server.request("OPTIONS", path, headers=headers)
    finally:
        server.api_key = server_key

    assert (200, "*") == (answer.status_code, answer.headers.get(ALLOWED)), answer.text


@pytest.mark.parametrize(
    ("status", "changes"),
    [
        (200, {"model": "llama"}),
        (200, {"model": "qwen2"}),
        (400, {"model": "qwen2", "max_tokens": -5}),
        (400, {}),
        (404, {"model": "nobody"}),
    ],
)
def test_every_answer_carries_one_header(server: PoolServerProcess, status: int, changes: dict) -> None:
    """Those of each model's app and the pool's own."""
    answer = server.request("POST", "/v1/completions", json=BODY | changes, headers=UI)

    assert (status, ["*"]) == (answer.status_code, answer.headers.get_list(ALLOWED)), answer.text
    assert answer.headers.get_list("vary") == ["Origin"]


def series(server: PoolServerProcess, model: str) -> dict[str, float]:
    """The samples of a scrape that name a model."""
    lines = server.request("GET", "/metrics").text.splitlines()
    pairs = (line.rpartition(" ") for line in lines if f'"{model}"' in line and not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


def test_series_of_a_removed_model_leave_and_those_of_its_successor_start_anew(
    server: PoolServerProcess, tiny_models: TinyModels
) -> None:
    """The frontend's and the host's, of vLLM and of ours; the other models' stay."""
    spec = {"name": "branch", "model": str(tiny_models.path("llama")), "args": server.pool["models"][1]["args"]}
    body = BODY | {"model": "branch", "ignore_eos": True}
    asked = {"vllm:prompt_tokens_total", "tokenpool:tokens_total", "tokenpool:queue_requests", "tokenpool:pages"}
    others = set(series(server, "llama"))
    for _ in range(2):
        assert server.admin("POST", "/models", spec | {"slo": SLO}).status_code == 201
        assert server.request("POST", "/v1/completions", json=body).status_code == 200
        there = poll(
            lambda: series(server, "branch"),
            until=lambda found: (
                asked <= {name.partition("{")[0] for name in found}
                and found['tokenpool:tokens_total{model_name="branch"}'] == 2
            ),
        )
        assert there['vllm:generation_tokens_total{engine="0",model_name="branch"}'] == 2
        assert server.admin("DELETE", "/models/branch").status_code == 200
        poll(lambda: series(server, "branch"), until=lambda left: not left)
    assert others <= set(series(server, "llama"))
    assert server.admin("POST", "/models", spec).status_code == 201
    poll(lambda: any(name.startswith("tokenpool:model_state") for name in series(server, "branch")))
    assert not [name for name in series(server, "branch") if "slo_attainment" in name]
    assert server.admin("DELETE", "/models/branch").status_code == 200


def test_lines_come_to_the_log_after_the_apps_were_built(server: PoolServerProcess) -> None:
    """Building vLLM's first app changes the root logger; and a draining server says so. Last: it ends the server."""
    assert server.stop() == 0

    for line in ("INFO model ready model=llama", "INFO model ready model=branch", "INFO draining: no new requests"):
        assert re.search(f"^{line}", server.log, re.MULTILINE), server.log[-3000:]
