# SPDX-License-Identifier: Apache-2.0
"""A killed host loses no accepted request: every stream goes on, as if nothing had happened, once the host is back."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from typing import Any

import httpx
import pytest

from tests.conftest import LORA_NAME
from tests.helpers.server import PoolServerProcess, poll

pytestmark = pytest.mark.vllm

NUM_TOKENS = 440
PROMPT = "hello world, this is a test of"  # below one block: a second run finds nothing in the prefix cache
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "minLength": 150}, "b": {"type": "integer"}}}
GREEDY: dict[str, Any] = {"temperature": 0}
RUNNING: dict[str, dict[str, Any]] = {
    "greedy": {"model": "llama", **GREEDY},
    "adapter": {"model": LORA_NAME, **GREEDY},
    "windowed": {"model": "gemma3", **GREEDY},
    "seeded": {"model": "qwen2", "temperature": 1, "seed": 5},
    "two of one": {"model": "llama", "temperature": 1, "seed": 6, "n": 2},
    "logprobs": {"model": "qwen2", "logprobs": 2, **GREEDY},
    "penalties": {"model": "llama", "presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2}
    | GREEDY,
    "schema": {"model": "llama", "temperature": 1, "seed": 9, "ignore_eos": False, "max_tokens": 400}
    | {"structured_outputs": {"json": SCHEMA | {"required": ["a", "b"]}}},
    "not streamed": {"model": "qwen2", "stream": False, "stream_options": None, **GREEDY},
}
"""Requests that have got tokens when the host dies."""
NOT_BEGUN: dict[str, dict[str, Any]] = {
    "late": {"model": "qwen2", "temperature": 1, "seed": 4, "max_tokens": 20},
    "late schema": {"model": "llama", "temperature": 1, "seed": 9, "structured_outputs": {"choice": ["yes", "no"]}},
}
"""Requests that the host has not begun when it dies."""


class Call:
    """A completion, read on a thread of its own."""

    def __init__(self, server: PoolServerProcess, **options: Any) -> None:
        body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True, **options}
        body.setdefault("stream_options", {"include_usage": True})
        self._client = httpx.Client(timeout=180)
        self._request = self._client.build_request(
            "POST", f"{server.base_url}/v1/completions", json=body, headers=server.headers(server.api_key)
        )
        self._is_streamed = body["stream"]
        self.events: list[dict[str, Any]] = []
        self._began = threading.Event()
        self.status = 0
        self._response: httpx.Response | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        self._response = response = self._client.send(self._request, stream=True)
        self.status = response.status_code
        try:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    self.events.append(json.loads(line[6:]))
                    self._began.set()
                elif line.startswith("{"):
                    self.events.append(json.loads(line))
        except (httpx.StreamError, httpx.TransportError):
            pass  # cancelled

    def wait_until_begun(self) -> None:
        """Wait for the first token, of a stream."""
        assert not self._is_streamed or self._began.wait(60)

    @property
    def running(self) -> bool:
        """Whether the answer is not complete yet."""
        return self._thread.is_alive()

    def cancel(self) -> None:
        """Hang up at once, as the end of a client's process does; to close the client would wait for its reader."""
        assert self._response is not None
        self._response.extensions["network_stream"].get_extra_info("socket").shutdown(socket.SHUT_RDWR)

    def result(self) -> dict[str, Any]:
        """Wait for the end and return all that the client was told, pieces put together."""
        self._thread.join(180)
        assert not self.running
        choices: dict[int, dict[str, Any]] = {}
        for event in self.events:
            for part in event.get("choices", ()):
                choice = choices.setdefault(part["index"], {"text": "", "logprobs": [], "finish_reason": None})
                choice["text"] += part["text"]
                choice["finish_reason"] = part["finish_reason"] or choice["finish_reason"]
                if part["logprobs"]:
                    choice["logprobs"] += part["logprobs"]["token_logprobs"]
        errors = [event["error"] for event in self.events if "error" in event]
        return {"status": self.status, "choices": choices, "usage": self.events[-1].get("usage"), "errors": errors}


def results(calls: dict[str, Call]) -> dict[str, dict[str, Any]]:
    return {name: call.result() for name, call in calls.items()}


def embedding(server: PoolServerProcess) -> list[dict[str, Any]]:
    body = {"model": "embed", "input": "x"}
    headers = server.headers(server.api_key)
    return httpx.post(f"{server.base_url}/v1/embeddings", json=body, headers=headers, timeout=180).json()["data"]


def load(server: PoolServerProcess) -> int:
    return server.request("GET", "/load").json()["server_load"]


def stop_in_the_middle(server: PoolServerProcess, pid: int, requests: list[dict[str, Any]]) -> list[Call]:
    """Calls that all have begun and none of which has ended when the host stops; on a busy machine the first try may
    come too late."""
    for _ in range(5):
        calls = [Call(server, **options) for options in requests]
        for call in calls:
            call.wait_until_begun()
        os.kill(pid, signal.SIGSTOP)
        if all(call.running for call in calls):
            return calls
        os.kill(pid, signal.SIGCONT)
        for call in calls:
            call.result()
    raise AssertionError("calls end before all have begun: they show nothing")


def test_a_killed_host_loses_no_request(pool_server: PoolServerProcess) -> None:
    """Tokens, logprobs, finish reasons and usage of all calls are those of an undisturbed run.

    Meanwhile new requests get 503, and a client that hangs up is let go.
    """
    before = pool_server.wait_until_idle()
    alone = results({name: Call(pool_server, **options) for name, options in (RUNNING | NOT_BEGUN).items()})
    assert {200} == {result["status"] for result in alone.values()}, alone
    vector = embedding(pool_server)
    text = alone["greedy"]["choices"][0]["text"]
    stop = next(text[i : i + 8] for i in range(len(text) * 2 // 3, len(text)) if text.find(text[i : i + 8]) == i)

    *calls, given_up = stop_in_the_middle(
        pool_server,
        before["host_pid"],
        [*RUNNING.values(), RUNNING["greedy"] | {"stop": stop}, {"model": "gemma3", **GREEDY}],
    )
    calls = dict(zip([*RUNNING, "stop string"], calls, strict=True))
    calls |= {name: Call(pool_server, **options) for name, options in NOT_BEGUN.items()}
    embedded: list[Any] = []
    embedder = threading.Thread(target=lambda: embedded.append(embedding(pool_server)))
    embedder.start()
    poll(lambda: load(pool_server), until=lambda count: count == len(calls) + 2)
    os.kill(before["host_pid"], signal.SIGKILL)

    poll(lambda: httpx.get(f"{pool_server.base_url}/ready").status_code, until=lambda status: status == 503)
    refused = pool_server.request("POST", "/v1/completions", json={"model": "llama", "prompt": "x"})
    assert (503, True) == (refused.status_code, int(refused.headers["retry-after"]) >= 1)
    assert 200 == httpx.get(f"{pool_server.base_url}/health").status_code
    given_up.cancel()
    poll(lambda: load(pool_server), until=lambda count: count == len(calls) + 1)

    got = results(calls)
    embedder.join(180)
    stopped = got.pop("stop string")["choices"][0]
    assert alone == got
    assert (text[: text.find(stop)], "stop") == (stopped["text"], stopped["finish_reason"])
    assert [vector] == embedded
    pool_server.wait_until_ready(120)
    after = pool_server.wait_until_idle()
    assert before["host_pid"] != after["host_pid"]
    assert before["host_restarts"] + 1 == after["host_restarts"]
    assert list(before["models"]) == list(after["models"])
