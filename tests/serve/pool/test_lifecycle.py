# SPDX-License-Identifier: Apache-2.0
"""Models that come and go at run time."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import LORA_NAME, TinyModels
from tests.helpers.server import TINY_ARGS, PoolServerProcess, poll

pytestmark = pytest.mark.vllm

LONG = 480
"""Tokens that take the engine about two seconds: far longer than anything a test does while they come."""
SHORT_PROMPT = "hello"  # below one block: a second run finds nothing in the prefix cache and computes the same


class Stream:
    """An open streamed completion, read step by step."""

    def __init__(self, server: PoolServerProcess, model: str, max_tokens: int = LONG) -> None:
        body = {"model": model, "prompt": SHORT_PROMPT, "max_tokens": max_tokens, "temperature": 0}
        body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        self._client = httpx.Client(timeout=120)
        request = self._client.build_request(
            "POST", f"{server.base_url}/v1/completions", json=body, headers=server.headers(server.api_key)
        )
        self._response = self._client.send(request, stream=True)
        self.status = self._response.status_code
        self._lines = self._response.iter_lines()
        self.events: list[dict[str, Any]] = []
        self.done = False

    def read_one(self) -> None:
        """Read until one more event is here; sets `done` at the end."""
        for line in self._lines:
            if line == "data: [DONE]":
                self.done = True
            elif line.startswith("data: "):
                self.events.append(json.loads(line[6:]))
                return

    def read_all(self) -> None:
        """Read to the end of the response; raises httpx.TransportError when it is cut."""
        for line in self._lines:
            if line == "data: [DONE]":
                self.done = True
            elif line.startswith("data: "):
                self.events.append(json.loads(line[6:]))
        self._client.close()

    @property
    def text(self) -> str:
        return "".join(choice["text"] for event in self.events for choice in event.get("choices", ()))

    @property
    def num_tokens(self) -> int:
        """Tokens told by the last event."""
        return (self.events[-1].get("usage") or {}).get("completion_tokens", 0)


def complete(server: PoolServerProcess, model: str, max_tokens: int = 16) -> str:
    """The text of a whole stream."""
    stream = Stream(server, model, max_tokens)
    stream.read_all()
    assert (200, True, max_tokens) == (stream.status, stream.done, stream.num_tokens), stream.events[-1:]
    return stream.text


@contextmanager
def kept_busy(server: PoolServerProcess, model: str) -> Iterator[list[str]]:
    """Stream one completion after the other for the time of the block; yields their texts, the last at the end."""
    texts: list[str] = []
    stop = threading.Event()
    started = threading.Event()

    def work() -> None:
        while not stop.is_set():
            stream = Stream(server, model)
            stream.read_one()
            started.set()
            stream.read_all()
            texts.append(stream.text if stream.done else f"broken: {stream.events[-1:]}")

    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(work)
        try:
            assert started.wait(60)
            yield texts
        finally:
            stop.set()
            future.result(120)


def entry(name: str, path: Path, **args: Any) -> dict[str, Any]:
    return {"name": name, "model": str(path), "args": TINY_ARGS | args}


def add(server: PoolServerProcess, name: str, path: Path) -> None:
    response = server.admin("POST", "/models", entry(name, path))
    assert (201, name) == (response.status_code, response.json().get("name")), response.text


def remove(server: PoolServerProcess, name: str) -> None:
    response = server.admin("DELETE", f"/models/{name}")
    assert (200, {"name": name, "removed": True}) == (response.status_code, response.json())


def books(state: dict[str, Any]) -> dict[str, Any]:
    """What must be the same before and after: pages of weights by model, and pages free or with idle KV."""
    host = state["host"]
    idle = sum(model["kv_idle_pages"] for model in host["models"].values())
    held = host["held_pages"]
    return {
        "free or idle": host["num_free_pages"] + idle,
        "weights": held["weights"],
        "null": held["null"],
        "models": list(host["models"]),
        "served": list(state["models"]),
    }


def num_threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def num_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


# --- models come and go ------------------------------------------------------------------------------------


def test_a_model_is_added_while_another_streams(pool_server: PoolServerProcess, tiny_models: TinyModels) -> None:
    """Adding and removing a model changes no token of another that streams meanwhile, and all pages come back."""
    before = books(pool_server.wait_until_idle())
    alone = complete(pool_server, "qwen2", LONG)
    with kept_busy(pool_server, "qwen2") as texts:
        add(pool_server, "added", tiny_models.path("qwen3"))
        text = complete(pool_server, "added")
        listed = [card["id"] for card in pool_server.request("GET", "/v1/models").json()["data"]]
        remove(pool_server, "added")

    assert "added" in listed
    assert text
    assert [alone] * len(texts) == texts
    assert before == books(pool_server.wait_until_idle())
    response = pool_server.request("POST", "/v1/completions", json={"model": "added", "prompt": "x"})
    assert (404, "NotFoundError") == (response.status_code, response.json()["error"]["type"])


def test_a_removed_model_finishes_what_runs(pool_server: PoolServerProcess, tiny_models: TinyModels) -> None:
    """Removal waits for the running request, which gets all its tokens; new ones are told to come back."""
    before = books(pool_server.wait_until_idle())
    add(pool_server, "added", tiny_models.path("mixtral"))
    alone = complete(pool_server, "added", LONG)
    stream = Stream(pool_server, "added")
    stream.read_one()
    with ThreadPoolExecutor(1) as threads:
        with pool_server.host_held_still():
            removal = threads.submit(remove, pool_server, "added")
            poll(lambda: states(pool_server)["added"], until=lambda state: state == "draining")
            refused = pool_server.request("POST", "/v1/completions", json={"model": "added", "prompt": "x"})
        stream.read_all()
        removal.result(60)

    assert 503 == refused.status_code
    assert int(refused.headers["retry-after"]) >= 1
    assert (True, LONG, alone) == (stream.done, stream.num_tokens, stream.text)
    assert before == books(pool_server.wait_until_idle())


def states(server: PoolServerProcess) -> dict[str, str]:
    """Each model's state in the list of models."""
    cards = server.request("GET", "/v1/models").json()["data"]
    return {card["id"]: card["pool"]["state"] for card in cards if "pool" in card}


