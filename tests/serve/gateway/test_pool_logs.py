# SPDX-License-Identifier: Apache-2.0
"""`GET /v1/pool/logs`: which lines a reader gets, who may read, and what becomes of one that is slow."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tokenpool import recent_logs
from tokenpool.config import PoolConfig
from tokenpool.errors import HostError
from tokenpool.recent_logs import RecentLines, in_order, is_about
from tokenpool.serve.access.guard import guarded
from tokenpool.serve.access.tenants import TenantBook
from tokenpool.serve.gateway import logs
from tokenpool.serve.gateway.endpoints import build_outer_app
from tokenpool.serve.gateway.logs import Lines
from tokenpool.serve.gateway.router import ModelRouter
from tokenpool.tenant_config import hash_key

pytestmark = pytest.mark.cpu

KEYS = {name: f"{name}-key-0123456789" for name in ("api", "admin", "view", "metrics", "tenant")}
CONFIG = PoolConfig.from_dict(
    {"models": [{"name": "chat", "model": "org/m"}], "api_key": KEYS["api"], "admin_key": KEYS["admin"],
     "view_key": KEYS["view"], "metrics_key": KEYS["metrics"],
     "tenants": [{"name": "t", "keys": hash_key(KEYS["tenant"])}]}
)  # fmt: skip


class Operator:
    """Two processes with lines of their own."""

    def __init__(self) -> None:
        self.processes = [RecentLines(), RecentLines("host")]
        for process in self.processes:
            process.setFormatter(logging.Formatter("%(message)s"))
        self.error: Exception | None = None

    def say(self, text: str, process: int = 0, at_s: float = 0.0) -> None:
        record = logging.LogRecord("x", logging.INFO, "", 0, text, None, None)
        record.created = at_s
        self.processes[process].emit(record)

    async def logs(self, seen: Mapping[str, int]) -> list[dict[str, Any]]:
        if self.error is not None:
            raise self.error
        return in_order([line for process in self.processes for line in process.after(seen)])


def port(operator: Operator) -> Any:
    outer = build_outer_app()
    router = ModelRouter(outer, max_request_bytes=1000)
    outer.state.pool, outer.state.operator = SimpleNamespace(router=router), operator
    return guarded(router, CONFIG, TenantBook.of(CONFIG, None, 0))


def get(operator: Operator, query: str = "", key: str = "view") -> httpx.Response:
    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(port(operator))
        async with httpx.AsyncClient(transport=transport, base_url="http://pool") as client:
            headers = {"x-api-key": KEYS[key]} if key else {}
            return await client.get(f"/v1/pool/logs{query}", headers=headers)

    return asyncio.run(main())


def texts(answer: httpx.Response) -> list[str]:
    return [json.loads(line).get("text", "missed") for line in answer.text.splitlines()]


@pytest.mark.parametrize(
    "text, about",
    [
        ("model ready model=chat seconds=1.00", True), ("model 'chat' is gone", True), ("models=a,chat,b", True),
        ("model not added model=chat: no room", True), ("model=chat.", True), ('the "chat" model', True),
        ("model=chat2", False), ("model=chat-large x", False), ("model=org/chat", False), ("we chat", False),
        ("'chat/x' is gone", False), ("submodel=chat", False), ("models=a,chats,b", False), ("model=chat:7b", False),
    ],
)  # fmt: skip
def test_a_line_is_about_the_model_that_it_names(text, about):
    """And not about one whose name only begins or ends alike."""
    assert is_about({"text": text}, "chat") is about


def test_lines_of_all_processes_by_time_and_of_one_model():
    operator = Operator()
    operator.say("host has model=chat", 1, 2.0)
    operator.say("server begins", 0, 1.0)
    operator.say("server adds model=chat", 0, 3.0)
    assert texts(get(operator)) == ["server begins", "host has model=chat", "server adds model=chat"]
    assert texts(get(operator, "?model=chat")) == ["host has model=chat", "server adds model=chat"]
    assert texts(get(operator, "?model=code")) == []
    assert texts(get(operator, "?lines=1")) == ["server adds model=chat"]
    assert texts(get(operator, "?lines=0")) == []
    line = json.loads(get(operator, "?lines=1").text)
    assert line == {"time_s": 3.0, "level": "INFO", "process": "server", "text": "server adds model=chat"}


@pytest.mark.parametrize(
    "key, status", [("view", 200), ("admin", 200), ("api", 401), ("tenant", 401), ("metrics", 401), ("", 401)]
)
def test_lines_are_for_keys_of_the_pool_alone(key, status):
    """A tenant never sees what another one's requests made the server say."""
    assert get(Operator(), key=key).status_code == status


@pytest.mark.parametrize("lines", ["x", "-1", "1.5", ""])
def test_a_wrong_number_is_refused(lines):
    answer = get(Operator(), f"?lines={lines}")
    assert answer.status_code == 400 and "lines: must be a whole number" in answer.json()["error"]["message"]


