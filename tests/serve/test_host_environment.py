# SPDX-License-Identifier: Apache-2.0
"""What of the server's environment an engine host and its children have."""

from __future__ import annotations

import asyncio
import ctypes
import os
from types import SimpleNamespace
from typing import Any

import pytest

from tokenpool.config import PoolConfig

pytestmark = pytest.mark.vllm

KEY = "key-0123456789ab"


class _StopError(Exception):
    """Ends what is looked at where the test has seen enough."""


def test_a_host_does_not_inherit_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a key of the pool file refers to, and the variables that hold keys, stay with the server."""
    from tokenpool.host.hosted_model import HostConfig
    from tokenpool.serve.host_process import HostProcess

    for name in ("POOL_TEST_KEY", "VLLM_API_KEY", "TOKENPOOL_ADMIN_KEY", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("HF_TOKEN", "for-downloads")
    PoolConfig.from_dict({"models": [{"name": "a", "model": "x/y"}], "admin_key": "a${POOL_TEST_KEY}"})
    seen: dict[str, str] = {}

    async def spawn(*words: str, env: dict[str, str], **options: Any) -> None:
        seen.update(env)
        raise _StopError

    monkeypatch.setattr(asyncio, "create_subprocess_exec", spawn)
    with pytest.raises(_StopError):
        asyncio.run(HostProcess.start(HostConfig(device_memory=1 << 20, page_size=1 << 16), None))

    assert [] == [name for name, value in seen.items() if KEY in value]
    assert ("for-downloads", 64) == (seen["HF_TOKEN"], len(seen["TOKENPOOL_CONTROL_KEY"]))


def test_children_of_a_host_do_not_get_its_control_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has left the environment before the host is made, which starts the ranks of a tensor parallel group."""
    from tokenpool.host import __main__ as entry

    seen: list[str | None] = []

    def make(config: Any) -> None:
        seen.append(os.environ.get(entry.CONTROL_KEY_VARIABLE))
        raise _StopError

    monkeypatch.setenv(entry.CONTROL_KEY_VARIABLE, "00" * 32)
    monkeypatch.setattr(entry, "EngineHost", make)
    monkeypatch.setattr(entry, "log_to_stderr", lambda name: None)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(prctl=lambda *words: None))
    with pytest.raises(_StopError):
        entry.main("unused", '{"device_memory": 1048576, "page_size": 65536}')

    assert [None] == seen
