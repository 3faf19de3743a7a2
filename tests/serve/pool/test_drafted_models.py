# SPDX-License-Identifier: Apache-2.0
"""Models with speculative decoding behind one port: the same answers, acceptance per model, through a host's death."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import TinyModels
from tests.helpers.cases import NGRAM
from tests.helpers.server import PoolServerProcess, poll
from tests.serve.client.test_failover import results, stop_in_the_middle
from tokenpool.demo.tiny_drafters import make_few_words, make_tiny_drafter

pytestmark = pytest.mark.vllm

DRAFTED = ("ngram", "drafted")
MODELS = ("bare", *DRAFTED)


@pytest.fixture(scope="module")
def server(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolServerProcess]:
    """One model, without a drafter, with n-grams, and with a draft model; on memory for the weights of two."""
    folder: Path = tmp_path_factory.mktemp("drafted")
    words = make_few_words(tiny_models.path("llama"), folder / "words")
    configs = {"ngram": NGRAM, "drafted": make_tiny_drafter("draft_model", words, folder / "draft")}
    args = {name: {"speculative_config": configs[name]} if name in configs else {} for name in MODELS}
    pool: dict[str, Any] = {
        "models": [{"name": name, "model": str(words), "args": args[name]} for name in MODELS],
        "device_memory": "16MiB",
        "page_size": "256KiB",
        "weights": "movable",
        "admin_key": "test-admin-key-0123",
    }
    with PoolServerProcess(pool) as running:
        yield running


def _series(server: PoolServerProcess) -> dict[tuple[str, str], float]:
    text = server.request("GET", "/metrics").text
    return {
        (sample.name, sample.labels["model_name"]): sample.value
        for family in text_string_to_metric_families(text) for sample in family.samples
        if sample.name.startswith("vllm:spec_decode") and "position" not in sample.labels
    }  # fmt: skip


def test_acceptance_is_told_per_model(server: PoolServerProcess) -> None:
    """Each model answers the same, and only those with a drafter have vLLM's series of it, each its own."""
    bodies = {name: {"model": name, "prompt": "hello", "max_tokens": 100, "temperature": 0} for name in MODELS}
    texts = {
        server.request("POST", "/v1/completions", json=body | {"ignore_eos": True}).json()["choices"][0]["text"]
        for body in bodies.values()
    }
    assert len(texts) == 1

    drafts, accepted = (f"vllm:spec_decode_num_{what}_tokens_total" for what in ("draft", "accepted"))
    series = poll(lambda: _series(server), until=lambda seen: all(seen.get((accepted, name)) for name in DRAFTED))
    assert {name for _, name in series} == set(DRAFTED)
    for name in DRAFTED:
        assert 0 < series[accepted, name] < series[drafts, name]
    assert series[drafts, "ngram"] != series[drafts, "drafted"]


def test_streams_go_on_when_the_host_has_died(server: PoolServerProcess) -> None:
    """All have the tokens of a run that nothing disturbed."""
    options = [{"model": name, "temperature": 0} for name in MODELS]
    whole = stop_in_the_middle(server, pid := server.host_pid, options)
    os.kill(pid, signal.SIGCONT)
    expected = results(dict(zip(MODELS, whole, strict=True)))
    calls = stop_in_the_middle(server, pid, options)
    os.kill(pid, signal.SIGKILL)

    assert expected == results(dict(zip(MODELS, calls, strict=True)))
    assert server.host_pid != pid
    server.wait_until_idle()
