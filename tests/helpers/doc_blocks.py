# SPDX-License-Identifier: Apache-2.0
"""Runs the commands of a page as they stand there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers.server import REPOSITORY, free_port

LIMIT_S = 900


def first_block(text: str) -> str:
    """The first block of shell commands in a text."""
    return text.split("```sh\n", 1)[1].split("```", 1)[0]


def run_block(block: str, log: Path) -> str:
    """Run a block and return what it prints; AssertionError, with the end of both, unless all of it succeeds.

    Word by word, but for a free port in place of 8000 and the environment of the tests in place of .venv. What goes to
    stderr goes to `log`.
    """
    port = free_port()
    script = re.sub(r"\b8000\b", str(port), block).replace("$PWD/.venv", sys.prefix)
    assert str(port) in script and sys.prefix in script
    env = os.environ | {"TOKENPOOL_URL": f"http://127.0.0.1:{port}", "MAKEFLAGS": "-e", "VENV": sys.prefix}

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
    return printed


def answers(printed: str) -> list[dict[str, Any]]:
    """The JSON objects, as the server's answers are, in what was printed; one may stand behind another in a line."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while (at := printed.find("{", at)) >= 0:
        try:
            answer, at = decoder.raw_decode(printed, at)
            found.append(answer)
        except ValueError:
            at += 1
    return found
