# SPDX-License-Identifier: Apache-2.0
"""Sound that is transcribed as it comes (/v1/realtime), by a real model, beside streams of another one.

A session's request waits in the engine for more of its input, while its model's weights and KV leave the device.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import websockets

from bench.parts import common
from tests.helpers.inputs.realtime_model import SAMPLE_RATE, SEGMENT_S, make_realtime_model
from tests.helpers.server import ENV, START_LIMIT_S, PoolServerProcess, poll
from tokenpool.demo.tiny_models import make_tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

KEY, ADMIN_KEY = "test-api-key-0123", "test-admin-key-0123"
ARGS = {"max_model_len": 1024, "enforce_eager": True, "dtype": "float32", "block_size": 32}
SECONDS = (3.0, SEGMENT_S + 2.0, 2 * SEGMENT_S + 1.5)
"""Sound of a session's utterances: one piece, two and three for the model."""
CHUNK_BYTES = SAMPLE_RATE  # half a second
LIMIT_S = 120.0
SESSIONS = range(3)


def sound(seed: int, seconds: float) -> bytes:
    draw, times = np.random.default_rng(seed), np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    tone = 8000 * np.sin(2 * np.pi * (200 + 50 * seed) * times) + 1000 * draw.standard_normal(len(times))
    return tone.astype(np.int16).tobytes()


class Session:
    """One connection to /v1/realtime."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket

    async def say(self, **event: Any) -> None:
        await self._socket.send(json.dumps(event))

    async def hear(self) -> dict[str, Any]:
        return json.loads(await asyncio.wait_for(self._socket.recv(), LIMIT_S))

    async def append(self, pcm: bytes, pause_s: float = 0.0) -> None:
        for at in range(0, len(pcm), CHUNK_BYTES):
            audio = base64.b64encode(pcm[at : at + CHUNK_BYTES]).decode()
            await self.say(type="input_audio_buffer.append", audio=audio)
            await asyncio.sleep(pause_s)

    async def utter(self, pcm: bytes, pause_s: float = 0.0) -> dict[str, Any]:
        """Send sound as one utterance; returns the event that ends it, and checks the deltas before it."""
        await self.say(type="input_audio_buffer.commit")
        await self.append(pcm, pause_s)
        await self.say(type="input_audio_buffer.commit", final=True)
        return await self.end()

    async def end(self) -> dict[str, Any]:
        text = ""
        while (event := await self.hear())["type"] == "transcription.delta":
            text += event["delta"]
        assert event["type"] != "transcription.done" or event["text"] == text
        return event


@asynccontextmanager
async def session(url: str) -> AsyncIterator[Session]:
    headers = {"Authorization": f"Bearer {KEY}"}
    address = f"{url.replace('http', 'ws', 1)}/v1/realtime?model=ear"
    async with websockets.connect(address, additional_headers=headers, max_size=None) as socket:
        talk = Session(socket)
        assert (await talk.hear())["type"] == "session.created"
        await talk.say(type="session.update", model="ear")
        yield talk


async def transcribe(url: str, seed: int, pause_s: float = 0.0) -> list[dict[str, Any]]:
    """The ends of one session's utterances."""
    async with session(url) as talk:
        return [await talk.utter(sound(seed + number, s), pause_s) for number, s in enumerate(SECONDS)]


