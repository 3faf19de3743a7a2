# SPDX-License-Identifier: Apache-2.0
"""Flags of vLLM's command line as they are written in a pool file. Imports neither vllm nor ray."""

from __future__ import annotations

import json
import re

from tokenpool import units
from tokenpool.errors import ConfigError, check_setting, config_errors_under, show

_FLAG = re.compile(r"[A-Za-z][A-Za-z0-9_-]*(\.[A-Za-z0-9_.-]+)?")


def parse_flags(value: object) -> tuple[str, ...]:
    """The flags as words of a command line, from a mapping, a list or one text; raises ConfigError."""
    args: list[str] = []
    if isinstance(value, str):
        args = units.split_words(value)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            with config_errors_under(f"[{i}]"):
                word = _word(item)
                # Only "--flag value" is split: a JSON value that is an item of its own stays whole.
                args += units.split_words(word) if re.match(r"-\S*\s", word) else [word]
    elif isinstance(value, dict):
        seen: set[str] = set()
        for key, item in value.items():
            flag = _flag(key)
            check_setting(flag not in seen, None, f"flag {flag} is given twice: remove one")
            seen.add(flag)
            with config_errors_under(key):
                args += _flag_words(flag, item)
    else:
        raise ConfigError(f"expected a list, a text or a mapping of vLLM flags, got {show(value)}")
    return tuple(args)


def _flag(key: object) -> str:
    if not isinstance(key, str) or not _FLAG.fullmatch(key.removeprefix("--")):
        raise ConfigError(f"{show(key)} is no flag: write such as max_model_len: 512")
    # vLLM reads _ as - too, but not behind a dot, where keys of a JSON value begin.
    head, dot, tail = key.removeprefix("--").partition(".")
    return f"--{head.replace('_', '-')}{dot}{tail}"


def _flag_words(flag: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, list):
        check_setting(len(value) > 0, None, "is an empty list: give values, or remove the flag")
        return [flag, *(_word(item) for item in value)]
    word = _word(value)
    # A value with a leading dash would be read as a flag of its own.
    return [f"{flag}={word}"] if word.startswith("-") else [flag, word]


def _word(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float | dict) and not isinstance(value, bool):
        try:
            return json.dumps(value, allow_nan=False)
        except (ValueError, TypeError, RecursionError):
            pass  # NaN, a date, a key that is no text, a loop of YAML anchors
    raise ConfigError(f"expected a text, a finite number or a mapping of such, got {show(value)}")
