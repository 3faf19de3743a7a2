# SPDX-License-Identifier: Apache-2.0
"""Flags of `vllm serve` in the help and the completion of the commands that take them. Imports vLLM only for these."""

from __future__ import annotations

from collections.abc import Sequence

from tokenpool.cli.parser import Parser
from tokenpool.cli.pool_flags import flag_texts

HELP_OF_VLLM = (
    "--help=all prints the flags of vllm serve too, --help=WORD those of a group, such as Pool or ModelConfig, or with "
    "that in their name."
)


def answer_search(words: Sequence[str], usage: str) -> bool:
    """Print what `--help=...` among the words asks for; returns whether there is one.

    It is what `vllm serve --help=...` prints, with the flags of the pool; `usage` stands above all of them.
    """
    searched = next((word.partition("=")[2] for word in words if word.startswith("--help=")), None)
    if searched is None:
        return False
    from tokenpool.serve.launch.flags import serve_help

    if searched.lower() == "all":
        print(f"usage: {usage}\n")
    print(serve_help(searched, flag_texts()))
    return True


def add_vllm_flags(parser: Parser) -> None:
    """Add all flags of `vllm serve` that the parser has not, each with the first line of its help."""
    from tokenpool.serve.launch.flags import known_flags

    group = parser.add_argument_group("flags of vllm serve")
    for action in dict.fromkeys(known_flags().values()):
        if parser._option_string_actions.keys().isdisjoint(action.option_strings):
            text = (action.help or "").strip().partition("\n")[0]
            if action.nargs == 0:
                group.add_argument(*action.option_strings, action="store_true", help=text)
            else:
                group.add_argument(*action.option_strings, choices=action.choices, nargs=action.nargs, help=text)
