# SPDX-License-Identifier: Apache-2.0
"""The commands of the README, run as they stand there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.server import REPOSITORY, free_port

pytestmark = pytest.mark.vllm

LIMIT_S = 900


def _commands() -> str:
    """The block of the section "Try it"."""
    section = (REPOSITORY / "README.md").read_text().split("\n### Try it\n")[1]
    return section.split("```sh\n")[1].split("```")[0]


def _answers(printed: str) -> list[dict]:
    """The JSON objects, as the server's answers are, in what was printed; one may stand behind another in a line."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while (at := printed.find("{", at)) >= 0:
        try:
            answer, at = decoder.raw_decode(printed, at)
            found.append(answer)
        except ValueError:
            at += 1
    return found


def test_every_command_of_try_it_works(tmp_path: Path) -> None:
    """Word by word, but for a free port in place of 8000 and the environment of the tests in place of .venv."""
    port = free_port()
    script = re.sub(r"\b8000\b", str(port), _commands()).replace("$PWD/.venv", sys.prefix)
    assert str(port) in script and sys.prefix in script
    env = os.environ | {"TOKENPOOL_URL": f"http://127.0.0.1:{port}", "MAKEFLAGS": "-e", "VENV": sys.prefix}
    log = tmp_path / "stderr.log"

    with log.open("w") as errors:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            printed, _ = process.communicate(timeout=LIMIT_S)
        finally:  # also the server, if a command before its end has failed
            if process.poll() != 0:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    assert process.returncode == 0, f"{printed[-3000:]}\n{log.read_text()[-3000:]}"
    answers = _answers(printed)
    models = next(answer["data"] for answer in answers if answer.get("object") == "list")
    assert [card["id"] for card in models] == ["llama", "qwen2", "gemma3"]
    done = {answer["model"]: answer["choices"][0]["finish_reason"] for answer in answers if "choices" in answer}
    assert done == {"llama": "length", "more": "length"}
    lines = printed.splitlines()
    assert lines.count("ok") == 2, "of doctor and validate"
    assert any(re.match(r"all +\d+ +0 ", line) for line in lines), "bench serve: none failed"
    assert any(re.match(r"gemma3 +on device", line) for line in lines), "top"
    assert any(line.startswith('tokenpool:turns_total{model_name="qwen2"}') for line in lines)
    assert json.loads((REPOSITORY / "build/demo/trace.json").read_text())["traceEvents"]
    assert any(re.match(r"slack +\d+ ", line) for line in lines), "plan"
    assert any("tokens on time" in line for line in lines), "sim"
    assert lines[-1].startswith("hash: sha256:"), "key new"
