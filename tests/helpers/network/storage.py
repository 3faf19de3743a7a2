# SPDX-License-Identifier: Apache-2.0
"""A real Redis, in which a Ray head keeps what the next one needs."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.helpers.network.machines import REPOSITORY, Machine

_PORT = 6380
_OWN_REDIS = REPOSITORY / "build" / "tools" / "redis-server"
"""Made by `make test-cluster`, where Debian's packages can be had."""


def redis_server() -> str | None:
    """The program, where there is one."""
    return shutil.which("redis-server") or (str(_OWN_REDIS) if _OWN_REDIS.exists() else None)


@contextmanager
def redis_on(machine: Machine) -> Iterator[dict[str, str]]:
    """A Redis on a machine, which any other one reaches; gives the environment for Ray's head."""
    if (found := redis_server()) is None:
        pytest.skip("needs redis-server: `make test-cluster` unpacks Debian's, where that can be had")
    words = ["--port", str(_PORT), "--bind", machine.address, "--protected-mode", "no", "--save", "", "--dir", "/tmp"]
    process = subprocess.Popen([*machine.enter, found, *words], stdout=subprocess.DEVNULL)
    try:
        yield {"RAY_REDIS_ADDRESS": f"{machine.address}:{_PORT}"}
    finally:
        process.kill()
        process.wait()
