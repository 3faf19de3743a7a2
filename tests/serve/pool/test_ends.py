# SPDX-License-Identifier: Apache-2.0
"""How a server ends: an exit status that is not 0 when it could not serve, and never without an end."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import os
import signal
import socket
import threading
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


def test_who_reads_slowly_has_the_whole_limit_of_the_end(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is computed and the pool has stopped: what is left of an answer is sent for as long as the limit says."""
    from tokenpool.serve.pool import http_loop

    size, chunk = 64 << 20, b"x" * (1 << 20)
    pool, ended, got = StandInPool(), threading.Event(), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
        for _ in range(size // len(chunk)):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    def read() -> None:
        client = http.client.HTTPConnection(*listening.getsockname(), timeout=60)
        client.request("GET", "/v1/completions")
        response = client.getresponse()
        os.kill(os.getpid(), signal.SIGTERM)
        ended.wait(3.0)  # more than what is left when the limit has passed; it ends before only if that cuts it
        with contextlib.suppress(OSError, http.client.HTTPException):
            while piece := response.read(1 << 20):
                got.append(len(piece))

    listening.listen()
    pool.app = app  # type: ignore[method-assign]
    plans: Any = [SimpleNamespace(args=args_of())]
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    http_loop.run(replace(config(), shutdown_timeout_s=60.0), plans, lambda outer: pool, listening, announce=False)  # type: ignore[arg-type, return-value]
    ended.set()
    reader.join(60)
    assert sum(got) == size


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


class Gated:
    """A model whose calls go on when the test says so; in between they are at an engine or not."""

    def __init__(self) -> None:
        from tests.helpers.stand_ins import plan_of
        from tokenpool.serve.access.stored_responses import keep_apart
        from tokenpool.serve.client.model_client import ModelClient

        self.states: dict[int, Any] = {}
        processor = SimpleNamespace(request_states=self.states, get_num_unfinished_requests=lambda: len(self.states))
        engine: Any = SimpleNamespace(output_processor=processor)
        core: Any = SimpleNamespace()
        self.client = ModelClient(plan_of("a"), core, engine, {})
        self.app = SimpleNamespace(inflight=0)
        serving = SimpleNamespace(background_tasks={})
        keep_apart(serving)
        self.tasks = serving.background_tasks
        self.client.app = SimpleNamespace(state=SimpleNamespace(openai_serving_responses=serving))
        self.gates: dict[int, asyncio.Event] = {}

    async def call(self, number: int, phases: list[str]) -> None:
        """One call into the model's app; each phase lasts until its gate is opened.

        Of one that is to be answered in the background the rest goes on behind it.
        """
        own, _, rest = " ".join(phases).partition("background")
        self.app.inflight += 1
        await self._run(number, own.split())
        if rest:
            self.tasks[f"resp-{number}"] = asyncio.create_task(self._run(number, rest.split()))
        self.app.inflight -= 1

    async def _run(self, number: int, phases: list[str]) -> None:
        for phase in phases:
            gate = self.gates[number] = asyncio.Event()
            if phase == "engine":
                self.states[number] = None
            await gate.wait()
            self.states.pop(number, None)
            del self.gates[number]


async def settle() -> None:
    """Let all tasks get to where they wait."""
    for _ in range(10):
        await asyncio.sleep(0)


@given(
    st.lists(st.lists(st.sampled_from(["beside", "engine", "background"]), min_size=1, max_size=5), max_size=4),
    st.data(),
)
def test_a_drain_ends_with_the_last_call(calls: list[list[str]], data: st.DataObject) -> None:
    """Whatever each does in turn: read a prompt, wait for an engine, call a tool, go on in the background."""
    from tokenpool.process import ending
    from tokenpool.serve.client import model_client

    async def test() -> None:
        model = Gated()
        tasks = [asyncio.create_task(model.call(number, phases)) for number, phases in enumerate(calls)]
        await settle()
        draining = asyncio.create_task(ending.let_finish(model, 600.0))
        await settle()
        while model.gates:
            assert not draining.done(), calls
            model.gates[data.draw(st.sampled_from(sorted(model.gates)))].set()
            await settle()
        assert draining.done() and all(task.done() for task in tasks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ending, "_LOOK_S", 0)
        patch.setattr(model_client, "_LOOK_S", 0)
        asyncio.run(test())


def test_a_response_in_the_background_ends_with_the_limit() -> None:
    """It would ask the engine again, once its last request there was aborted."""
    from tokenpool.process import ending

    async def test() -> None:
        model = Gated()

        async def abort(ids: list[int], internal: bool) -> None:
            assert ids == [] and internal

        model.client.engine.abort = abort  # type: ignore[method-assign, assignment]
        await model.call(0, ["background", "beside"])
        (task,) = model.client._made_beside()
        async with asyncio.timeout(30):
            await ending.let_finish(model, 0.0)
        assert task.cancelled() and model.client.num_unfinished == 0

    asyncio.run(test())


@pytest.mark.parametrize("ends", ["removal", "stop"])
def test_a_prompt_that_is_still_read_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str) -> None:
    """A request that was taken in has its answer, also when no engine had it as its model was removed or all ended."""
    from tests.helpers.stand_ins import stand_in_pool
    from tests.serve.pool.test_demand import Asked

    async def test() -> None:
        async with stand_in_pool(monkeypatch, tmp_path, shutdown_timeout_s=60.0) as world:
            await world.pool.start()
            client, app = world.client("a"), world.pool.models["a"].app
            reading, is_read = asyncio.Event(), asyncio.Event()

            async def read_first(*call: Any) -> None:
                reading.set()
                await is_read.wait()
                await client.app(*call)

            app.app = read_first
            asked = Asked(world, "a")
            await reading.wait()
            work = world.operator.remove_model("a", 60.0) if ends == "removal" else world.pool.stop()
            ending = asyncio.create_task(work)
            await asyncio.wait({ending}, timeout=0.2)
            is_read.set()
            assert await asked.status() == 200
            await ending

    asyncio.run(test())


