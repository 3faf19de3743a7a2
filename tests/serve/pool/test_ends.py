# SPDX-License-Identifier: Apache-2.0
"""How a server ends: an exit status that is not 0 when it could not serve, and never without an end."""

from __future__ import annotations

import asyncio
import logging
import socket
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tokenpool.errors import ConfigError, PoolError

pytestmark = pytest.mark.vllm


class StandInPool:
    """A pool that starts and serves nothing."""

    def __init__(self) -> None:
        self.stops = 0

    async def app(self, *_: Any) -> None: ...

    async def may_listen(self) -> None: ...

    async def start(self) -> None: ...

    async def stop(self) -> None:
        self.stops += 1


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock


def args_of(*flags: str) -> Namespace:
    from tokenpool.serve.launch.flags import parse_serve_flags

    return parse_serve_flags(["org/model", *flags])


def config() -> Any:
    from tokenpool.config import ModelSpec, PoolConfig

    return PoolConfig(models=(ModelSpec(name="m", model="org/model"),), shutdown_timeout_s=1.0)


def test_a_http_server_that_ends_ends_the_pool_with_an_error(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ended it, with or without an exception: the pool is stopped and its reason raised."""
    from tokenpool.serve.pool import http_loop

    for raised, words in ((OSError("no certificate"), "OSError: no certificate"), (None, "without an error")):
        pool = StandInPool()

        async def answer(*_: Any, raised: Exception | None = raised) -> None:
            await asyncio.sleep(0.01)
            if raised:
                raise raised

        monkeypatch.setattr(http_loop, "_answer", answer)
        plans: Any = [SimpleNamespace(args=args_of())]
        with pytest.raises(PoolError, match=words):
            http_loop.run(config(), plans, lambda outer, pool=pool: pool, listening, announce=False)  # type: ignore[misc]
        assert pool.stops


def test_a_certificate_that_cannot_be_used_is_refused_before_models_load(
    listening: socket.socket, tmp_path: Path
) -> None:
    """A file that is not there, or is none, is an error of the setting; no pool is made."""
    from tokenpool.serve.pool import http_loop

    (tmp_path / "text").write_text("no certificate")

    def make(outer: Any) -> Any:
        raise AssertionError("nothing is started")

    for path in (tmp_path / "none", tmp_path / "text"):
        plans: Any = [SimpleNamespace(args=args_of("--ssl-certfile", str(path), "--ssl-keyfile", str(path)))]
        with pytest.raises(ConfigError, match="--ssl-certfile"):
            http_loop.run(config(), plans, make, listening)


def test_the_address_names_the_protocol(listening: socket.socket, caplog: pytest.LogCaptureFixture) -> None:
    """https where TLS is on."""
    from tokenpool.serve.pool.http_loop import log_address

    caplog.set_level(logging.INFO)
    for flags, scheme in ((), "http"), (("--ssl-certfile", "c", "--ssl-keyfile", "k"), "https"):
        plans: Any = [SimpleNamespace(args=args_of(*flags))]
        log_address(plans, listening)
        assert f"on {scheme}://127.0.0.1:" in caplog.records[-1].getMessage()
