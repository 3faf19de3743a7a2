# SPDX-License-Identifier: Apache-2.0
"""`tokenpool completion`: the script with which a shell completes commands, flags and files.

Imports vLLM, which takes seconds: the flags of `vllm serve` are those of the version that is installed. The script
itself starts no Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from tokenpool.cli.parser import Parser
from tokenpool.cli.tree import COMMANDS, command_tree
from tokenpool.cli.vllm_flags import add_vllm_flags

_EPILOG = """For bash:  tokenpool completion bash > ~/.local/share/bash-completion/completions/tokenpool
For zsh:   tokenpool completion zsh > _tokenpool     in a folder of $fpath
The flags of vllm serve are those of the installed version: write the script again after an update."""
_TAKE_VLLM_FLAGS = {"tokenpool serve", "tokenpool validate", "tokenpool doctor"}


def add_command(commands: argparse._SubParsersAction[Parser], summary: str) -> None:
    """Add the parser of `tokenpool completion` to the tree."""
    parser = commands.add_parser(
        "completion",
        help=summary,
        description="Print the script that completes commands in a shell.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=("bash", "zsh"), help="the shell that reads the script")


def run(options: argparse.Namespace) -> int:
    """Print the script."""
    import shtab

    tree = command_tree(COMMANDS)
    for parser in _parsers(tree):
        if parser.prog in _TAKE_VLLM_FLAGS:
            add_vllm_flags(parser)
        for action in parser._actions:
            if "FILE" in str(action.metavar):
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # where shtab looks
    print(shtab.complete(tree, shell=options.shell))
    return 0


def _parsers(parser: Parser) -> Iterator[Parser]:
    """The parser and those of all commands below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _parsers(below)