def test_a_request_that_is_still_sent_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection was taken before the server began to end: it is read, and then its model is there."""
    from tests.helpers.stand_ins import stand_in_pool
    from tests.serve.gateway.test_router import CHAT, make_scope

    async def test() -> None:
        async with stand_in_pool(monkeypatch, tmp_path, shutdown_timeout_s=60.0) as world:
            await world.pool.start()
            reading, is_sent, statuses = asyncio.Event(), asyncio.Event(), []
            body = json.dumps({"model": "a", "id": "a-0"}).encode()

            async def receive() -> dict[str, Any]:
                reading.set()
                await is_sent.wait()
                return {"type": "http.request", "body": body}

            async def send(message: dict[str, Any]) -> None:
                statuses.append(message.get("status"))

            scope = make_scope(CHAT, {"content-length": str(len(body)), "content-type": "application/json"})
            asking = asyncio.create_task(world.pool.router(scope, receive, send))
            await reading.wait()
            ending = asyncio.create_task(world.pool.stop())
            await asyncio.wait({ending}, timeout=0.2)
            is_sent.set()
            await asking
            assert statuses[0] == 200
            await ending

    asyncio.run(test())


def test_a_call_that_never_ends_costs_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than that: a client that does not read its answer keeps no model."""
    from tests.helpers.stand_ins import stand_in_pool
    from tests.serve.pool.test_demand import Asked

    async def test() -> None:
        async with stand_in_pool(monkeypatch, tmp_path) as world:
            await world.pool.start()
            reading = asyncio.Event()

            async def never(*_: Any) -> None:
                reading.set()
                await asyncio.Event().wait()

            world.pool.models["a"].app.app = never
            asked = Asked(world, "a")
            await reading.wait()
            async with asyncio.timeout(60):
                await world.operator.remove_model("a", 0.05)
            assert "a" not in world.states
            asked.task.cancel()

    asyncio.run(test())
