# SPDX-License-Identifier: Apache-2.0
"""The pool of docs/many_kinds.md: six kinds of model take turns on memory for two or three, and answer as alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.doc_blocks import answers, first_block, run_block
from tests.helpers.inputs.media import data_url
from tests.helpers.server import REPOSITORY, PoolServerProcess
from tokenpool.demo.many_kinds import MODELS, write_many_kinds, write_picture, write_speech

pytestmark = pytest.mark.vllm

SEEDS = (0, 1)
MAX_TOKENS = 40
Job = Callable[[PoolServerProcess], Any]


def tokens(seed: int) -> list[int]:
    """A prompt."""
    return [3 + ((11 + 2 * seed) * i + seed) % 500 for i in range(60)]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The pool file, with whole paths."""
    file = write_many_kinds(tmp_path_factory.mktemp("many") / "kinds")
    read: dict[str, Any] = yaml.safe_load(file.read_text())
    for model in read["models"]:
        model["model"] = str(file.parent / model["model"])
    return read


@pytest.fixture(scope="module")
def server(pool: dict[str, Any]) -> Iterator[PoolServerProcess]:
    with PoolServerProcess(pool) as running:
        yield running


def post(path: str, read: Callable[[Any], Any], **options: Any) -> Job:
    """A request, and what of its answer is compared."""

    def run(server: PoolServerProcess) -> Any:
        response = server.request("POST", path, **options)
        assert 200 == response.status_code, response.text
        return read(response.json())

    return run


def complete(name: str, seed: int) -> Job:
    fixed = {"max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    body = {"model": name, "prompt": tokens(seed), **fixed}
    return post("/v1/completions", lambda answer: answer["choices"][0]["token_ids"], json=body)


def look(seed: int, folder: Path) -> Job:
    write_picture(folder / f"{seed}.png", seed)
    url = data_url((folder / f"{seed}.png").read_bytes(), "image/png")
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    body = {"model": "eye", "messages": [{"role": "user", "content": content}], "max_tokens": MAX_TOKENS}
    read = lambda answer: answer["choices"][0]["message"]["content"]  # noqa: E731
    return post("/v1/chat/completions", read, json=body | {"temperature": 0, "ignore_eos": True})


def hear(seed: int, folder: Path) -> Job:
    write_speech(folder / f"{seed}.wav", seed)
    form = {"model": "ear", "language": "en", "temperature": "0", "max_completion_tokens": str(MAX_TOKENS)}
    file = {"file": ("a.wav", (folder / f"{seed}.wav").read_bytes(), "audio/wav")}
    return post("/v1/audio/transcriptions", lambda answer: answer["text"], data=form, files=file)


def embed(seed: int) -> Job:
    body = {"model": "embed", "input": tokens(seed)}
    return post("/v1/embeddings", lambda answer: answer["data"][0]["embedding"], json=body)


def rerank(seed: int) -> Job:
    body = {"model": "rerank", "query": f"Where is cat {seed}?", "documents": ["On the mat.", "19.99 dollars."]}
    read = lambda answer: [one["relevance_score"] for one in answer["results"]]  # noqa: E731
    return post("/v1/rerank", read, json=body)


def all_jobs(folder: Path) -> dict[tuple[str, int], Job]:
    """Of each model two."""
    jobs: dict[tuple[str, int], Job] = {}
    for seed in SEEDS:
        jobs |= {(name, seed): complete(name, seed) for name in ("hybrid", "fp8")}
        jobs |= {("eye", seed): look(seed, folder), ("ear", seed): hear(seed, folder)}
        jobs |= {("embed", seed): embed(seed), ("rerank", seed): rerank(seed)}
    assert {name for name, _ in jobs} == {*MODELS}
    return jobs


def test_each_kind_answers_under_switching_as_alone(server: PoolServerProcess, tmp_path: Path) -> None:
    """Twelve requests to six models, one after another and all at once; each model's answers follow its input."""
    jobs = all_jobs(tmp_path)
    alone = {key: job(server) for key, job in jobs.items()}
    for name in MODELS:
        assert alone[name, 0] != alone[name, 1], name
    before = server.state()["host"]["residency"]["weight_evictions"]
    with ThreadPoolExecutor(len(jobs)) as threads:
        together = dict(zip(jobs, threads.map(lambda job: job(server), jobs.values()), strict=True))

    for key, answer in alone.items():
        # Vectors and scores end in other bits where more texts share a step, in plain vLLM too.
        is_pooled = key[0] in ("embed", "rerank")
        assert together[key] == (pytest.approx(answer, abs=1e-5) if is_pooled else answer), key
    state = server.wait_until_idle()["host"]
    assert state["residency"]["weight_evictions"] >= before + len(MODELS) - 2


@pytest.mark.slow
def test_every_command_of_the_page_works(tmp_path: Path) -> None:
    """As it stands there."""
    page = (REPOSITORY / "docs/many_kinds.md").read_text()
    printed = run_block(first_block(page), tmp_path / "stderr.log")
    found = answers(printed)
    models = next(answer["data"] for answer in found if answer.get("object") == "list")
    assert [card["id"] for card in models] == [*MODELS]
    assert {"hybrid", "eye", "fp8"} == {answer["model"] for answer in found if "choices" in answer}
    assert any("text" in answer and "usage" in answer for answer in found), json.dumps(found)
    assert any("results" in answer for answer in found)
    gone = next(line for line in printed.splitlines() if line.startswith('tokenpool:evictions_total{kind="weights"}'))
    assert float(gone.split()[-1]) > 0
