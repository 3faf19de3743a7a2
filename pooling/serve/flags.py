# SPDX-License-Identifier: Apache-2.0
"""Each model's flags, read by vLLM's own parser so that every vLLM flag exists per model."""

from __future__ import annotations

import copy
import difflib
import json
from argparse import Namespace
from collections.abc import Sequence
from typing import NoReturn

from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tokenpool.errors import ConfigError


class _Parser(FlexibleArgumentParser):
    """vLLM's parser that raises instead of printing its usage and leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


_parser: _Parser | None = None


def _serve_parser() -> _Parser:
    global _parser
    if _parser is None:
        parser = _Parser(add_help=False, allow_abbrev=False)
        make_arg_parser(parser)
        _parser = parser
    return _parser


def known_flags() -> set[str]:
    """Every option string of `vllm serve`."""
    return {option for action in _serve_parser()._actions for option in action.option_strings}


def parse_serve_flags(words: Sequence[str]) -> Namespace:
    """Parse the words after `vllm serve`; raises ConfigError of one line that names the flag.

    What is returned shares no object with any other result: vLLM changes some of it in place.
    """
    parser = _serve_parser()
    # The parser takes an unknown flag's value for a positional and names the wrong word: look first.
    _refuse_unknown(words)
    try:
        # The defaults are made once per process: without a copy, one model's flags would be written into all.
        args = copy.deepcopy(parser.parse_args(_with_json_lists(words)))
        if args.model_tag is not None:
            args.model = args.model_tag
        validate_parsed_serve_args(args)
    except ConfigError:
        raise
    except Exception as error:  # vLLM raises many kinds for a bad value; all mean "does not start"
        raise ConfigError(str(error)) from error
    return args


def _with_json_lists(words: Sequence[str]) -> list[str]:
    """Write the values of flags that want one list in JSON, such as --allowed-origins, as that list.

    In a pool file and on a command line they look like flags of several values.
    """
    flags = {
        option
        for action in _serve_parser()._actions
        if action.type is json.loads and isinstance(action.default, list)
        for option in action.option_strings
    }
    written: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if flag.replace("_", "-") not in flags:
            written.append(word)
            continue
        values = [value] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        is_written = not values or (len(values) == 1 and _is_json_list(values[0]))
        written += [flag, *(values if is_written else [json.dumps(values)])]
    return written


def _is_json_list(text: str) -> bool:
    try:
        return isinstance(json.loads(text), list)
    except ValueError:
        return False


def _refuse_unknown(words: Sequence[str]) -> None:
    known = known_flags()
    for word in words:
        if word == "--":
            return
        if not word.startswith("--"):
            continue
        flag = word.split("=", 1)[0].split(".", 1)[0].replace("_", "-")
        if flag not in known:
            near = difflib.get_close_matches(flag, known, 1)
            hint = f"did you mean {near[0]}?" if near else "it is no flag of vllm serve; remove it"
            raise ConfigError(f"unknown flag {flag}: {hint}", key=flag)
