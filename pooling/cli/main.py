# SPDX-License-Identifier: Apache-2.0
"""The `tokenpool` command. Errors of the user are one line and exit status 2."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from tokenpool.cli.output import fail
from tokenpool.cli.tree import COMMANDS, command_tree, module_of
from tokenpool.errors import ConfigError, PoolError

_FLAGS = {"help": "--help", "version": "--version"}
"""Words that stand for a flag where a command is expected."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        status = run(words)
        sys.stdout.flush()
        return status
    except PoolError as error:
        return fail(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the exit tries to write the rest
        return 128 + signal.SIGPIPE


def run(words: Sequence[str]) -> int:
    """Run one command and return its exit status; raises PoolError with one line."""
    if not words:
        command_tree([]).print_help()
        return 2
    name, *rest = words
    name = _FLAGS.get(name, name)
    if name not in COMMANDS and name not in ("-h", "--help", "-V", "--version"):
        raise ConfigError(f"unknown command {name!r}; known: {', '.join(COMMANDS)}")
    try:
        options = command_tree([name]).parse_args([name, *rest])
    except SystemExit as left:  # argparse has printed the help or the version
        return int(left.code or 0)
    status: int = module_of(name).run(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
