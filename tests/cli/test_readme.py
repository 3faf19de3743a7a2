# SPDX-License-Identifier: Apache-2.0
"""The commands of the README, run as they stand there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.helpers.doc_blocks import answers, first_block, run_block
from tests.helpers.server import REPOSITORY

pytestmark = pytest.mark.vllm


def test_every_command_of_try_it_works(tmp_path: Path) -> None:
    """Word by word; what each prints says what it is for."""
    section = (REPOSITORY / "README.md").read_text().split("\n### Try it\n")[1]
    printed = run_block(first_block(section), tmp_path / "stderr.log")
    found = answers(printed)
    models = next(answer["data"] for answer in found if answer.get("object") == "list")
    assert [card["id"] for card in models] == ["llama", "qwen2", "gemma3"]
    done = {answer["model"]: answer["choices"][0]["finish_reason"] for answer in found if "choices" in answer}
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
