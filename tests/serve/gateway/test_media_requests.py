# SPDX-License-Identifier: Apache-2.0
"""Images, videos and sounds of requests, over HTTP, to models that do not fit on the device together."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from tests.conftest import TinyModels
from tests.helpers.inputs.media import data_url, mp4, png, wav
from tests.helpers.server import PoolServerProcess, poll
from tokenpool.demo.tiny_models import make_tiny_model

pytestmark = pytest.mark.vllm

PAGE = 256 << 10
PAGES = 40
TRANSCRIBE, TRANSLATE = "/v1/audio/transcriptions", "/v1/audio/translations"


FILES = {"image": (png, "image/png"), "video": (mp4, "video/mp4"), "audio": (wav, "audio/wav")}
"""By modality how a file is made of a seed, and its type."""


class _Files(BaseHTTPRequestHandler):
    """/MODALITY/SEED is a file; below /moved it is elsewhere."""

    def do_GET(self) -> None:
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("location", self.path.removeprefix("/moved"))
            self.end_headers()
            return
        _, modality, seed = self.path.split("/")
        make, media_type = FILES[modality]
        data = make(int(seed))
        self.send_response(200)
        self.send_header("content-type", media_type)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def files() -> Iterator[str]:
    """The address of a server of files."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Files) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def server(tiny_models: TinyModels) -> Iterator[PoolServerProcess]:
    ears, named = {"max_model_len": 448}, {"allowed_media_domains": ["127.0.0.1"]}
    other = make_tiny_model("whisper", tiny_models.folder / "whisper-2", seed=77)
    models = [
        {"name": "llama", "model": str(tiny_models.path("llama"))},
        {"name": "qwen", "model": str(tiny_models.path("qwen2_5_vl")), "args": named},
        {"name": "llava", "model": str(tiny_models.path("llava"))},
        {"name": "ear", "model": str(tiny_models.path("whisper")), "args": ears},
        {"name": "ear-2", "model": str(other), "args": ears},
    ]
    pool = {
        "models": models,
        "device_memory": PAGES * PAGE,
        "page_size": PAGE,
        "host_memory": "256MiB",
        "weights": "movable",
        "api_key": "test-api-key-0123",
        "admin_key": "test-admin-key-0123",
    }
    with PoolServerProcess(pool) as server:
        yield server


def chat(model: str, *parts: tuple[str, str], **options: Any) -> dict[str, Any]:
    """The body of a chat whose message has `parts`, each a kind and its text or URL."""
    content = [{"type": kind, kind: value if kind == "text" else {"url": value}} for kind, value in parts]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "What is it?"}]}]
    return {"model": model, "messages": messages, "max_tokens": 24, "temperature": 0, "ignore_eos": True, **options}


def answer(server: PoolServerProcess, body: dict[str, Any]) -> str:
    response = server.request("POST", "/v1/chat/completions", json=body)
    assert 200 == response.status_code, response.text
    return response.json()["choices"][0]["message"]["content"]


def hear(server: PoolServerProcess, path: str, model: str, seed: int, **options: Any) -> httpx.Response:
    fields = {"model": model, "language": "en", "max_completion_tokens": "24", "temperature": "0", **options}
    return server.request("POST", path, data=fields, files={"file": ("a.wav", wav(seed), "audio/wav")})


def shown(seed: int, modality: str = "image") -> tuple[str, str]:
    """A part with a file in a data: URL."""
    make, media_type = FILES[modality]
    return f"{modality}_url", data_url(make(seed), media_type)


@pytest.mark.parametrize(("model", "modality"), [("qwen", "image"), ("qwen", "video")])
def test_a_file_by_url_is_the_one_by_data_url(server: PoolServerProcess, files: str, model: str, modality: str) -> None:
    """From a host that is named, of a model that names it; another file is seen or heard as another."""
    seen = answer(server, chat(model, shown(3, modality)))
    assert seen == answer(server, chat(model, (f"{modality}_url", f"{files}/{modality}/3")))
    assert seen != answer(server, chat(model, shown(4, modality)))

    for url in (f"http://localhost/{modality}/3", f"{files}/moved/{modality}/3", f"file:///tmp/{modality}"):
        refused = server.request("POST", "/v1/chat/completions", json=chat(model, (f"{modality}_url", url)))
        assert refused.status_code == 400, f"{url}: {refused.text}"
    broken = chat(model, (f"{modality}_url", f"data:{FILES[modality][1]};base64,AAAA"))
    assert 400 == server.request("POST", "/v1/chat/completions", json=broken).status_code
    assert seen == answer(server, chat(model, shown(3, modality))), "the model goes on after what it refused"


