# SPDX-License-Identifier: Apache-2.0
"""Runs each piece of work in a fork of a process that has imported what it needs: a crash costs that piece alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.helpers.plain import ENV, run_program

ROOT = Path(__file__).parents[2]
Work = Callable[[dict[str, Any]], dict[str, Any]]


def run_pieces(
    module: str, pieces: Sequence[Mapping[str, Any]], folder: Path, limit_s: float, *, pooled: bool
) -> dict[str, dict[str, Any]]:
    """Run each piece, which has a `name`, by `module`, whose process calls `serve_pieces`; returns what came of it.

    Only where it is `pooled`, the process has tokenpool.

    The answer has `error` where the piece failed, ended its process or took longer than `limit_s`.
    """
    if not pieces:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "pieces.json"
    file.write_text(json.dumps(list(pieces)))
    for piece in pieces:
        (folder / f"{piece['name']}.json").unlink(missing_ok=True)
    words, log_file = [module, str(file), str(folder), str(limit_s)], folder / f"{module.rpartition('.')[2]}.log"
    if not pooled:
        assert run_program(words, log_file) == 0, log_file.read_text()[-4000:]
    else:
        environ = os.environ | ENV | {"NUMBA_THREADING_LAYER": "workqueue"}
        with log_file.open("w") as log:
            command = [sys.executable, "-m", *words]
            subprocess.run(command, cwd=ROOT, env=environ, stdout=log, stderr=subprocess.STDOUT, check=True)
    return {piece["name"]: json.loads((folder / f"{piece['name']}.json").read_text()) for piece in pieces}


def serve_pieces(work: Work, prepare: Callable[[], None]) -> None:
    """Do `prepare`, then `work` in a fork for each piece that the command line names; each ends within the limit."""
    file, folder, limit_s = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    prepare()
    for piece in json.loads(file.read_text()):
        answer = folder / f"{piece['name']}.json"
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _do(work, piece, answer)
        code = _wait(pid, limit_s)
        if not answer.exists():
            what = f"took more than {limit_s:g} s" if code is None else f"ended with {code}"
            answer.write_text(json.dumps({"error": f"its process {what}"}))


def _do(work: Work, piece: dict[str, Any], answer: Path) -> None:
    """Never returns."""
    try:
        os.setsid()
        log = answer.with_suffix(".log").open("w")
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        made = json.dumps(work(piece))
    except BaseException as error:
        traceback.print_exc()
        made = json.dumps({"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]})
    answer.with_suffix(".part").write_text(made)
    answer.with_suffix(".part").rename(answer)
    sys.stdout.flush()
    os._exit(0)


def _wait(pid: int, limit_s: float) -> int | None:
    """The exit code, negative for a signal; None if the process had to be killed."""
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None
