# SPDX-License-Identifier: Apache-2.0
"""`tokenpool job`: the `ray job submit` line that serves a pool file as a Ray job, or the submission itself."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from tokenpool.cli.command_line import pool_from_command_line
from tokenpool.cli.key_words import VARIABLES
from tokenpool.cli.output import fail
from tokenpool.cli.parser import Parser
from tokenpool.cli.pool_flags import add_pool_flags
from tokenpool.errors import ConfigError, PoolError

_USAGE = "tokenpool job [--address URL] [--submit] pool.yaml [pool flags]"
_DESCRIPTION = "Print the line that serves a pool as a job of a Ray cluster; with --submit, run it."
_EPILOG = "Paths in the pool file must exist on the node that runs the job, and on those of the hosts."
_NOT_FOUND = 127  # what a shell says of a program that it cannot run


def add_command(commands: argparse._SubParsersAction[Parser], summary: str) -> None:
    """Add the parser of `tokenpool job` to the tree."""
    parser = commands.add_parser(
        "job", help=summary, usage=_USAGE, description=_DESCRIPTION, epilog=_EPILOG, leaves_words=True
    )
    parser.add_argument("file", metavar="FILE", help="the pool file (.yaml)")
    _add_flags(parser)
    add_pool_flags(parser, without=("--cluster", *VARIABLES))


def _add_flags(parser: Parser) -> None:
    address = "the cluster's dashboard, such as http://head:8265; default: RAY_ADDRESS, else none is given"
    submit = "submit the job; needs ray[default] (pip install 'tokenpool[cluster]')"
    parser.add_argument("--address", metavar="URL", help=address)
    parser.add_argument("--submit", action="store_true", help=submit)


def run(options: argparse.Namespace) -> int:
    """Print the line, or run it and return its exit status; raises ConfigError for a command line that cannot be."""
    parser = Parser(prog="tokenpool job", add_help=False, allow_abbrev=False)
    _add_flags(parser)
    flags, words = parser.split(options.words)
    line = submit_line(words, flags.address)
    if not flags.submit:
        print(shlex.join(line))
        return 0
    if find_spec("ray") is None or find_spec("aiohttp_cors") is None:
        raise ConfigError("needs ray[default]: pip install 'tokenpool[cluster]'; the line is: " + shlex.join(line))
    program = os.path.join(os.path.dirname(sys.executable), "ray")
    line[0] = program if os.path.exists(program) else shutil.which("ray") or "ray"
    try:
        return subprocess.run(line, check=False).returncode
    except OSError as error:
        fail(PoolError(f"{line[0]} cannot be run: {error.strerror}"))
        return _NOT_FOUND


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
    flags = [word for word in words if word != files[0]]
    name = pool_from_command_line([files[0], *flags]).cluster.name
    where = ["--address", address] if address else []
    return [
        "ray", "job", "submit", *where, "--submission-id", f"tokenpool-{name}", "--no-wait", "--",
        "tokenpool", "serve", os.path.abspath(files[0]), *flags, "--cluster", "auto",
    ]  # fmt: skip
