# SPDX-License-Identifier: Apache-2.0
"""A real server whose models come and go: what the pool file keeps is there all the time once it was loaded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import TinyModels
from tests.helpers.server import PoolServerProcess, poll
from tests.serve.pool.test_on_demand import ask, states

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

KEPT = {"qwen2": "device", "llama": "host"}
FREE = ("gemma3", "mixtral")


@pytest.fixture(scope="module")
def server(tiny_models: TinyModels) -> Iterator[PoolServerProcess]:
    names = [*KEPT, *FREE]
    pool = {
        "models": [{"name": name, "model": str(tiny_models.path(name))} for name in names],
        "load": "on_demand",
        "unload_after": "1s",
        "max_loaded": 3,
        "weights": "movable",
        "device_memory": "6MiB",
        "page_size": "256KiB",
        "host_memory": "64MiB",
        "admin_key": "test-admin-key-0123",
    }
    for model in pool["models"]:
        if model["name"] in KEPT:
            model["keep"] = KEPT[model["name"]]
    with PoolServerProcess(pool) as process:
        yield process


def test_what_is_kept_is_never_unloaded(server: PoolServerProcess) -> None:
    """The others make room for one another, and are unloaded when they are idle; the kept ones answer at once."""
    first = {name: ask(server, name) for name in KEPT}
    for name in FREE * 2:
        ask(server, name)
        host = server.state()["host"]["models"]
        assert "on device" == host["qwen2"]["state"]
        assert host["llama"]["state"] in ("on device", "in host memory", "copying")
    poll(lambda: states(server), until=lambda seen: all(seen[name] == "cold" for name in FREE))
    assert dict.fromkeys(KEPT, "ready") == {name: states(server)[name] for name in KEPT}
    assert first == {name: ask(server, name) for name in KEPT}
    assert set(KEPT) == server.wait_until_idle()["host"]["models"].keys()