def test_removal_aborts_after_its_drain_limit(pool_server: PoolServerProcess, tiny_models: TinyModels) -> None:
    """With `drain=0s` a running request is ended at once, not left hanging, and the pages come back."""
    before = books(pool_server.wait_until_idle())

    def tokens_before_removal() -> int:
        add(pool_server, "added", tiny_models.path("mixtral"))
        stream = Stream(pool_server, "added")
        stream.read_one()
        with ThreadPoolExecutor(1) as thread:
            with pool_server.host_held_still():
                response = thread.submit(pool_server.admin, "DELETE", "/models/added?drain=0s")
                poll(lambda: states(pool_server)["added"], until=lambda state: state == "draining")
                time.sleep(0.3)  # the word to the engine follows at once
            stream.read_all()
        assert response.result().status_code == 200, response.result().text
        assert before == books(pool_server.wait_until_idle())
        return stream.num_tokens

    # on a busy machine the request may have ended before the host was held
    assert any(tokens_before_removal() < LONG for _ in range(5))


def test_adding_and_removing_leaves_no_threads_or_files(
    pool_server: PoolServerProcess, tiny_models: TinyModels
) -> None:
    """After a model was added and removed, server and host have as many threads and open files as before."""

    def cycle() -> None:
        add(pool_server, "added", tiny_models.path("qwen3"))
        complete(pool_server, "added")
        remove(pool_server, "added")

    assert pool_server.process is not None
    pids = (pool_server.process.pid, pool_server.wait_until_idle()["host_pid"])

    def count() -> list[int]:
        return [number(pid) for pid in pids for number in (num_threads, num_files)]

    cycle()  # the first one also starts what stays, such as thread pools
    before = poll_stable(count)
    for _ in range(3):
        cycle()

    poll(lambda: (count(), before), until=lambda seen: all(now <= then for now, then in zip(*seen, strict=True)))
    pool_server.wait_until_idle()


def poll_stable(look: Any) -> Any:
    """Poll until a value came ten times in a row."""
    seen: list[Any] = []

    def settled() -> bool:
        seen.append(look())
        return len(seen) >= 10 and all(value == seen[-1] for value in seen[-10:])

    poll(settled)
    return seen[-1]


def test_a_name_can_be_used_again(pool_server: PoolServerProcess, tiny_models: TinyModels) -> None:
    """Another model under the name of a removed one gives its own tokens."""
    texts = []
    for kind in ("qwen3", "mixtral"):
        add(pool_server, "added", tiny_models.path(kind))
        texts.append(complete(pool_server, "added"))
        remove(pool_server, "added")

    assert texts[0] != texts[1]
    pool_server.wait_until_idle()


