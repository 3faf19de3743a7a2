# SPDX-License-Identifier: Apache-2.0
"""Several vLLM servers on one GPU behind one port, one awake at a time: what a pool is without tokenpool.

A request for a model that sleeps waits until its server is awake. The awake server goes to sleep (level 1, `keep`:
weights to host memory, KV thrown away, running requests computed again after waking) once it has nothing to do or has
had its quantum, and the model that has waited longest wakes. It tells of itself as tokenpool does: `/load`, and
`/v1/pool/state` with the number of switches and the seconds that they took.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from aiohttp import web

if not __package__:  # run as a script: only bench/gpu itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.parts import common

SLEEP, WAKE = "/sleep?level=1&mode=keep", "/wake_up"


@dataclass(slots=True)
class _Model:
    port: int
    requests: int = 0
    """Not yet answered in full."""
    waits_since: float | None = None
    """Since when it has requests and is asleep."""
    awake: asyncio.Event = field(default_factory=asyncio.Event)


class Router:
    """`ports` of the servers by model, all asleep; `quantum_s` that a model keeps the device while others wait."""

    def __init__(self, ports: Mapping[str, int], quantum_s: float, session: aiohttp.ClientSession) -> None:
        self._models = {name: _Model(port) for name, port in ports.items()}
        self._quantum_s, self._session = quantum_s, session
        self._changed = asyncio.Event()
        self.numbers: dict[str, float] = {"switches": 0, "residency.switches": 0, "residency.visible_seconds": 0}

    def app(self) -> web.Application:
        """What to serve."""
        app = web.Application()
        app.router.add_post("/v1/completions", self._complete)
        told: dict[str, Callable[[], object]] = {
            "/health": dict,
            "/v1/models": lambda: {"data": [{"id": name} for name in self._models]},
            "/load": lambda: {"server_load": sum(model.requests for model in self._models.values())},
            "/v1/pool/state": lambda: {"host": self.numbers},
        }

        async def tell(request: web.Request) -> web.Response:
            return web.json_response(told[request.path]())

        for path in told:
            app.router.add_get(path, tell)
        return app

    async def take_turns(self) -> None:
        """Wake and put to sleep, for ever."""
        awake: _Model | None = None
        since = 0.0
        while True:
            self._changed.clear()
            waiting = [model for model in self._models.values() if model.waits_since is not None]
            left_s = since + self._quantum_s - time.monotonic() if awake and awake.requests else 0.0
            if waiting and left_s <= 0:
                following = min(waiting, key=lambda model: model.waits_since or 0.0)
                await self._switch(awake, following)
                awake, since = following, time.monotonic()
                continue
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left_s if waiting else None)

    async def _switch(self, awake: _Model | None, following: _Model) -> None:
        start = time.monotonic()
        if awake is not None:
            awake.awake.clear()
            await self._post(awake.port, SLEEP)
            awake.waits_since = start if awake.requests else None
        await self._post(following.port, WAKE)
        following.waits_since = None
        following.awake.set()
        self.numbers["switches"] += 1
        self.numbers["residency.switches"] += 1
        self.numbers["residency.visible_seconds"] += time.monotonic() - start

    async def _post(self, port: int, path: str) -> None:
        async with self._session.post(f"http://127.0.0.1:{port}{path}") as response:
            response.raise_for_status()

    @asynccontextmanager
    async def _request_of(self, model: _Model) -> AsyncIterator[None]:
        model.requests += 1
        if not model.awake.is_set() and model.waits_since is None:
            model.waits_since = time.monotonic()
        self._changed.set()
        try:
            await model.awake.wait()
            yield
        finally:
            model.requests -= 1
            if not model.requests:
                model.waits_since = None
            self._changed.set()

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        model = self._models.get(body.get("model"))
        if model is None:
            return web.json_response({"error": f"no model {body.get('model')!r}"}, status=404)
        async with self._request_of(model):
            url = f"http://127.0.0.1:{model.port}/v1/completions"
            async with self._session.post(url, json=body) as answer:
                response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
                await response.write_eof()
                return response


async def serve(ports: Mapping[str, int], quantum_s: float, host: str, port: int) -> None:
    """Serve until cancelled, or until a server does not wake or sleep when told: then raise its error."""
    limits = aiohttp.ClientTimeout(total=1800)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=limits) as session:
        router = Router(ports, quantum_s, session)
        runner = web.AppRunner(router.app(), handler_cancellation=True)  # a client that leaves frees its server
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
            await router.take_turns()
        finally:
            await runner.cleanup()


def start(ports: Mapping[str, int], quantum_s: float, log: Path) -> common.Server:
    """A router process for servers that are all asleep."""
    models = [f"{name}={port}" for name, port in ports.items()]
    return common.Server([__file__, "--quantum-s", str(quantum_s), *models], list(ports), log)


def main() -> None:
    """Read the flags, serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=PORT", help="servers on this machine, all asleep")
    parser.add_argument("--quantum-s", type=float, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    flags = parser.parse_args()
    ports = {name: int(port) for name, _, port in (word.rpartition("=") for word in flags.models)}
    asyncio.run(serve(ports, flags.quantum_s, flags.host, flags.port))


if __name__ == "__main__":
    main()
