# SPDX-License-Identifier: Apache-2.0
"""Ray without a token only where somebody has said so, and no key of the server in a host's environment."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tokenpool.cluster.host_supervisor import HostSupervisor
from tokenpool.cluster.session import host_env, prepare
from tokenpool.config import PoolConfig
from tokenpool.errors import ConfigError

pytestmark = pytest.mark.cpu

SECRET = "secret-0123456789"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user without a token, and a Ray that needs no time to import."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that it is put back, whatever the test leaves
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())  # type: ignore[arg-type]


@pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379"])
def test_a_cluster_without_a_token_is_refused(address: str) -> None:
    """The line names the places of a token and what allows a cluster without."""
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN.*RAY_AUTH_MODE=disabled"):
        prepare(address)
    assert "RAY_AUTH_MODE" not in os.environ


def test_disabled_must_be_said_and_is_told(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Then it is so, also for a Ray of one's own, with a warning each time."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    for address in ("auto", "local"):
        with caplog.at_level(logging.WARNING):
            prepare(address)
        assert "whoever reaches its ports runs code" in caplog.text
        caplog.clear()
    assert ("disabled", None) == (os.environ["RAY_AUTH_MODE"], os.environ.get("RAY_AUTH_TOKEN"))


def test_a_token_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Wherever it is, the mode is `token`; a Ray of one's own gets one."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(SECRET)
    prepare("auto")
    assert "token" == os.environ.pop("RAY_AUTH_MODE")
    (tmp_path / ".ray" / "auth_token").unlink()
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    prepare("auto")
    assert ("token", SECRET) == (os.environ.pop("RAY_AUTH_MODE"), os.environ.pop("RAY_AUTH_TOKEN"))
    prepare("local")
    assert 64 == len(os.environ["RAY_AUTH_TOKEN"])


class Telling(HostSupervisor):
    """Starts a process that writes its environment where a host would listen."""

    def _command(self, control: str, key: bytes) -> list[str]:
        code = "import json, os, sys, time; t = json.dumps(dict(os.environ)); open(sys.argv[1] + '~', 'w').write(t); "
        return [sys.executable, "-c", code + "os.rename(sys.argv[1] + '~', sys.argv[1]); time.sleep(600)", control]


def test_a_host_of_a_cluster_has_no_key_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pool file's keys refer to, Ray's token and the clients' variables stay with the server."""
    names = ("POOL_KEY", "TEAM_KEY", "RAY_AUTH_TOKEN", "TOKENPOOL_ADMIN_KEY", "VLLM_API_KEY")
    for name in names:
        monkeypatch.setenv(name, f"{name}-{SECRET}")
    monkeypatch.setenv("VLLM_NEEDED", "1")
    config = PoolConfig.from_dict({
        "models": [{"name": "a", "model": "x/y"}], "view_key": "${POOL_KEY}",
        "tenants": [{"name": "t", "keys": "${TEAM_KEY}"}],
    })  # fmt: skip
    env = host_env(config.cluster, use_gpus=False)
    host = Telling("h0", {"device_memory": 64, "page_size": 1, "host_timeout_s": 60.0}, lambda report: None, env=env)
    host._launch()
    try:
        found = json.loads(Path(host._folder, "control").read_text())
    finally:
        assert host._process is not None
        host._process.kill()
        host._process.wait()
        subprocess.run(["rm", "-r", host._folder], check=True)

    assert ([], "1") == ([name for name in found if SECRET in found[name]], found["VLLM_NEEDED"])
    assert 64 == len(found["TOKENPOOL_CONTROL_KEY"])