def test_what_a_model_does_not_take_is_refused(server: PoolServerProcess) -> None:
    """By status 400: images of a text model, sounds of one that sees, and another image than it can tell apart."""
    assert answer(server, chat("llava", shown(3))) != answer(server, chat("llava", shown(4)))
    for body in (chat("llama", shown(3)), chat("qwen", shown(3, "audio")), chat("llava", shown(3, "video"))):
        refused = server.request("POST", "/v1/chat/completions", json=body)
        assert 400 == refused.status_code, refused.text


def test_sounds_go_to_the_model_of_the_form(server: PoolServerProcess) -> None:
    """Two models for sounds give texts of their own; one that cannot hear, or is not there, says so."""
    texts = {}
    for path in (TRANSCRIBE, TRANSLATE):
        for model in ("ear", "ear-2"):
            response = hear(server, path, model, 1)
            assert 200 == response.status_code, response.text
            texts[path, model] = response.json()["text"]
    for path in (TRANSCRIBE, TRANSLATE):
        assert texts[path, "ear"] != texts[path, "ear-2"]
    assert texts[TRANSCRIBE, "ear-2"] != texts[TRANSLATE, "ear-2"]
    assert texts[TRANSCRIBE, "ear"] != hear(server, TRANSCRIBE, "ear", 2).json()["text"]
    assert texts[TRANSCRIBE, "ear"] == hear(server, TRANSCRIBE, "ear", 1).json()["text"]

    assert 404 == hear(server, TRANSCRIBE, "nobody", 1).status_code
    assert hear(server, TRANSCRIBE, "llama", 1).status_code in (400, 404, 501)


def test_all_at_once_give_what_each_gives_alone(server: PoolServerProcess) -> None:
    """Weights, KV and cross-attention KV of five models come and go on memory for two or three."""
    jobs: dict[str, Any] = {f"qwen {seed}": chat("qwen", shown(seed)) for seed in range(4)}
    jobs |= {f"llava {seed}": chat("llava", shown(seed), shown(seed + 1)) for seed in range(4)}
    jobs |= {f"llama {seed}": chat("llama", max_tokens=40 + seed) for seed in range(4)}
    jobs |= {f"{ear} {seed}": (ear, seed) for ear in ("ear", "ear-2") for seed in range(4)}

    def run(job: Any) -> str:
        return answer(server, job) if isinstance(job, dict) else hear(server, TRANSCRIBE, *job).json()["text"]

    alone = {name: run(job) for name, job in jobs.items()}
    before = server.state()["host"]["residency"]["weight_evictions"]
    with ThreadPoolExecutor(len(jobs)) as threads:
        together = dict(zip(jobs, threads.map(run, jobs.values()), strict=True))

    assert alone == together
    state = server.wait_until_idle()["host"]
    assert state["residency"]["weight_evictions"] > before
    for name in ("qwen", "llava"):
        model = state["models"][name]
        assert 0 < model["encoder_output_bytes"] <= model["encoder_cache_bytes"] <= model["fixed_bytes"]


def test_a_request_that_a_dead_host_had_still_has_its_image(server: PoolServerProcess) -> None:
    """The stream goes on in the next host, which sees the image again; so does one that had not begun."""
    bodies = [chat("qwen", shown(5), max_tokens=400), chat("llava", shown(6), max_tokens=400)]
    whole = [answer(server, body) for body in bodies]
    begun = threading.Barrier(len(bodies) + 1)

    def stream(body: dict[str, Any]) -> str:
        text, url = "", f"{server.base_url}/v1/chat/completions"
        headers = server.headers(server.api_key)
        with httpx.stream("POST", url, json=body | {"stream": True}, headers=headers, timeout=180) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    is_first = not text
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
                    if is_first and text:
                        begun.wait(60)
        return text

    pid = server.host_pid
    with ThreadPoolExecutor(len(bodies)) as threads:
        streams = [threads.submit(stream, body) for body in bodies]
        begun.wait(60)
        os.kill(pid, signal.SIGKILL)
        assert whole == [running.result() for running in streams]
    assert pid != poll(lambda: server.host_pid)
