# SPDX-License-Identifier: Apache-2.0
"""What of the server's environment an engine host and its children have."""

from __future__ import annotations

import asyncio
import os
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from tokenpool.config import PoolConfig
from tokenpool.settings import CONTROL_KEY

pytestmark = pytest.mark.vllm

KEY = "key-0123456789ab"


class _StopError(Exception):
    """Ends what is looked at where the test has seen enough."""


def test_a_host_does_not_inherit_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a key of the pool file refers to, and the variables that hold keys, stay with the server."""
    from tokenpool.serve.client.host_process import HostProcess
    from tokenpool.wire.spec import HostConfig

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


def test_a_template_of_hosts_does_not_have_them_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given the environment of all hosts; the key of one host's socket goes to that host alone."""
    from tokenpool.serve.client.host_process import HostProcess
    from tokenpool.wire.spec import HostConfig

    monkeypatch.setenv("VLLM_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", "for-downloads")
    seen: list[Any] = []

    def fork(words: list[str], env: dict[str, str], own: dict[str, str]) -> None:
        seen.extend((words, env, own))
        raise _StopError

    template: Any = SimpleNamespace(fork=fork)
    with pytest.raises(_StopError):
        asyncio.run(HostProcess.start(HostConfig(device_memory=1 << 20, page_size=1 << 16), None, template=template))

    words, env, own = seen
    assert ("VLLM_API_KEY" in env, env["HF_TOKEN"], CONTROL_KEY.name in env) == (False, "for-downloads", False)
    assert [CONTROL_KEY.name] == [*own] and 64 == len(own[CONTROL_KEY.name])
    assert "control" == os.path.basename(words[0]) and not any(own[CONTROL_KEY.name] in word for word in words)


def test_a_host_that_comes_when_nobody_waits_is_ended() -> None:
    """A start that is given up, as by SIGTERM, leaves no host behind that a template forks meanwhile."""
    from tokenpool.serve.client.host_process import HostProcess
    from tokenpool.wire.spec import HostConfig

    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def fork(*_: Any) -> Any:
        begun.set()
        assert may_end.wait(60)
        return SimpleNamespace(kill=lambda: None, wait=ended.set)

    async def test() -> None:
        template: Any = SimpleNamespace(fork=fork)
        config = HostConfig(device_memory=1 << 20, page_size=1 << 16)
        starting = asyncio.create_task(HostProcess.start(config, None, template=template))
        assert await asyncio.to_thread(begun.wait, 60)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        may_end.set()
        assert await asyncio.to_thread(ended.wait, 60)

    asyncio.run(test())


def test_children_of_a_host_do_not_get_its_control_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has left the environment before the host is made, which starts the ranks of a tensor parallel group."""
    from tokenpool.host import entry

    seen: list[str | None] = []

    def make(config: Any) -> None:
        seen.append(os.environ.get(CONTROL_KEY.name))
        raise _StopError

    monkeypatch.setenv(CONTROL_KEY.name, "00" * 32)
    monkeypatch.setattr(entry, "EngineHost", make)
    monkeypatch.setattr(entry, "log_to_stderr", lambda name: None)
    with pytest.raises(_StopError):
        entry.main("unused", '{"device_memory": 1048576, "page_size": 65536}')

    assert [None] == seen
