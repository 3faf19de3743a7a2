# SPDX-License-Identifier: Apache-2.0
"""The tree of commands: names, texts and flags, from which help, completion and parsing come. Imports no vLLM.

A command is a module with `add_command`, which adds its parser to the tree, and `run`, which takes what was parsed and
returns the exit status. It is imported only when its own flags are needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any, NamedTuple

from tokenpool import __version__
from tokenpool.cli.parser import Parser


class Command(NamedTuple):
    """Where a command is, and what it does."""

    module: str
    summary: str


COMMANDS = {
    "serve": Command("tokenpool.cli.serve", "serve models, or a pool file, over HTTP"),
    "validate": Command("tokenpool.cli.validate", "check a pool as serve does at its start, and print the plan"),
    "doctor": Command("tokenpool.cli.doctor", "say what is installed, and whether a pool would start"),
    "top": Command("tokenpool.cli.top.command", "watch a running pool in the terminal"),
    "trace": Command("tokenpool.cli.trace", "save or draw what the device did when"),
    "budget": Command("tokenpool.cli.running.budget", "show or change how much memory a running pool may use"),
    "drain": Command("tokenpool.cli.running.drain", "empty a host of a cluster, or use it again"),
    "down": Command("tokenpool.cli.running.down", "end a pool of a Ray cluster, whoever started it"),
    "logs": Command("tokenpool.cli.running.logs", "show the last log lines of a running pool"),
    "sim": Command("tokenpool.cli.sim", "serve a request file in simulated time"),
    "plan": Command("tokenpool.cli.plan", "find the least number of GPUs for a request file"),
    "bench": Command("tokenpool.cli.bench.command", "measure a running server under load"),
    "job": Command("tokenpool.cli.job", "print or submit the Ray job that serves a pool file"),
    "key": Command("tokenpool.cli.key", "make a key of a tenant, or the hash of one"),
    "completion": Command("tokenpool.cli.completion", "print the script that completes commands in a shell"),
}
"""The commands by name, in the order of the help."""


def command_tree(names: Iterable[str]) -> Parser:
    """The parser of `tokenpool`, with the flags of the commands named; of the others it has the summary alone."""
    tree = Parser(
        prog="tokenpool",
        description="Many LLMs share few GPUs: several vLLM engines on one memory budget.",
        epilog="tokenpool COMMAND --help explains a command. An error is one line, and the exit status is 2.",
        allow_abbrev=False,
    )
    tree.add_argument("-V", "--version", action="version", version=__version__, help="print the version and exit")
    commands = tree.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        if name in names:
            module_of(name).add_command(commands, command.summary)
        else:
            commands.add_parser(name, help=command.summary)
    return tree


def module_of(name: str) -> Any:
    """The module of a command."""
    return import_module(COMMANDS[name].module)
