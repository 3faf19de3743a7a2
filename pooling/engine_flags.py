# SPDX-License-Identifier: Apache-2.0
"""Flags of vLLM's command line as they are written in a pool file and in vLLM's config files. No vllm, no ray."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import yaml

from tokenpool import units
from tokenpool.errors import ConfigError, check_setting, config_errors_under, show
from tokenpool.sections import Written
from tokenpool.yaml_loader import SafeLoader

_FLAG = re.compile(r"[A-Za-z][A-Za-z0-9_-]*(\.[A-Za-z0-9_.-]+)?")


def _read_flags(value: object) -> tuple[str, ...]:
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


def take_config_file(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split `--config FILE` off; returns the flags in the file as words, and the other words. Raises ConfigError.

    The file is vLLM's: a mapping of flags. What is given beside it wins, so its words go before the others.
    """
    rest = list(words)
    places = [i for i, word in enumerate(rest) if word.partition("=")[0] == "--config"]
    if not places:
        return [], rest
    check_setting(len(places) == 1, "--config", "is given twice: write one file")
    at = places[0]
    _, equals, path = rest.pop(at).partition("=")
    if not equals:
        check_setting(at < len(rest) and not rest[at].startswith("-"), "--config", "needs a value: a file of flags")
        path = rest.pop(at)
    with config_errors_under(source=f"--config {path}"):
        return _config_words(path), rest


def _config_words(path: str) -> list[str]:
    if not path.endswith((".yaml", ".yml")):
        raise ConfigError("must end with .yaml or .yml")
    try:
        with open(path, "rb") as file:
            flags = yaml.load(file, Loader=SafeLoader)  # noqa: S506 - it is a safe one
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"is no good YAML: {' '.join(str(error).split())}") from None
    if not isinstance(flags, dict):
        raise ConfigError("must hold a mapping of flags to values, such as max-model-len: 512")
    words: list[str] = []
    for key, value in flags.items():
        flag = _flag(key)
        if flag == "--config":
            raise ConfigError("names another file: write its flags here", key="config")
        if value is None:  # as vLLM reads it
            words += [flag, "None"]
        elif value != []:
            with config_errors_under(str(key)):
                words += _flag_words(flag, value)
    return words


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


FLAGS = Written(_read_flags, "flags", {"type": ["object", "array", "string"]})
"""Flags as a mapping, a list or one text; read, they are the words of a command line."""
