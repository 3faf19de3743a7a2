# SPDX-License-Identifier: Apache-2.0
"""`tokenpool drain` and `tokenpool logs`: what they ask a running server, with which key, and what they print."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cli.asked_server import AskedFor, asked_server
from tokenpool.cli.main import run
from tokenpool.cli.running import drain
from tokenpool.errors import PoolError

pytestmark = pytest.mark.cpu


class Asked(list[tuple[str, str, Any]]):
    """(path, key, body) of each request; answers are taken from the front."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, bytes]] = []


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    requests = Asked()

    def answer(asked_for: AskedFor) -> tuple[int, bytes]:
        requests.append((asked_for.path, asked_for.key, asked_for.body))
        return requests.answers.pop(0)

    with asked_server(answer) as url:
        monkeypatch.setenv("TOKENPOOL_URL", url)
        monkeypatch.setenv("TOKENPOOL_VIEW_KEY", "view")
        monkeypatch.setenv("TOKENPOOL_ADMIN_KEY", "admin")
        monkeypatch.setattr(drain, "_LOOK_S", 0.0)
        yield requests


def left(*models: str) -> tuple[int, bytes]:
    return 200, json.dumps({"host": "h", "draining": True, "models": models}).encode()


def test_drain_waits_until_the_host_is_empty(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    asked.answers = [left("a", "b"), left("b"), left()]
    assert run(["drain", "pool-host-1"]) == 0
    assert asked == [("/v1/pool/hosts/pool-host-1", "Bearer admin", {"draining": True})] * 3
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("pool-host-1 is empty\n", "pool-host-1 has a, b\n")


def test_what_stays_is_named(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    """With a status that a script sees."""
    asked.answers = [left("a")]
    assert run(["drain", "h", "--wait", "0s"]) == 1
    assert "h still has a" in capsys.readouterr().err


def test_undo_waits_for_nothing(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    asked.answers = [left("a")]
    assert run(["drain", "h", "--undo"]) == 0
    assert asked == [("/v1/pool/hosts/h", "Bearer admin", {"draining": False})]
    assert capsys.readouterr().out == "h is used again\n"


def test_a_refusal_is_told_in_one_line(asked: Asked) -> None:
    asked.answers = [(400, b'{"error": {"message": "there is no host h"}}')]
    with pytest.raises(PoolError, match="answers 400: there is no host h"):
        run(["drain", "h"])


LINES = [{"time_s": 0.0, "level": "INFO", "process": "host", "text": "model ready model=a"}, {"missed": 3}]


def test_logs_are_printed_with_a_view_key(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    text = b"".join(json.dumps(line).encode() + b"\n" for line in LINES)
    asked.answers = [(200, text), (200, text)]
    assert run(["logs", "--model", "org/a", "--lines", "5", "--follow"]) == 0
    assert asked == [("/v1/pool/logs?lines=5&follow=1&model=org%2Fa", "Bearer view", None)]
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(" INFO host: model ready model=a") and second == "... 3 lines were missed"
    assert run(["logs", "--json"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == LINES


def test_a_server_that_refuses_to_tell_its_lines_is_named(asked: Asked) -> None:
    asked.answers = [(401, b'{"error": {"message": "Missing or invalid admin key."}}')]
    with pytest.raises(PoolError, match="answers 401: Missing"):
        run(["logs"])


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `down` asks Ray for; there is a pool named `there`."""
    from tokenpool.cluster import session

    asked: list[Any] = []

    class Session:
        def __init__(self, config: Any, *, owns_ray: bool) -> None:
            self.name = config.name

        def end(self, limit_s: float) -> bool:
            asked.append((self.name, limit_s))
            return self.name == "there"

    monkeypatch.setattr(session, "prepare", asked.append)
    monkeypatch.setattr(session, "connect", lambda address, config, num_hosts: asked.append(address))
    monkeypatch.setattr(session, "Session", Session)
    return asked


def test_down_names_the_pool_by_its_file(ended: list[Any], tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pool.yaml"
    file.write_text("models: [{name: a, model: x/y}]\ncluster: {name: there}\n")
    assert run(["down", str(file), "--wait", "5s"]) == 0
    assert ended == ["auto", "auto", ("there", 5.0)]
    assert capsys.readouterr().out == "pool there has ended\n"


def test_down_without_such_a_pool_is_no_error(ended: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    """It may be said twice, and by a script."""
    assert run(["down", "--name", "none", "--cluster", "10.0.0.1:6379"]) == 0
    assert ended == ["10.0.0.1:6379", "10.0.0.1:6379", ("none", 60.0)]
    assert capsys.readouterr().out == "there is no pool none\n"


@pytest.mark.parametrize("words", [["--cluster", "local"], ["pool.yaml", "--name", "x"], ["--wait", "soon"]])
def test_what_down_cannot_do_is_refused(ended: list[Any], words: list[str]) -> None:
    with pytest.raises(PoolError):
        run(["down", *words])
    assert ended == []