def test_a_long_line_and_many_lines_are_bounded():
    operator = Operator()
    operator.say("x" * 100_000 + "the end")
    for i in range(5000):
        operator.say(f"line {i}", 1)
    lines = operator.processes[0].after({}) + operator.processes[1].after({})
    assert len(lines) <= 2001 and max(len(line["text"]) for line in lines) < 2100
    assert lines[0]["text"].endswith("the end")


@pytest.mark.parametrize("seed", range(30))
def test_a_reader_sees_each_line_once_in_order_or_is_told_that_it_missed_some(seed, monkeypatch):
    """However many lines come between two looks, whichever process dies meanwhile."""
    monkeypatch.setattr(recent_logs, "_KEPT", 8)
    rng, operator, said = random.Random(seed), Operator(), 0
    reader, seen = Lines(operator, None, 2000), list[int]()
    missed = asyncio.run(_read(reader, seen))
    for _ in range(rng.randint(1, 12)):
        for _ in range(rng.choice((0, 1, 5, 20))):
            operator.say(str(said), rng.randint(0, 1), float(said))
            said += 1
        if rng.random() < 0.2:  # a host is started again, and what the old one said last is gone with it
            missed += asyncio.run(_read(reader, seen))
            operator.processes[1] = RecentLines("host")
            operator.processes[1].setFormatter(logging.Formatter("%(message)s"))
        if rng.random() < 0.7:
            missed += asyncio.run(_read(reader, seen))
    missed += asyncio.run(_read(reader, seen))
    assert seen == sorted(set(seen))
    assert len(seen) + missed == said


async def _read(reader: Lines, seen: list[int]) -> int:
    missed = 0
    for line in await reader.news():
        if "missed" in line:
            missed += line["missed"]
        else:
            seen.append(int(line["text"]))
    return missed


class Reader:
    """A client of the ASGI app that takes what it is sent until it is told to stop taking."""

    def __init__(self, app: Any, query: bytes = b"follow=1&lines=10") -> None:
        self.app, self.query = app, query
        self.status, self.lines = 0, list[str]()
        self.takes, self.gone, self.news = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.takes.set()

    async def run(self) -> None:
        scope = {
            "type": "http", "method": "GET", "path": "/v1/pool/logs", "query_string": self.query,
            "headers": [(b"x-api-key", KEYS["view"].encode())],
        }  # fmt: skip
        await self.app(scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Mapping[str, Any]) -> None:
        await self.takes.wait()
        self.status = message.get("status", self.status)
        self.lines += [json.loads(line)["text"] for line in message.get("body", b"").splitlines() if self.status == 200]
        self.news.set()


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not reached():
            await asyncio.sleep(0.01)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_LOOK_S", 0.01)


def test_lines_are_followed_until_the_reader_goes(quick):
    async def main() -> None:
        operator = Operator()
        operator.say("old")
        reader = Reader(port(operator))
        reading = asyncio.create_task(reader.run())
        await until(lambda: reader.lines == ["old"])
        operator.error = HostError("busy")
        await asyncio.sleep(0.05)
        operator.error = None
        operator.say("new")
        await until(lambda: reader.lines == ["old", "new"])
        reader.gone.set()
        await asyncio.wait_for(reading, 30)

    asyncio.run(main())


def test_a_reader_that_takes_nothing_is_cut_off(quick, monkeypatch):
    """Its place is free again, and no line waits for it."""
    monkeypatch.setattr(logs, "_SEND_LIMIT_S", 0.05)
    monkeypatch.setattr(logs, "_MOST_READERS", 1)

    async def main() -> None:
        operator = Operator()
        operator.say("old")
        app = port(operator)
        slow = Reader(app)
        reading = asyncio.create_task(slow.run())
        await until(lambda: slow.lines == ["old"])
        second = Reader(app)
        await second.run()
        assert second.status == 429
        slow.takes.clear()
        operator.say("new")
        await asyncio.wait_for(reading, 30)
        third = Reader(app)
        reading = asyncio.create_task(third.run())
        await until(lambda: third.lines == ["old", "new"])
        third.gone.set()
        await asyncio.wait_for(reading, 30)

    asyncio.run(main())


def test_our_own_lines_are_kept(capsys):
    """As they are written to stderr, without the level, which is a field."""
    from tokenpool.logs import log_to_stderr

    before = logging.getLogger("tokenpool").handlers[:]
    try:
        log_to_stderr("host")
        logging.getLogger("tokenpool.x").warning("model gone model=%s", "chat")
        (line,) = recent_logs.recent_lines({})
        assert (line["level"], line["process"], line["text"]) == ("WARNING", "host", "model gone model=chat")
        assert recent_logs.recent_lines({line["source"]: line["number"]}) == []
    finally:
        logging.getLogger("tokenpool").handlers[:] = before
        recent_logs._here.clear()
