# SPDX-License-Identifier: Apache-2.0
"""A real server whose pool file is mounted from a ConfigMap that changes: models come and go without a restart."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml

from tests.conftest import TinyModels
from tests.helpers.server import TINY_ARGS, PoolServerProcess, poll

pytestmark = pytest.mark.vllm


@pytest.fixture(
    scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 2], ids=["one frontend", "two frontends"]
)
def server(request: pytest.FixtureRequest, tiny_models: TinyModels) -> Iterator[PoolServerProcess]:
    pool = {
        "models": [{"name": "llama", "model": str(tiny_models.path("llama"))}],
        "device_memory": "64MiB",
        "page_size": "1MiB",
        "admin_key": "test-admin-key-0123",
        "frontends": request.param,
    }
    with PoolServerProcess(pool) as process:
        yield process


class ConfigMap:
    """Changes the server's pool file as the kubelet does: by a link that is put in another's place."""

    def __init__(self, server: PoolServerProcess) -> None:
        self._server, self._folder, self._count = server, server.pool_file.parent, 0

    def write(self, models: Mapping[str, Any], text: str = "") -> None:
        listed = [{"name": name, "model": str(path), "args": TINY_ARGS} for name, path in models.items()]
        self._count += 1
        folder = self._folder / f"..{self._count}"
        folder.mkdir()
        (folder / "pool.yaml").write_text(text or yaml.safe_dump(self._server.pool | {"models": listed}))
        self._link(folder.name, "..data")
        if self._count == 1:
            self._link("..data/pool.yaml", "pool.yaml")

    def _link(self, target: str, name: str) -> None:
        os.symlink(target, self._folder / "tmp")
        os.replace(self._folder / "tmp", self._folder / name)


def states(server: PoolServerProcess) -> dict[str, str]:
    cards = server.request("GET", "/v1/models").json()["data"]
    return {card["id"]: card["pool"]["state"] for card in cards}


def ask(server: PoolServerProcess, name: str) -> int:
    body = {"model": name, "prompt": [5] * 20, "max_tokens": 8, "ignore_eos": True, "temperature": 0}
    return server.request("POST", "/v1/completions", json=body).status_code


def number(server: PoolServerProcess, name: str) -> float:
    (value,) = re.findall(
        rf"^tokenpool:{name}(?:\{{.*\}})? (\S+)$", server.request("GET", "/metrics").text, re.MULTILINE
    )
    return float(value)


def test_models_follow_the_file_and_a_bad_one_changes_nothing(
    server: PoolServerProcess, tiny_models: TinyModels
) -> None:
    """Added, changed, refused, removed, while a model that stays answers every request."""
    file, stop, seen = ConfigMap(server), threading.Event(), set[int]()
    llama, qwen2, gemma3 = (tiny_models.path(name) for name in ("llama", "qwen2", "gemma3"))

    def go_on() -> None:
        while not stop.is_set():
            seen.add(ask(server, "llama"))

    going = threading.Thread(target=go_on)
    going.start()
    try:
        file.write({"llama": llama, "other": qwen2})
        poll(lambda: states(server), until=lambda now: now == {"llama": "ready", "other": "ready"})
        assert ask(server, "other") == 200 and number(server, "pool_file_ok") == 1
        file.write({"llama": llama, "other": gemma3})
        poll(lambda: server.state()["models"].get("other", {}).get("model"), until=lambda path: path == str(gemma3))
        poll(lambda: states(server), until=lambda now: now.get("other") == "ready")
        assert ask(server, "other") == 200

        file.write({}, "models: [{name: llama}]")
        poll(lambda: number(server, "pool_file_ok"), until=lambda value: value == 0)
        assert states(server) == {"llama": "ready", "other": "ready"}
        assert (number(server, "pool_file_refused_total"), "pool file not taken" in server.log) == (1, True)

        file.write({"llama": llama, "other": llama.parent})  # it has no config.json
        poll(lambda: "model not changed model=other" in server.log)
        told = server.admin("GET", "/logs?model=other").text
        assert "model not changed model=other" in told and "pool file not taken" not in told
        assert ask(server, "other") == 200 and number(server, "pool_file_ok") == 0

        file.write({"llama": llama})
        poll(lambda: states(server), until=lambda now: now == {"llama": "ready"})
        poll(lambda: number(server, "pool_file_ok"), until=lambda value: value == 1)
    finally:
        stop.set()
        going.join()
    assert seen == {200}
    server.wait_until_idle()
