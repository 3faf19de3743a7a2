# SPDX-License-Identifier: Apache-2.0
"""`PooledLLM`: vLLM's `LLM` for several models. Runs in a child, which shares no vLLM with other tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TinyModels
from tests.helpers.server import TINY_ARGS, PoolServerProcess

pytestmark = pytest.mark.vllm

PROMPTS = {"qwen2": [[5, 6, 7, 8], [9, 10, 11]], "gemma3": [[12, 13, 14]]}
MAX_TOKENS = 12
SCRIPT = Path(__file__).parents[1] / "helpers" / "offline_script.py"


@pytest.fixture(scope="module")
def result(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script saw."""
    out = tmp_path_factory.mktemp("offline") / "out.json"
    task = {
        "models": {kind: {"model": str(tiny_models.path(kind)), "args": TINY_ARGS} for kind in PROMPTS},
        "prompts": PROMPTS,
        "max_tokens": MAX_TOKENS,
        "out": str(out),
    }
    env = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_ENABLE_V1")}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(task)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("model", PROMPTS)
def test_generates_what_the_server_generates(
    result: dict[str, Any], pool_server: PoolServerProcess, model: str
) -> None:
    for prompt, seen in zip(PROMPTS[model], result["outputs"][model], strict=True):
        body = {"model": model, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "return_token_ids": True}
        answer = pool_server.request("POST", "/v1/completions", json=body).json()
        assert seen["token_ids"] == answer["choices"][0]["token_ids"]
        assert seen["text"] == answer["choices"][0]["text"]
        assert len(seen["token_ids"]) == MAX_TOKENS


def test_models_share_one_device_whose_weights_move(result: dict[str, Any]) -> None:
    state = result["state"]
    assert set(state["models"]) == set(PROMPTS)
    assert state["movable_weights"] is True
    assert all(model["tokens"] > 0 for model in state["models"].values())


def test_every_method_of_llm_works_on_a_model(result: dict[str, Any]) -> None:
    assert result["chat_tokens"] == MAX_TOKENS


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        ("unknown model", "'nobody': is no model of this pool; it has qwen2, gemma3"),
        ("unknown setting", "unknown key 'device_memry', did you mean 'device_memory'?"),
        ("settings beside a file", "write device_memory into the pool file"),
    ],
)
def test_refuses_in_one_line(result: dict[str, Any], attempt: str, words: str) -> None:
    assert words in result["errors"][attempt]


def test_a_dead_host_ends_calls_with_an_error(result: dict[str, Any]) -> None:
    assert result["after_kill"] == ["EngineDeadError", "HostError"]