async def complete_until(url: str, number: int, over: asyncio.Event) -> set[str]:
    """Texts of the other model, one after another."""
    body = {"model": "text", "prompt": [5, 6, 7, number], "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    texts = set()
    async with httpx.AsyncClient(timeout=LIMIT_S, headers={"Authorization": f"Bearer {KEY}"}) as client:
        while not over.is_set():
            answer = await client.post(f"{url}/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            texts.add(answer.json()["choices"][0]["text"])
    return texts


@pytest.fixture(scope="module")
def ear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_realtime_model(tmp_path_factory.mktemp("models") / "ear")


@pytest.fixture(scope="module")
def plain(ear: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What plain `vllm serve` makes of the sessions."""
    flags = [word for key, value in ARGS.items() for word in _flag(key, value)]
    words = [*common.PLAIN, "--model", str(ear), "--served-model-name", "ear", "--kv-cache-memory-bytes", str(64 << 20)]
    log = tmp_path_factory.mktemp("plain") / "log"
    with closing(common.Server([*words, *flags], ["ear"], log, **ENV)) as server:
        common.wait_until_ready([server], START_LIMIT_S)
        return asyncio.run(_transcribe_all(f"http://127.0.0.1:{server.port}"))


def _flag(key: str, value: Any) -> list[str]:
    name = f"--{key.replace('_', '-')}"
    return [name] if value is True else [name, str(value)]


async def _transcribe_all(url: str, pause_s: float = 0.0) -> list[list[dict[str, Any]]]:
    return list(await asyncio.gather(*(transcribe(url, seed, pause_s * seed) for seed in SESSIONS)))


@pytest.fixture(scope="module")
def server(ear: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolServerProcess]:
    """The weights of both models and the KV of one request do not fit at once."""
    text = make_tiny_model("llama", tmp_path_factory.mktemp("models") / "text")
    pool = {
        "models": [
            {"name": "ear", "model": str(ear), "args": ARGS},
            {"name": "text", "model": str(text), "args": ARGS | {"max_model_len": 512}},
        ],
        "device_memory": "5632KiB",
        "page_size": "256KiB",
        "weights": "movable",
        "host_memory": "64MiB",
        "api_key": KEY,
        "admin_key": ADMIN_KEY,
    }
    with PoolServerProcess(pool) as server:
        yield server


def test_transcripts_are_those_of_plain_vllm(server: PoolServerProcess, plain: list[list[dict[str, Any]]]) -> None:
    """Sessions pause for longer than the other model's turns, so weights and KV leave while they wait for input."""
    before = server.state()["host"]["residency"]["weight_evictions"]

    async def play() -> tuple[list[list[dict[str, Any]]], list[set[str]]]:
        over = asyncio.Event()
        texts = [asyncio.create_task(complete_until(server.base_url, number, over)) for number in range(3)]
        heard = await _transcribe_all(server.base_url, pause_s=0.1)
        over.set()
        return heard, list(await asyncio.gather(*texts))

    heard, texts = asyncio.run(play())
    assert all(end["type"] == "transcription.done" and end["text"] for ends in plain for end in ends)
    assert heard == plain
    assert [len(found) for found in texts] == [1, 1, 1]
    assert server.state()["host"]["residency"]["weight_evictions"] > before
    server.wait_until_idle()


def test_nothing_is_left_of_who_goes(server: PoolServerProcess, plain: list[list[dict[str, Any]]]) -> None:
    """Before the first sound, while the model waits for more, and while it speaks; also without a word of farewell."""

    async def leave(number: int) -> None:
        async with session(server.base_url) as talk:
            await talk.say(type="input_audio_buffer.commit")
            if number:
                await talk.append(sound(number, 2 * SEGMENT_S))
            if number > 1:
                await talk.hear()
            if number > 2:
                talk._socket.transport.abort()

    async def play() -> None:
        await asyncio.gather(*(leave(number) for number in (0, 1, 2, 3)))

    asyncio.run(play())
    server.wait_until_idle()
    poll(lambda: server.state()["models"]["ear"]["inflight"], until=lambda count: count == 0)
    assert asyncio.run(transcribe(server.base_url, 0)) == plain[0]


def test_a_session_outlives_its_host(server: PoolServerProcess, plain: list[list[dict[str, Any]]]) -> None:
    """The utterance that the dead host had ends with an error event; the next one is transcribed."""
    pid = server.host_pid

    async def play() -> tuple[dict[str, Any], dict[str, Any]]:
        async with session(server.base_url) as talk:
            await talk.say(type="input_audio_buffer.commit")
            await talk.append(sound(0, SEGMENT_S + 1))
            assert (await talk.hear())["type"] == "transcription.delta"
            os.kill(pid, signal.SIGKILL)
            lost = await talk.end()
            return lost, await talk.utter(sound(0, SECONDS[0]))

    lost, found = asyncio.run(play())
    assert lost["type"] == "error" and lost["code"] == "processing_error"
    assert found == plain[0][0]
    assert server.host_pid != pid
    server.wait_until_idle()


def test_models_that_transcribe_nothing_say_so(server: PoolServerProcess) -> None:
    async def ask() -> int:
        try:
            address = f"{server.base_url.replace('http', 'ws', 1)}/v1/realtime?model=text"
            async with websockets.connect(address, additional_headers={"Authorization": f"Bearer {KEY}"}) as socket:
                await asyncio.wait_for(socket.recv(), LIMIT_S)
        except websockets.InvalidStatus as refused:
            return refused.response.status_code
        return 0

    assert asyncio.run(ask()) in (403, 404)
