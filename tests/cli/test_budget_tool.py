# SPDX-License-Identifier: Apache-2.0
"""`tokenpool budget`: what it asks the server, with which key, and what it prints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cli.asked_server import AskedFor, asked_server
from tokenpool.cli.main import run
from tokenpool.errors import ConfigError, PoolError

pytestmark = pytest.mark.cpu

STATE = {
    "parked": False,
    "device_memory": 8 << 30,
    "host_memory": 16 << 30,
    "device_memory_least": 3 << 30,
    "device_memory_most": 24 << 30,
    "device_held": {"weights": {"a": 2 << 30}},
    "host_held": {"paused_kv": {"b": 5 << 20}},
    "node": {"used_bytes": 3 << 30, "budget_bytes": 16 << 30, "hosts": 2},
    "asleep": {"b": 1},
}


class Asked(list[tuple[str, str, Any]]):
    """(method, key, body) of each request."""

    url = ""
    status = 200


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    requests = Asked()

    def answer(asked_for: AskedFor) -> tuple[int, bytes]:
        assert asked_for.path == "/v1/pool/budget"
        requests.append((asked_for.method, asked_for.key, asked_for.body))
        said = STATE if requests.status == 200 else {"error": {"message": "KV of a stays"}}
        return requests.status, json.dumps(said).encode()

    with asked_server(answer) as requests.url:
        monkeypatch.setenv("TOKENPOOL_URL", requests.url)
        monkeypatch.setenv("TOKENPOOL_VIEW_KEY", "view")
        monkeypatch.setenv("TOKENPOOL_ADMIN_KEY", "admin")
        yield requests


def test_without_a_size_it_shows_the_budget(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    """A view key is enough; the lines have the bounds, and who holds what."""
    assert 0 == run(["budget"])
    assert [("GET", "Bearer view", None)] == asked
    lines = capsys.readouterr().out.splitlines()
    assert "device memory  8GiB (0, or 3GiB to 24GiB)" == lines[0]
    assert [["weights", "2GiB", "a"], ["paused_kv", "5MiB", "b"]] == [line.split() for line in (lines[1], lines[3])]
    assert "host memory    16GiB" == lines[2]
    assert "node           3GiB of 16GiB, shared by 2 hosts" == lines[4]
    assert "asleep         b, level 1" == lines[5]


def test_sizes_are_sent_with_the_admin_key(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    """Both or one; `--json` prints the server's answer as it is."""
    assert 0 == run(["budget", "--device-memory", "0", "--host-memory", "1GiB", "--json"])
    assert STATE == json.loads(capsys.readouterr().out)
    assert 0 == run(["budget", "--host-memory", "1GiB"])
    sent: list[Any] = [{"device_memory": 0, "host_memory": 1 << 30}, {"host_memory": 1 << 30}]
    assert [("POST", "Bearer admin", body) for body in sent] == asked


def test_what_is_wrong_is_one_line(asked: Asked) -> None:
    """A size that is none is refused before the server is asked; what the server refuses is passed on."""
    with pytest.raises(ConfigError, match="^--device-memory: '8G' is no size"):
        run(["budget", "--device-memory", "8G"])
    assert not asked
    asked.status = 507
    with pytest.raises(PoolError, match="answers 507: KV of a stays$"):
        run(["budget", "--device-memory", "8GiB"])
