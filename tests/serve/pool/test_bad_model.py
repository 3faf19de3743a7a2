# SPDX-License-Identifier: Apache-2.0
"""A real pool whose models are bad at the start, or cannot come back after the death of the host."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import TinyModels
from tests.helpers.server import TINY_ARGS, PoolServerProcess, poll
from tests.serve.client.test_failover import Call

pytestmark = pytest.mark.vllm

LONG = {"model": "good", "temperature": 0, "max_tokens": 440}


def states(server: PoolServerProcess) -> dict[str, str]:
    return {card["id"]: card["pool"]["state"] for card in server.request("GET", "/v1/models").json()["data"]}


def status(server: PoolServerProcess, model: str) -> int:
    body = {"model": model, "prompt": "x", "max_tokens": 1}
    return server.request("POST", "/v1/completions", json=body).status_code


def failed_gauge(server: PoolServerProcess) -> dict[str, float]:
    families = text_string_to_metric_families(server.request("GET", "/metrics").text)
    samples = (sample for family in families if family.name == "tokenpool:model_failed" for sample in family.samples)
    return {sample.labels["model_name"]: sample.value for sample in samples}


def spoil(folder: Path) -> bytes:
    """Cut the weights off and return what they were: the plan does not see it, loading does."""
    file = next(folder.glob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    return whole


@pytest.mark.parametrize("frontends", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_others_serve(tiny_models: TinyModels, tmp_path: Path, frontends: int) -> None:
    """A model that is bad at the start and one that cannot come back are failed, and say why; streams of the others
    go on; both can be helped: by mending their files, or by removing and adding them.
    """
    bad, gone = tmp_path / "bad", tmp_path / "gone"
    for folder, kind in ((bad, "llama"), (gone, "qwen2")):
        shutil.copytree(tiny_models.path(kind), folder)
    weights = spoil(bad)
    paths = {"bad": bad, "good": tiny_models.path("llama"), "gone": gone}
    pool = {
        "models": [{"name": name, "model": str(path)} for name, path in paths.items()],
        "device_memory": "64MiB",
        "page_size": "1MiB",
        "admin_key": "test-admin-key-0123",
    }
    with PoolServerProcess(pool, flags=["--frontends", str(frontends)]) as server:
        assert states(server) == {"bad": "failed", "good": "ready", "gone": "ready"}
        assert [status(server, name) for name in paths] == [503, 200, 200]
        refused = server.request("POST", "/v1/completions", json={"model": "bad", "prompt": "x"})
        card = server.request("GET", "/v1/models/bad").json()
        reason = card["pool"]["reason"]
        assert reason and reason in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) >= 1
        assert server.state()["models"]["bad"]["reason"] == reason
        assert failed_gauge(server) == {"bad": 1, "good": 0, "gone": 0}

        alone, call = Call(server, **LONG).result(), Call(server, **LONG)
        call.wait_until_begun()
        shutil.rmtree(gone)
        os.kill(server.host_pid, signal.SIGKILL)
        assert call.result() == alone
        server.wait_until_ready(120)
        poll(lambda: states(server), until={"bad": "failed", "good": "ready", "gone": "failed"}.__eq__)
        restarts = server.state()["host_restarts"]
        assert server.admin("DELETE", "/models/gone").status_code == 200

        next(bad.glob("*.safetensors")).write_bytes(weights)
        poll(lambda: states(server), until={"bad": "ready", "good": "ready"}.__eq__)
        spec = {"name": "gone", "model": str(tiny_models.path("qwen2")), "args": TINY_ARGS}
        assert server.admin("POST", "/models", spec).status_code == 201
        assert [status(server, name) for name in paths] == [200, 200, 200]
        assert server.state()["host_restarts"] == restarts == 1
        server.wait_until_idle()
