# SPDX-License-Identifier: Apache-2.0
"""Each model's flags, read by vLLM's own parser so that every vLLM flag exists per model."""

from __future__ import annotations

import copy
import difflib
import json
from argparse import SUPPRESS, Action, Namespace
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import NoReturn

from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tokenpool.engine_flags import take_config_file
from tokenpool.errors import ConfigError


class _Parser(FlexibleArgumentParser):
    """vLLM's parser that raises instead of printing its usage and leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


@cache
def _serve_parser() -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    make_arg_parser(parser)
    return parser


def known_flags() -> Mapping[str, Action]:
    """Every option string of `vllm serve`, with what vLLM's parser does about it."""
    return _serve_parser()._option_string_actions


def serve_help(search: str, pool_flags: Mapping[str, str]) -> str:
    """What `vllm serve --help=SEARCH` prints: all flags, those of a group, or those whose name has `search` in it.

    `pool_flags` are flags of the pool with their texts, which are searched too, as the group Pool.
    """
    parser = _Parser(prog="tokenpool serve", usage="tokenpool serve [MODEL ...] [flags]", add_help=False)
    make_arg_parser(parser)
    group = parser.add_argument_group("Pool", "Settings of the whole pool, as in a pool file.")
    for flag, text in pool_flags.items():
        if flag not in parser._option_string_actions:
            group.add_argument(flag, help=text, default=SUPPRESS)
    parser._search_keyword = search
    return parser.format_help()


def changed_flags(args: Namespace) -> list[str]:
    """The flags, by their first long name, whose value in `args` is not vLLM's default."""
    defaults, missing = _serve_parser().parse_args([]), object()
    changed = {
        id(action): next(name for name in action.option_strings if name.startswith("--"))
        for action in known_flags().values()
        if getattr(args, action.dest, missing) != getattr(defaults, action.dest, missing)
    }
    return list(changed.values())


@lru_cache(maxsize=64)
def _parsed(words: tuple[str, ...]) -> Namespace:
    """What the parser makes of words without a model; a pool file of a thousand models has few of them."""
    return _serve_parser().parse_args(list(words))


def parse_serve_flags(words: Sequence[str]) -> Namespace:
    """Parse the words after `vllm serve`; raises ConfigError of one line that names the flag.

    What is returned shares no object with any other result: vLLM changes some of it in place.
    """
    # The parser takes an unknown flag's value for a positional and names the wrong word: look first.
    words = spell_out(words)
    try:
        # What is parsed is kept, and its defaults in any case: without a copy, one model's flags were written into all.
        model, words = (words[:1], words[1:]) if words and not words[0].startswith("-") else ([], words)
        args = copy.deepcopy(_parsed(tuple(_with_json_lists(words))))
        if model:
            args.model = args.model_tag = model[0]
        validate_parsed_serve_args(args)
    except ConfigError:
        raise
    except Exception as error:  # vLLM raises many kinds for a bad value; all mean "does not start"
        parameter = getattr(error, "parameter", None)  # of vLLM's own errors
        raise ConfigError(str(error), key=parameter and f"--{parameter.replace('_', '-')}") from error
    return args


def spell_out(words: Sequence[str]) -> list[str]:
    """The words with the flags of a `--config` file in place of it, and with every flag under its full name.

    Raises ConfigError for a flag that there is not, and for the beginning of several.
    """
    if len(words) > 1 and not words[0].startswith("-"):  # the model
        return [words[0], *spell_out(words[1:])]
    from_file, given = take_config_file(words)
    spelled: list[str] = []
    rest = [*from_file, *given]
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*spelled, word, *rest]
        if not word.startswith("--"):
            spelled.append(word)
            continue
        name, equals, value = word.partition("=")
        head, dot, tail = name.partition(".")
        if full := _full_name(head.replace("_", "-")):
            spelled.append(f"{full}{dot}{tail}{equals}{value}")
    return spelled


def _full_name(flag: str) -> str | None:
    """The flag that begins so, as argparse looks for it; None for one that says what is so anyway."""
    known = known_flags()
    if flag in known:
        return flag
    plain = known.get(f"--{flag.removeprefix('--no-')}")
    if flag.startswith("--no-") and plain is not None and plain.nargs == 0:
        return None  # a flag that can only be set, as `false` in a file
    found = [name for name in known if name.startswith(flag)]
    if len({known[name].dest for name in found}) > 1:
        raise ConfigError(f"{flag} may mean {', '.join(sorted(found))}: write it out", key=flag)
    if found:
        return found[0]
    near = difflib.get_close_matches(flag, known, 1)
    hint = f"did you mean {near[0]}?" if near else "it is no flag of vllm serve; remove it"
    raise ConfigError(f"unknown flag {flag}: {hint}", key=flag)


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
        if flag not in flags:
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