def test_models_that_cannot_be_added_are_refused(pool_server: PoolServerProcess, tiny_models: TinyModels) -> None:
    """Each bad entry gets a 4xx or 507 that says what is wrong; the pool is as before and goes on."""
    llama = tiny_models.path("llama")
    long = {"hf_overrides": {"max_position_embeddings": 1_000_000}}
    lora, adapter = {"enable_lora": True, "max_lora_rank": 1}, tiny_models.lora("llama")  # which is of rank 8
    cases: list[tuple[Any, int, list[str]]] = [
        (entry("added", tiny_models.folder / "none"), 400, ["missing path", "none"]),
        (entry("added", llama) | {"model": "./none"}, 400, ["missing path", "none"]),
        (entry("added", llama, max_modl_len=5), 400, ["--max-modl-len", "--max-model-len"]),
        (entry("added", llama, max_model_len="many"), 400, ["max-model-len", "many"]),
        (entry("added", llama, max_model_len=100_000), 400, ["max_model_len", "100000"]),
        (entry("added", llama, dtype="int3"), 400, ["dtype", "int3"]),
        (entry("added", llama, tensor_parallel_size=2), 400, ["same --tensor-parallel-size"]),
        (entry("qwen2", llama), 400, ["'qwen2'", "already"]),
        (entry("added", llama, served_model_name=["qwen2"]), 400, ["'qwen2'", "claimed twice", "--served-model-name"]),
        (entry("added", llama, **lora, lora_modules=[f"{LORA_NAME}={adapter}"]), 400, ["claimed twice", "'llama'"]),
        (entry("added", llama, **lora, lora_modules=["a=/none"]), 400, ["--lora-modules", "missing path /none"]),
        (entry("added", llama, ssl_ciphers="AES"), 400, ["--ssl-ciphers", "is a flag of the whole port"]),
        # 512 bytes of KV per token: more than the 96 MiB of the pool, and more than any cache vLLM is shown.
        (entry("added", llama, **long, max_model_len=250_000), 507, ["device_memory", "--max-model-len"]),
        (entry("added", llama, **long, max_model_len=1_000_000), 507, ["device_memory", "--max-model-len"]),
        # What fails only behind the engine: in the app of the model.
        (entry("added", llama, **lora, lora_modules=[f"a={adapter}"]), 400, ["does not start", "rank"]),
        (entry("no name!", llama), 400, ["name", "no name!"]),
        ({"model": str(llama)}, 400, ["name", "missing"]),
        ({"name": "added"}, 400, ["model", "missing"]),
        (entry("added", llama) | {"slow": 1}, 400, ["slow"]),
        (entry("added", llama) | {"slo": {"ttft": 0, "tpot": "1s"}}, 400, ["ttft"]),
        ([], 400, ["mapping"]),
        ("llama", 400, ["mapping"]),
        (None, 400, ["JSON"]),
    ]
    before = books(pool_server.wait_until_idle())
    wrong = []
    for body, status, parts in cases:
        response = pool_server.admin("POST", "/models", body)
        if status != response.status_code or any(part not in response.text for part in parts):
            wrong.append(f"{body!r}: expected {status} {parts}, got {response.status_code} {response.text[:500]}")

    assert wrong == [], "\n".join([*wrong, pool_server.log[-3000:]])
    assert before == books(pool_server.wait_until_idle())
    assert complete(pool_server, "llama")


def test_weights_that_do_not_fit_beside_the_others(
    pool_server: PoolServerProcess, tiny_models: TinyModels, tmp_path: Path
) -> None:
    """In a pool of fixed weights the refusal names the setting that lets them move."""
    folder = tmp_path / "large"
    shutil.copytree(tiny_models.path("llama"), folder)
    with (folder / "more.safetensors").open("wb") as file:
        file.truncate(200 << 20)  # sparse; counted before anything is read
    response = pool_server.admin("POST", "/models", entry("added", folder))

    assert 507 == response.status_code
    assert "201 pages are needed" in response.text and "(weights: movable)" in response.text
    assert complete(pool_server, "llama")


def test_a_name_of_a_served_adapter_is_taken(pool_server: PoolServerProcess, tiny_models: TinyModels) -> None:
    """A model may not hide an adapter that is served under its name."""
    response = pool_server.admin("POST", "/models", entry(LORA_NAME, tiny_models.path("qwen3")))

    assert 400 == response.status_code
    assert LORA_NAME in response.text


@pytest.mark.parametrize(("path", "status"), [("/models/none", 404), ("/models/qwen2?drain=soon", 400)])
def test_removals_that_cannot_be(pool_server: PoolServerProcess, path: str, status: int) -> None:
    """An unknown model, or a drain limit that is no time, removes nothing."""
    before = books(pool_server.wait_until_idle())

    assert status == pool_server.admin("DELETE", path).status_code
    assert before == books(pool_server.state())


# --- connections -------------------------------------------------------------------------------------------


def test_connections_are_kept_as_long_as_vllm_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 s, or what its environment variable says: clients that reuse connections must give up sooner."""
    from vllm import envs

    from tokenpool.config import ModelSpec, PoolConfig
    from tokenpool.serve.launch.flags import parse_serve_flags
    from tokenpool.serve.pool.http_loop import _uvicorn_config

    envs.disable_envs_cache()  # an engine built in this process has switched it on
    args, pool = parse_serve_flags(["org/model"]), PoolConfig(models=(ModelSpec(name="m", model="org/model"),))
    assert _uvicorn_config(None, args, pool).timeout_keep_alive == 5
    monkeypatch.setenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "75")
    assert _uvicorn_config(None, args, pool).timeout_keep_alive == 75
