# SPDX-License-Identifier: Apache-2.0
"""`tokenpool job`: the `ray job submit` line that serves a pool file as a Ray job, or the submission itself."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from tokenpool.config import load_pool_file
from tokenpool.errors import ConfigError
from tokenpool.serve.key_words import VARIABLES

USAGE = """usage: tokenpool job [--address URL] [--submit] pool.yaml [pool flags]

Prints the line that serves the pool as a job of a Ray cluster; with --submit, runs it.

  --address URL   the cluster's dashboard, such as http://head:8265; default: RAY_ADDRESS, else none is given
  --submit        submit the job; needs ray[default] (pip install 'tokenpool[cluster]')

Paths in the pool file must exist on the node that runs the job, and on those of the hosts."""


def job(words: Sequence[str]) -> int:
    """Run the subcommand; returns its exit status."""
    if not words:
        print(USAGE)
        return 2
    address, submit, rest = _take_flags(list(words))
    line = submit_line(rest, address)
    if not submit:
        print(shlex.join(line))
        return 0
    if find_spec("ray") is None or find_spec("aiohttp_cors") is None:
        raise ConfigError("needs ray[default]: pip install 'tokenpool[cluster]'; the line is: " + shlex.join(line))
    program = os.path.join(os.path.dirname(sys.executable), "ray")
    line[0] = program if os.path.exists(program) else shutil.which("ray") or "ray"
    return os.spawnv(os.P_WAIT, line[0], line)


def submit_line(words: Sequence[str], address: str | None) -> list[str]:
    """The command, word by word; raises ConfigError when the pool file is wrong or missing."""
    files = [word for word in words if word.endswith((".yaml", ".yml"))]
    if len(files) != 1:
        raise ConfigError("give one pool file (.yaml)")
    if any(word.split("=")[0] == "--cluster" for word in words):
        raise ConfigError("a job serves on the cluster that runs it: leave it out", key="--cluster")
    for flag in VARIABLES:
        if any(word.split("=")[0].replace("_", "-") == flag for word in words):
            problem = "would be in the job's command line for all to see: write ${NAME} in the pool file"
            raise ConfigError(problem, key=flag)
    name = load_pool_file(files[0]).cluster.name
    served = [os.path.abspath(word) if word == files[0] else word for word in words]
    where = ["--address", address] if address else []
    return [
        "ray", "job", "submit", *where, "--submission-id", f"tokenpool-{name}", "--no-wait", "--",
        "tokenpool", "serve", *served, "--cluster", "auto",
    ]  # fmt: skip


def _take_flags(words: list[str]) -> tuple[str | None, bool, list[str]]:
    address, submit, rest = None, False, []
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if flag == "--address":
            if not equals and not words:
                raise ConfigError("needs a value", key=flag)
            address = value if equals else words.pop(0)
        elif word == "--submit":
            submit = True
        else:
            rest.append(word)
    return address, submit, rest
